"""When failures in a row say that a worker's LM is gone, and errors from the first rollout on that program or metric is wrong."""

from __future__ import annotations

import dspy
import pytest

from asyndbt_dspy.errors import ProgramFailedError, WorkerFailedError
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs.health import Health, OnlyErrors
from asyndbt_dspy.programs.rollout import Rollout

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


BUG = Rollout(0.0, failure=FailureKind.PROGRAM, error="KeyError: 'lable'")
UNREAD = Rollout(0.0, failure=FailureKind.PROGRAM, is_unread=True, error="ValueError: could not sort")
LATE = Rollout(None, failure=FailureKind.TRANSIENT, error="TimeoutError")
WRONG = Rollout(0.0)


def noted(most: int | None, *rollouts: Rollout) -> OnlyErrors:
    errors = OnlyErrors(most)
    for one in rollouts:
        errors.note(one, one.error or "")
    return errors


def test_nothing_but_errors_ends_a_run() -> None:
    noted(3, BUG, BUG).check()
    with pytest.raises(
        ProgramFailedError, match=r"raised in 3 rollouts.*3 times KeyError: 'lable'.*max_errors"
    ):
        noted(3, BUG, BUG, BUG).check()


@pytest.mark.parametrize("other", [UNREAD, LATE])
def test_what_is_the_lms_neither_counts_nor_says_that_all_is_well(other: Rollout) -> None:
    noted(3, BUG, BUG, *[other] * 9).check()
    with pytest.raises(ProgramFailedError):
        noted(3, BUG, other, BUG, other, BUG).check()


def test_one_rollout_that_runs_to_its_end_is_enough_however_wrong_its_answer() -> None:
    errors = noted(3, BUG, WRONG, *[BUG] * 9)
    errors.check()
    assert errors.is_over


def test_without_a_bound_nothing_ends_it() -> None:
    errors = noted(None, *[BUG] * 99)
    errors.check()
    assert sum(errors.errors.values()) == 99
