"""A time limit that does not run while the process stands still, nor while a call waits for its turn here.

A process that was stopped (Ctrl-Z, a paused container, a machine that slept) wakes up with all its deadlines over at once.
Its calls have done nothing wrong: each gets its time once more, instead of all workers being set aside for not answering.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from asyndbt_dspy.lms.call_watch import CallWatch
from asyndbt_dspy.programs.paid_rollouts import RolloutGate, WithdrawnError

_STOOD_STILL_S = 1.0
_SHARE = 0.1
"""A timer that goes off later than both this many seconds and this part of its limit was not late by chance: nothing ran."""

_LEAST = 0.01
"""Part of a limit: being held for less buys no more time. Each extension is as long as the last stretch, down to nothing."""
_LAST_S = 10.0
"""What is in flight when the run's time is over may take so long where nothing tells what is usual."""
_JAMMED = 10
"""Limits in which nothing ended: then those that never end hold all that the others wait for (threads, places)."""

Found = TypeVar("Found")


def was_still(late_s: float, limit_s: float) -> bool:
    """Whether a timer of ``limit_s`` that went off so many seconds too late means that the process stood still."""
    return late_s > max(_STOOD_STILL_S, _SHARE * limit_s)


class CutError(asyncio.CancelledError):
    """A call was cancelled, and not by whoever waits for it."""


async def within(seconds: float, call: Awaitable[Found], held_s: Callable[[], float] = lambda: 0.0) -> Found:
    """What ``call`` returns.

    Args:
        seconds: > 0, of the event loop's clock while the process ran.
        held_s: Seconds so far in which ``call`` was held back; they are not among its own.

    Raises:
        asyncio.TimeoutError: it took longer; it was cancelled.
        CutError: somebody else cancelled it.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(call)
    until, known_s = loop.time() + seconds, held_s()
    try:
        while not task.done():
            await asyncio.wait((task,), timeout=until - loop.time())
            late = loop.time() - until
            if late < 0.0:
                continue
            more_s = held_s() - known_s
            if was_still(late, seconds):
                until = loop.time() + seconds
            elif more_s > _LEAST * seconds:
                until += more_s
            else:
                break
            known_s += more_s
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
        if task.cancelled():
            raise asyncio.TimeoutError
    if task.cancelled():
        raise CutError
    return task.result()


class Patience:
    """The time limits of many rollouts, and how long the time that they wait for their turn is left out of it.

    Not once the run is to stop, for what is in flight ends first; nor where none of the calls has ended for long. Then those
    that only wait are taken back, and once the run's time is over those that take too long.

    Args:
        gate: Of the run.
        longest_s: How long the worker's calls may take at most, as far as that is known; else infinite.
    """

    def __init__(self, gate: RolloutGate, longest_s: Callable[[str], float]) -> None:
        self._gate = gate
        self._longest_s = longest_s
        self._ended_s: float | None = None

    async def within(
        self,
        seconds: float,
        call: Coroutine[Any, Any, Found],
        calls: CallWatch,
        worker: str = "",
        *,
        is_search: bool = False,
    ) -> Found:
        """``within`` the limit of one rollout of this worker (of the search?), whose LM calls are watched.

        Raises:
            WithdrawnError: it was taken back.
        """
        clock = asyncio.get_running_loop().time
        begun_s = clock()

        def left_out() -> float:
            ended_s = begun_s if self._ended_s is None else self._ended_s
            is_jammed = clock() - ended_s > _JAMMED * seconds
            return 0.0 if is_jammed or self._gate.is_stopping else calls.held_s()

        def may_withdraw(time_is_over_for_s: float | None) -> bool:
            if time_is_over_for_s is None:
                return calls.is_waiting()
            longest_s = self._longest_s(worker)
            took_s = clock() - begun_s - calls.held_s()
            is_late = took_s > longest_s if math.isfinite(longest_s) else time_is_over_for_s > _LAST_S
            return is_late or calls.is_waiting(even_if_begun=True)

        task = asyncio.ensure_future(call)
        with self._gate.withdrawable(task, may_withdraw, is_search=is_search):
            try:
                found = await within(seconds, task, left_out)
            except CutError:
                if self._gate.has_withdrawn(task):
                    raise WithdrawnError from None
                raise
        self._ended_s = clock()
        return found
