"""What becomes of the LM calls of one piece of work, whatever its program makes of their errors.

A program may catch an error, bury it in an exception group, or leave it in a thread (``dspy.Parallel`` and ``dspy.BestOfN``
log it and go on). A watch hears of it at the LM. It is a callback in DSPy's settings, which go wherever a program calls its LM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.lms.failures import FailureKind, causes, kind_of


class CallWatch(BaseCallback):
    """Hears of LM calls that failed for good, retries and fallbacks behind them, and of calls that wait for their turn here.

    Args:
        clock: Seconds that only go forward, asked in any thread.

    Attributes:
        refused: The first one that the budget refused.
        unmetered: The first LM that was asked and whose calls are not metered; empty where there was none.
        lost: The newest one that the provider is to blame for: busy, unreachable, no such key. A program that asks the same
            again and is answered has lost nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.refused: BudgetExceededError | None = None
        self.unmetered = ""
        self._lost: dict[str, Exception] = {}
        self._asked: dict[str, Mapping[str, Any]] = {}
        self._clock = clock
        self._lock = threading.Lock()
        self._held = self._sent = self._answered = 0
        self._held_s = self._counted_to = 0.0

    @property
    def lost(self) -> Exception | None:
        with self._lock:
            return next(reversed(self._lost.values()), None)

    def held_s(self) -> float:
        """Seconds so far in which all that there was to wait for stood in a queue of ours: nothing was on the wire."""
        self.count()
        return self._held_s

    def is_waiting(self, *, even_if_begun: bool = False) -> bool:
        """Whether a call of an LM is under way and none is on the wire: it stands in a queue of ours, or waits to ask again.

        Args:
            even_if_begun: Also where an earlier attempt brought an answer; else only where nothing came of it so far.
        """
        with self._lock:
            waits = bool(self._held or self._asked) and not (self._sent or self.unmetered)
            return waits and (even_if_begun or not self._answered)

    def count(self, *, held: int = 0, sent: int = 0, answered: int = 0) -> None:
        """So many more wait here, are on the wire, or brought an answer."""
        with self._lock:
            now = self._clock()
            if self._held and not self._sent:
                self._held_s += now - self._counted_to
            self._counted_to = now
            self._held += held
            self._sent += sent
            self._answered += answered

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._asked[call_id] = inputs
        if not getattr(getattr(instance, "engine", None), "is_metered", False):
            self.unmetered = self.unmetered or str(getattr(instance, "model", type(instance).__name__))

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        asked = self._asked.pop(call_id, {})
        if exception is None and self._lost:
            with self._lock:
                self._lost.pop(_content(asked), None)
        if not isinstance(exception, Exception):
            return
        refused = budget_error(exception)
        if refused is not None:
            self.refused = self.refused or refused
        elif kind_of(exception) in (FailureKind.TRANSIENT, FailureKind.ENDPOINT):
            with self._lock:
                self._lost[_content(asked)] = exception


def _content(inputs: Mapping[str, Any]) -> str:
    return repr([inputs.get(name) for name in ("prompt", "messages")])


_handed_on: ContextVar[CallWatch | None] = ContextVar("_handed_on", default=None)


@contextmanager
def watching_calls(
    clock: Callable[[], float] = time.monotonic, *, hand_on: bool = False
) -> Iterator[CallWatch]:
    """Watch the LM calls inside the block, and in threads and tasks that DSPy starts from it.

    Args:
        clock: See ``CallWatch``.
        hand_on: The next block within takes this watch for its own: each more costs DSPy's callbacks at every call.
    """
    taken = _handed_on.get()
    if taken is not None:
        token = _handed_on.set(None)
        try:
            yield taken
        finally:
            _handed_on.reset(token)
        return
    watch = CallWatch(clock)
    token = _handed_on.set(watch if hand_on else None)
    try:
        with dspy.context(callbacks=[*dspy.settings.callbacks, watch]):
            yield watch
    finally:
        _handed_on.reset(token)


@contextmanager
def unwatched() -> Iterator[None]:
    """For a compile inside a rollout: what its own budget refuses, and what waits for it, is no business of the rollout."""
    with dspy.context(callbacks=_others()):
        yield


def _others() -> list[Any]:
    return [one for one in dspy.settings.callbacks if not isinstance(one, CallWatch)]


@contextmanager
def held_back() -> Iterator[None]:
    """Tell those who watch that what is inside the block waits for its turn: for a limit, the budget, or a thread."""
    with _counted(held=1):
        yield


@contextmanager
def on_the_wire() -> Iterator[None]:
    """Tell those who watch that inside the block an attempt is with its provider, and at its end whether it was answered.

    An LM that is asked in there (of an engine that is a LangChain model around a ``dspy.LM``, say) is this attempt once more:
    it is neither watched nor are its tokens added to those of the LM outside.
    """
    with _counted(sent=1), dspy.context(callbacks=_others(), usage_tracker=None):
        yield
    for watch in _watches():
        watch.count(answered=1)


@contextmanager
def _counted(**more: int) -> Iterator[None]:
    watches = _watches()
    for watch in watches:
        watch.count(**more)
    try:
        yield
    finally:
        for watch in watches:
            watch.count(**{name: -number for name, number in more.items()})


def _watches() -> list[CallWatch]:
    return [one for one in dspy.settings.callbacks if isinstance(one, CallWatch)]


def budget_error(error: BaseException) -> BudgetExceededError | None:
    """The refused call behind ``error``, however often it was wrapped, or in a group; ``None`` if there is none."""
    return next((one for one in causes(error) if isinstance(one, BudgetExceededError)), None)
