"""Whether a worker's LM still answers: failures in a row, told apart by what they say of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import dspy

from asyndbt_dspy.errors import WorkerFailedError
from asyndbt_dspy.lms.failures import FailureKind

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
