"""What the LM's own certainty may decide in a race, and what it may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.messages import RaceReply, RaceRequest
from asyndbt_dspy.core.racing import RaceState

STUDENT, OTHER = (0, 0), (2, 0)
HOLDINGS = {"a": 12, "b": 8, "c": 4}


def winner(
    score: Callable[[tuple[int, ...], str, int], float],
    soft: Callable[[tuple[int, ...], str, int], float | None],
    *,
    race_soft: float,
    accept_z: float,
    accept_score_z: float = 0.0,
) -> tuple[int, ...]:
    config = AlgorithmConfig(
        race_candidates=7, race_soft=race_soft, accept_z=accept_z, accept_score_z=accept_score_z
    )
    state = RaceState(STUDENT, [OTHER], HOLDINGS, 400, config)
    while not state.done:
        request = state.assign("a") or state.assign("b") or state.assign("c")
        assert request is not None
        state.receive(_reply(request, score, soft))
    return state.winner()


def _reply(
    request: RaceRequest,
    score: Callable[[tuple[int, ...], str, int], float],
    soft: Callable[[tuple[int, ...], str, int], float | None],
) -> RaceReply:
    rows, soft_rows = (
        tuple(
            tuple(value(one, request.worker, example) for example in request.examples)
            for one in request.candidates
        )
        for value in (score, soft)
    )
    return RaceReply(request.worker, request.unit, rows, soft_rows, sum(map(len, rows)))


def surer(candidate: tuple[int, ...], worker: str, example: int) -> float:
    del worker, example
    return 0.9 if candidate == OTHER else 0.6


def test_soft_scores_break_what_scores_cannot() -> None:
    def always_right(*_: object) -> float:
        return 1.0

    assert winner(always_right, surer, race_soft=0.5, accept_z=0.0) == OTHER
    assert winner(always_right, surer, race_soft=0.0, accept_z=0.0) == STUDENT


def test_who_is_only_surer_and_scores_lower_does_not_replace_the_student() -> None:
    def play(wrong: int) -> tuple[int, ...]:
        def score(candidate: tuple[int, ...], worker: str, example: int) -> float:
            return float(candidate == STUDENT or worker != "a" or example >= wrong)

        return winner(score, surer, race_soft=0.6, accept_z=1.0)

    assert play(wrong=0) == OTHER
    assert play(wrong=1) == STUDENT


@pytest.mark.parametrize(
    ("better", "accept_z", "accept_score_z", "expected"),
    [
        (0, 2.0, 0.0, OTHER),
        (0, 2.0, 0.5, STUDENT),  # level by the metric
        (1, 2.0, 0.5, OTHER),  # one of 24: .042 ahead, an error of .048 with the pseudo-observation
        (1, 2.0, 1.0, STUDENT),
        (2, 2.0, 1.0, OTHER),  # .083 and .061
        (2, 2.0, 1.5, STUDENT),
        (0, 0.0, 0.5, OTHER),  # who takes any advantage asks for no more of the metric
    ],
)
def test_the_metric_alone_has_to_show_a_part_of_the_advantage(
    better: int, accept_z: float, accept_score_z: float, expected: tuple[int, ...]
) -> None:
    def score(candidate: tuple[int, ...], worker: str, example: int) -> float:
        return float(candidate == OTHER or worker != "a" or example >= better)

    found = winner(score, surer, race_soft=0.6, accept_z=accept_z, accept_score_z=accept_score_z)
    assert found == expected


@pytest.mark.parametrize(
    ("better", "expected"), [(0, STUDENT), (1, OTHER)]
)  # level, and .87 of an error ahead
def test_by_default_surer_and_no_better_is_not_enough(better: int, expected: tuple[int, ...]) -> None:
    def score(candidate: tuple[int, ...], worker: str, example: int) -> float:
        return float(candidate == OTHER or worker != "a" or example >= better)

    default = AlgorithmConfig()
    constants = {name: getattr(default, name) for name in ("race_soft", "accept_z", "accept_score_z")}
    assert winner(score, surer, **constants) == expected


def test_where_no_certainty_is_reported_the_bar_of_the_metric_says_nothing() -> None:
    """The race value is the metric then, and two standard errors are more than half of one."""

    def score(candidate: tuple[int, ...], worker: str, example: int) -> float:
        return float(candidate == OTHER or worker != "a" or example >= 8)

    def unknown(*_: object) -> None:
        return None

    for accept_score_z in (0.0, 0.5, 2.0):
        assert winner(score, unknown, race_soft=0.6, accept_z=2.0, accept_score_z=accept_score_z) == OTHER


def test_certainty_that_is_known_of_one_answer_alone_is_compared_with_nothing() -> None:
    """The metric refuses two thirds of the right labels, for their length say: no certainty is reported of these."""

    def score(candidate: tuple[int, ...], worker: str, example: int) -> float:
        del worker
        return float(candidate == OTHER and example % 3 == 0)

    def soft(candidate: tuple[int, ...], worker: str, example: int) -> float | None:
        if candidate == STUDENT:
            return 0.5  # a near miss
        return 0.9 if score(candidate, worker, example) else None

    constants = {"accept_z": 2.0, "accept_score_z": 0.5}
    assert winner(score, soft, race_soft=0.0, **constants) == OTHER
    assert winner(score, soft, race_soft=0.6, **constants) == OTHER
