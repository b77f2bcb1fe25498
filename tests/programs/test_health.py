"""When failures in a row say that a worker's LM is gone."""

from __future__ import annotations

import dspy
import pytest

from asyndbt_dspy.errors import WorkerFailedError
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs.health import Health

EXAMPLES = [dspy.Example(text=str(number)) for number in range(10)]


def failing_after(kind: FailureKind, *, examples: int, most: int = 4) -> int:
    """After how many failures in a row, on so many examples in turn, the worker is set aside."""
    health = Health()
    for count in range(1, 1000):
        health.note(EXAMPLES[count % examples], kind)
        try:
            health.check(most, "gone")
        except WorkerFailedError:
            return count
    raise AssertionError("never")


@pytest.mark.parametrize(
    ("kind", "examples", "count"),
    [
        (FailureKind.TRANSIENT, 10, 4),
        (FailureKind.TRANSIENT, 2, 4),
        (FailureKind.TRANSIENT, 1, 20),  # it may be the example that hangs
        (FailureKind.ENDPOINT, 1, 3),
        (FailureKind.EXAMPLE, 10, 20),
    ],
)
def test_how_many_it_takes(kind: FailureKind, examples: int, count: int) -> None:
    assert failing_after(kind, examples=examples) == count


def test_refused_examples_between_them_change_nothing() -> None:
    health = Health()
    for number in range(3):
        health.note(EXAMPLES[number], FailureKind.TRANSIENT)
        health.note(EXAMPLES[number], FailureKind.EXAMPLE)
    health.check(4, "gone")
    health.note(EXAMPLES[0], FailureKind.TRANSIENT)
    with pytest.raises(WorkerFailedError, match="its LM failed 4 times in a row; the last error: gone"):
        health.check(4, "gone")
