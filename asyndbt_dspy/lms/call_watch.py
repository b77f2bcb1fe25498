"""What becomes of the LM calls of one piece of work, whatever its program makes of their errors.

A program may catch an error, bury it in an exception group, or leave it in a thread (``dspy.Parallel`` and ``dspy.BestOfN``
log it and go on). A watch hears of it at the LM. It is a callback in DSPy's settings, which go wherever a program calls its LM.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback

from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.lms.failures import FailureKind, causes, kind_of


class CallWatch(BaseCallback):
    """Hears of LM calls that failed for good, retries and fallbacks behind them, in whatever thread.

    Attributes:
        refused: The first one that the budget refused.
        lost: The newest one that the provider is to blame for: busy, unreachable, no such key.
    """

    def __init__(self) -> None:
        self.refused: BudgetExceededError | None = None
        self.lost: Exception | None = None

    def on_lm_end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        if not isinstance(exception, Exception):
            return
        refused = budget_error(exception)
        if refused is not None:
            self.refused = self.refused or refused
        elif kind_of(exception) in (FailureKind.TRANSIENT, FailureKind.ENDPOINT):
            self.lost = exception


@contextmanager
def watching_calls() -> Iterator[CallWatch]:
    """Watch the LM calls inside the block, and in threads and tasks that DSPy starts from it."""
    watch = CallWatch()
    with dspy.context(callbacks=[*dspy.settings.callbacks, watch]):
        yield watch


def budget_error(error: BaseException) -> BudgetExceededError | None:
    """The refused call behind ``error``, however often it was wrapped, or in a group; ``None`` if there is none."""
    return next((one for one in causes(error) if isinstance(one, BudgetExceededError)), None)
