"""The search finds the demos and the order that a model with known effects likes best."""

from __future__ import annotations

import numpy as np

from asyndbt_dspy.core.candidate_search import CandidateSearch
from asyndbt_dspy.core.effects import EffectKeys, EffectModel
from asyndbt_dspy.core.space import Arm, Block, Candidate, Space


def ordered_space() -> Space:
    """Two classes with one slot and three demos each, and which of them is shown last."""
    yes = (Arm(""), Arm("y:0"), Arm("y:1"), Arm("y:2"))
    no = (Arm(""), Arm("n:0"), Arm("n:1"), Arm("n:2"))
    orders = (Arm("", order=(0, 1)), Arm("no first", order=(1, 0)))
    return Space(
        (
            Block("toy/instructions", "toy", "instructions", (Arm(""), Arm("i:1"))),
            Block("toy/demos/yes", "toy", "demo", yes, stratum="yes"),
            Block("toy/demos/no", "toy", "demo", no, stratum="no"),
            Block("toy/order", "toy", "order", orders),
        )
    )


SPACE = ordered_space()
STUDENT: Candidate = (0, 0, 0, 0)


def loss(candidate: Candidate) -> float:
    """Demo ``y:1`` helps, and so does the class ``yes`` shown last, after a demo of the other."""
    return (
        0.8 - 0.2 * (candidate[1] == 2) - 0.3 * (candidate[3] == 1 and candidate[1] > 0 and candidate[2] > 0)
    )


def informed(runs: int, allowed: tuple[tuple[int, ...], ...] | None = None) -> CandidateSearch:
    rng = np.random.default_rng(1)
    allowed = allowed or tuple(tuple(range(len(block.arms))) for block in SPACE.upper)
    model = EffectModel(EffectKeys.of(SPACE, share_credit=True))
    for _ in range(runs):
        candidate = (0, *(int(rng.choice(arms)) for arms in allowed))
        for example in range(4):
            model.observe(candidate, example, loss(candidate) + 0.02 * float(rng.normal()))
    model.fit()
    return CandidateSearch(SPACE, allowed, model)


def test_the_best_candidate_has_the_demo_and_the_order_that_help() -> None:
    best = informed(40).best((0,), [STUDENT], np.random.default_rng(0))
    assert best[1] == 2 and best[2] > 0 and best[3] == 1
    assert loss(best) < loss(STUDENT) - 0.4


def test_only_arms_that_the_worker_may_draw_are_found() -> None:
    search = informed(10, allowed=((0, 1), (0, 3), (0, 1)))
    rng = np.random.default_rng(0)
    found = [search.thompson((1,), [STUDENT], rng, 1.0, ()) for _ in range(30)]
    assert {one[1] for one in found} <= {0, 1} and {one[2] for one in found} <= {0, 3}
    assert found[0] == (1, 1, 3, 1), "the order that helps wants both classes"


def test_draws_explore_and_do_not_repeat_what_is_excluded() -> None:
    search, rng, drawn = informed(8), np.random.default_rng(2), []
    for _ in range(12):
        drawn.append(search.thompson((0,), [STUDENT], rng, 1.0, drawn))
    assert len(set(drawn)) == len(drawn)
    assert len({one[1] for one in drawn}) > 2, "the prior of what was never met is drawn, not taken as zero"


def test_without_spread_a_draw_is_the_best() -> None:
    search = informed(40)
    assert search.thompson((0,), [STUDENT], np.random.default_rng(0), 0.0, ()) == search.best(
        (0,), [STUDENT], np.random.default_rng(0)
    )


def test_a_set_of_its_own_is_not_liked_for_being_new() -> None:
    """Ten thousand new candidates' own effects would have a very good one among them by chance."""
    search, rng = informed(60), np.random.default_rng(3)
    found = [search.thompson((0,), [STUDENT], rng, 1.0, ()) for _ in range(20)]
    assert np.mean([one[1] == 2 and one[3] == 1 for one in found]) > 0.8


def test_when_every_candidate_is_excluded_the_best_comes_again() -> None:
    search = informed(5, allowed=((0,), (0,), (0,)))
    assert search.thompson((0,), [STUDENT], np.random.default_rng(0), 1.0, [STUDENT]) == STUDENT


def test_both_ways_to_end_demos_are_drawn_alike() -> None:
    """No ending is a choice like the other, not an empty slot."""
    ending = Block("toy/ending", "toy", "ending", (Arm(""), Arm("e:toy")))
    space = Space((*SPACE.blocks, ending))
    allowed = tuple(tuple(range(len(block.arms))) for block in space.upper)
    search = CandidateSearch(space, allowed, EffectModel(EffectKeys.of(space, share_credit=True)))
    rng = np.random.default_rng(0)
    drawn = [search._redrawn((0,) * len(allowed), len(allowed) - 1, rng) for _ in range(400)]
    assert 160 < sum(drawn) < 240
