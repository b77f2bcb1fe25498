"""Ending a compile early: by Ctrl-C, by ``AsynDBT.stop`` from any thread, or because its time is over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

from asyndbt_dspy.programs.paid_rollouts import STOP, RolloutGate

logger = logging.getLogger(__name__)

_Found = TypeVar("_Found")
LONGEST_TIMER_S = 1e7
"""About four months: event loops take no infinite delay."""


class StopRequest:
    """One compile's wish to end: no rollout begins any more, those in flight end, and then the run does.

    Those that have had no answer and only wait for their turn (a rate limit, a pause that the endpoint asked for) are taken
    back; where the run's time is over, all that have to wait, and those that take far longer than their like.

    Made inside the compile's event loop.

    Args:
        remedy: Said once it is asked for: how to go on later.

    Attributes:
        gate: All rollouts of the compile pass it.
        was_asked: Whether anybody asked.
        reason: Why the run ends.
    """

    def __init__(self, remedy: str) -> None:
        self.gate = RolloutGate()
        self.was_asked = False
        self.reason = "stopped before its end, with the best so far"
        self._remedy = remedy
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Safe from any thread and from a signal handler; asking twice changes nothing."""
        self._loop.call_soon_threadsafe(self._ask)

    def ask_at(self, delay_s: float, reason: str) -> asyncio.TimerHandle:
        """Ask after so many seconds; the handle takes it back."""

        def ask() -> None:
            if not self.was_asked:
                self.reason = reason
            self.gate.over_since_s = self._loop.time()
            self._ask()

        return self._loop.call_later(min(max(0.0, delay_s), LONGEST_TIMER_S), ask)

    def abort(self) -> None:
        """End at once, with whatever is in flight cancelled. Safe from any thread."""
        if self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)

    def _ask(self) -> None:
        if self.was_asked:
            return
        self.was_asked = True
        logger.warning(
            "Stopping: %d rollouts in flight end first, then the best program so far is returned. %s",
            self.gate.in_flight,
            self._remedy,
        )
        self.gate.hold(STOP)
        self._asked.set()

    async def asked(self) -> None:
        """Wait until somebody has asked."""
        await self._asked.wait()

    async def drained(self) -> None:
        """Wait until somebody has asked and nothing is in flight any more."""
        await self.asked()
        await self.gate.drained()

    async def unless_asked(
        self, work: Coroutine[Any, Any, _Found], drop: Callable[[_Found], Awaitable[None]]
    ) -> _Found | None:
        """The result of ``work``; ``None`` where the end was asked for and came first (``work`` is cancelled).

        Args:
            drop: What is found all the same, and returned to nobody, is handed to it: a compile may be cancelled just then.
        """
        task, drained = asyncio.ensure_future(work), asyncio.ensure_future(self.drained())
        is_wanted = False
        try:
            await asyncio.wait({task, drained}, return_when=asyncio.FIRST_COMPLETED)
            is_wanted = task.done()
        finally:
            task.cancel()
            drained.cancel()
            found, _ = await asyncio.gather(task, drained, return_exceptions=True)
            if not (is_wanted or isinstance(found, BaseException)):
                await drop(found)
        return task.result() if is_wanted else None


@contextlib.contextmanager
def stopped_by_interrupt(stop: Callable[[], bool]) -> Iterator[None]:
    """While the context lasts, the first SIGINT calls ``stop`` and each further one raises ``KeyboardInterrupt``.

    Only in the main thread, and only in place of Python's own handler or that of ``asyncio.run``: a program that handles
    the signal itself keeps its way. The handler of before is back afterwards.

    Args:
        stop: Returns whether there was something to stop.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    if not is_main or not _is_pythons(before):
        yield
        return
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not stop():
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_pythons(handler: Any) -> bool:
    """Whether nobody but Python or asyncio (whose handler waits for the loop that a compile keeps busy) chose it."""
    asyncios = getattr(getattr(handler, "func", None), "__qualname__", "") == "Runner._on_sigint"
    return handler is signal.default_int_handler or asyncios
