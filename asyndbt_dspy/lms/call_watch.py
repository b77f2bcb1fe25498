"""What becomes of the LM calls of one piece of work, whatever its program makes of their errors.

A program may catch an error, bury it in an exception group, or leave it in a thread (``dspy.Parallel`` and ``dspy.BestOfN``
log it and go on). A watch hears of it at the LM. It is a callback in DSPy's settings, which go wherever a program calls its LM.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        lost: The newest one that the provider is to blame for: busy, unreachable, no such key.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.refused: BudgetExceededError | None = None
        self.lost: Exception | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._held = self._sent = 0
        self._held_s = self._counted_to = 0.0

    def held_s(self) -> float:
        """Seconds so far in which all that there was to wait for stood in a queue of ours: nothing was on the wire."""
        self.count()
        return self._held_s

    def count(self, *, held: int = 0, sent: int = 0) -> None:
        """So many more wait here, or are on the wire."""
        with self._lock:
            now = self._clock()
            if self._held and not self._sent:
                self._held_s += now - self._counted_to
            self._counted_to = now
            self._held += held
            self._sent += sent

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        if not isinstance(exception, Exception):
            return
        refused = budget_error(exception)
        if refused is not None:
            self.refused = self.refused or refused
        elif kind_of(exception) in (FailureKind.TRANSIENT, FailureKind.ENDPOINT):
            self.lost = exception


@contextmanager
def watching_calls(clock: Callable[[], float] = time.monotonic) -> Iterator[CallWatch]:
    """Watch the LM calls inside the block, and in threads and tasks that DSPy starts from it."""
    watch = CallWatch(clock)
    with dspy.context(callbacks=[*dspy.settings.callbacks, watch]):
        yield watch


@contextmanager
def held_back() -> Iterator[None]:
    """Tell those who watch that what is inside the block waits for its turn: for a limit, the budget, or a thread."""
    with _counted(held=1):
        yield


@contextmanager
def on_the_wire() -> Iterator[None]:
    """Tell those who watch that inside the block an attempt is with its provider."""
    with _counted(sent=1):
        yield


@contextmanager
def _counted(**more: int) -> Iterator[None]:
    watches = [one for one in dspy.settings.callbacks if isinstance(one, CallWatch)]
    for watch in watches:
        watch.count(**more)
    try:
        yield
    finally:
        for watch in watches:
            watch.count(**{name: -number for name, number in more.items()})


def budget_error(error: BaseException) -> BudgetExceededError | None:
    """The refused call behind ``error``, however often it was wrapped, or in a group; ``None`` if there is none."""
    return next((one for one in causes(error) if isinstance(one, BudgetExceededError)), None)
