"""How far ahead a challenger must be, by how many examples tell of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from test_racing import STUDENT, run

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.messages import RaceReply
from asyndbt_dspy.core.racing import RaceState, bar

DEFAULT = AlgorithmConfig().accept_z


@pytest.mark.parametrize(
    ("z", "pairs", "t"), [(1.645, 5, 2.132), (1.645, 20, 1.729), (1.960, 10, 2.262), (1.960, 1001, 1.962)]
)
def test_the_bar_is_the_quantile_of_students_t(z: float, pairs: int, t: float) -> None:
    assert bar(z, pairs) == pytest.approx(t, rel=0.01)  # textbook values, two terms of the expansion


def test_two_examples_are_no_evidence() -> None:
    assert bar(DEFAULT, 1) == math.inf
    for examples, wins in ((2, 0), (6, 1)):
        state = RaceState(STUDENT, [(1, 0)], {"a": examples}, 2 * examples, AlgorithmConfig())
        run(state, lambda candidate, *_: float(candidate == (1, 0)))
        assert state.winner() == (wins, 0), "right on all of them, where the student is on none"


@pytest.mark.parametrize(("accept_z", "again"), [(1.0, False), (AlgorithmConfig().accept_z, True)])
def test_a_noisy_race_asks_again_while_what_is_ahead_would_not_win(accept_z: float, again: bool) -> None:
    """Ahead on three of six examples: 2.1 standard errors. By Student's t it takes 2.6 (or 1.1)."""
    config = AlgorithmConfig(repeats=True, accept_z=accept_z)
    state = RaceState(STUDENT, [(1, 0)], {"a": 6}, 100, config)
    units = run(state, lambda candidate, _, example: float(candidate == (1, 0) and example < 3), ("a",))
    times = max(sum(example in unit.examples for unit in units) for example in range(6))
    assert (times > 1) == again
    assert state.winner() == ((0, 0) if again else (1, 0))


@pytest.mark.parametrize(("challengers", "most"), [(1, 0.03), (7, 0.1)])
def test_challengers_that_are_as_good_as_the_student_seldom_replace_it(challengers: int, most: float) -> None:
    """2 % each by the bar; seven have seven chances. 400 races of equal programs on 24 examples, half of them right."""
    rng = np.random.default_rng(0)
    replaced = 0
    for _ in range(400):
        state = RaceState((0,), [(one + 1,) for one in range(challengers)], {"a": 24}, 120, AlgorithmConfig())
        scores = rng.integers(0, 2, (challengers + 1, 24)).astype(float)
        while not state.done and (unit := state.assign("a")) is not None:
            rows = tuple(
                tuple(scores[one[0], example] for example in unit.examples) for one in unit.candidates
            )
            unknown = tuple((None,) * len(row) for row in rows)
            state.receive(RaceReply("a", unit.unit, rows, unknown, sum(map(len, rows))))
        replaced += state.winner() != (0,)
    assert 0 < replaced / 400 <= most
