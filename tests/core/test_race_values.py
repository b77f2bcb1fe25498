"""What the LM's own certainty may decide in a race, and what it may not."""

from __future__ import annotations

from collections.abc import Callable

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.messages import RaceReply, RaceRequest
from asyndbt_dspy.core.racing import RaceState

STUDENT, OTHER = (0, 0), (2, 0)
HOLDINGS = {"a": 12, "b": 8, "c": 4}


def winner(
    score: Callable[[tuple[int, ...], str, int], float],
    soft: Callable[[tuple[int, ...]], float],
    *,
    race_soft: float,
    accept_z: float,
) -> tuple[int, ...]:
    config = AlgorithmConfig(race_candidates=7, race_soft=race_soft, accept_z=accept_z)
    state = RaceState(STUDENT, [OTHER], HOLDINGS, 400, config)
    while not state.done:
        request = state.assign("a") or state.assign("b") or state.assign("c")
        assert request is not None
        state.receive(_reply(request, score, soft))
    return state.winner()


def _reply(
    request: RaceRequest,
    score: Callable[[tuple[int, ...], str, int], float],
    soft: Callable[[tuple[int, ...]], float],
) -> RaceReply:
    rows = tuple(
        tuple(score(one, request.worker, example) for example in request.examples)
        for one in request.candidates
    )
    soft_rows = tuple((soft(one),) * len(request.examples) for one in request.candidates)
    return RaceReply(request.worker, request.unit, rows, soft_rows, sum(map(len, rows)))


def surer(candidate: tuple[int, ...]) -> float:
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
