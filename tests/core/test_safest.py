"""What a run returns that is ended before any race."""

from __future__ import annotations

from asyndbt_dspy.core.decoding import safest
from asyndbt_dspy.core.policies import Nomination

STUDENT, BETTER, BEST = (0, 0), (1, 0), (1, 1)


def rated(candidate: tuple[int, ...], value: float, deviation: float) -> Nomination:
    return Nomination(candidate, value, deviation, 4)


def test_the_student_stays_unless_the_models_are_sure() -> None:
    assert safest(STUDENT, []) == STUDENT
    assert safest(STUDENT, [(rated(BETTER, -0.3, 0.2),)]) == STUDENT, "not by two standard deviations"
    assert safest(STUDENT, [(rated(BETTER, -0.5, 0.2),)]) == BETTER
    assert safest(STUDENT, [(rated(BETTER, 0.5, 0.01),)]) == STUDENT


def test_what_several_workers_say_is_pooled_by_precision() -> None:
    unsure = rated(BETTER, -0.3, 0.2)
    assert safest(STUDENT, [(unsure,)] * 4) == BETTER, "four such voices have half the deviation"
    against = rated(BETTER, 0.3, 0.05)
    assert safest(STUDENT, [(unsure,), (unsure,), (against,)]) == STUDENT


def test_the_surest_gain_wins_and_not_the_largest() -> None:
    bold, sure = rated(BEST, -0.9, 0.4), rated(BETTER, -0.5, 0.1)
    assert safest(STUDENT, [(bold, sure)]) == BETTER
    assert safest(STUDENT, [(rated(BEST, -1.0, 0.0),)]) == STUDENT, "a deviation of zero is no knowledge"
