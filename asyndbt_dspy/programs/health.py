"""Whether it is worth going on: whether a worker's LM still answers, and whether program and metric ever ran to their end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import dspy

from asyndbt_dspy.errors import ProgramFailedError, WorkerFailedError
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs.rollout import Rollout

_ENDPOINT_FAILURES = 3
"""An endpoint that refuses the key or does not know the model will not learn: three in a row are enough."""
_LITTLE_SAID = 5
"""Refused examples (too long, filtered), and failures on one example alone, say little of the LM: it takes so many times as many in
a row to set a worker aside. Without a bound a shard of nothing else would be asked for ever."""


@dataclass
class Health:
    """Failures in a row of one worker's LM.

    Attributes:
        in_row: Rollouts without a score, but for refused examples.
        endpoint_in_row: Those of them for which the endpoint itself is to blame.
        refused_in_row: Refused examples.
        failed_on: Which examples ``in_row`` is about.
    """

    in_row: int = 0
    endpoint_in_row: int = 0
    refused_in_row: int = 0
    failed_on: set[int] = field(default_factory=set)

    def note(self, example: dspy.Example, failure: FailureKind | None) -> None:
        """A rollout of ``example``, which the worker holds on to, has no score."""
        if failure is FailureKind.EXAMPLE:
            self.refused_in_row += 1
            return
        self.in_row += 1
        self.endpoint_in_row += failure is FailureKind.ENDPOINT
        self.failed_on.add(id(example))

    def check(self, most: int, last_error: str) -> None:
        """Raises ``WorkerFailedError`` at ``most`` failures in a row of more than one example, and in the cases above."""
        bound = most if len(self.failed_on) > 1 else _LITTLE_SAID * most
        if self.in_row >= bound or self.endpoint_in_row >= _ENDPOINT_FAILURES:
            raise WorkerFailedError(
                f"its LM failed {self.in_row} times in a row; the last error: {last_error}"
            )
        if self.refused_in_row >= _LITTLE_SAID * most:
            raise WorkerFailedError(
                f"its LM refused {self.refused_in_row} examples in a row; the last error: {last_error}"
            )


_TOLD = 3
"""Different errors that the message names."""
_TOLD_CHARACTERS = 300


@dataclass
class OnlyErrors:
    """Rollouts that program or metric ended by an exception, until one runs to its end.

    A mistake in either shows on every example, and no demo mends it: what is asked for after that is paid for nothing. Answers
    that the adapter cannot read, and calls that get none, are not counted: those are the LM's, and other demos or a second try may
    mend them.

    Attributes:
        most: So many and no other end the run; ``None``: none do.
    """

    most: int | None = None
    errors: Counter[str] = field(default_factory=Counter)
    is_over: bool = False

    def note(self, rollout: Rollout, error: str) -> None:
        """``error``: what may be told of it."""
        if rollout.failure is FailureKind.PROGRAM:
            if not rollout.is_unread:
                self.errors[error[:_TOLD_CHARACTERS]] += 1
        elif rollout.score is not None:
            self.is_over = True

    def check(self) -> None:
        """Raises ``ProgramFailedError`` at ``most`` errors before any rollout without one."""
        count = sum(self.errors.values())
        if self.is_over or self.most is None or count < self.most:
            return
        told = "; ".join(f"{number} times {error}" for error, number in self.errors.most_common(_TOLD))
        raise ProgramFailedError(
            f"the program or the metric raised in {count} rollouts and none has run to its end, so no program can be told from "
            f"another: {told}. Mend what raises; where other instructions or demos may, set max_errors higher, or to None"
        )
