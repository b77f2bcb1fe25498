"""What workers draw and what they learn from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT, PAPER
from asyndbt_dspy.core.policies import (
    Batch,
    ExampleOrder,
    GradientPolicy,
    Policy,
    WorkerSpace,
)
from asyndbt_dspy.core.posterior import PosteriorPolicy, make_policy
from asyndbt_dspy.core.space import Arm, Block, Space
from asyndbt_dspy.testing.toys import additive_score, small_space, usable_arms

SPACE = small_space(2)
SPACES = WorkerSpace(SPACE, tuple(usable_arms(block, "w0") for block in SPACE.upper))
GRADIENTS = dataclasses.replace(DEFAULT, policy="score_function", normalise=False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def learn(policy: Policy, steps: int, missing: bool = False) -> tuple[np.ndarray, np.ndarray, list[Batch]]:
    """Steps of mirror descent on the additive toy; returns p, q and what was drawn."""
    p, q = SPACES.lower.uniform(), SPACES.upper.uniform()
    batches = []
    for step in range(steps):
        batch = policy.draw(p, q, rng(step), DEFAULT.minibatch)
        batches.append(batch)
        losses = [
            np.array(
                [
                    np.nan if missing else 1.0 - additive_score("w0", candidate, example, False)
                    for example in examples
                ]
            )
            for candidate, examples in zip(batch.candidates, batch.examples, strict=True)
        ]
        estimate = policy.update(p, q, batch, losses)
        for layout, vector, gradient in (
            (SPACES.lower, p, estimate.lower),
            (SPACES.upper, q, estimate.upper),
        ):
            for part in layout.slices:
                moved = vector[part] * np.exp(-0.3 * np.clip(gradient[part], -3, 3)) + 1e-3
                vector[part] = moved / moved.sum()
    return p, q, batches


@pytest.mark.parametrize(
    "config",
    [
        DEFAULT,
        dataclasses.replace(DEFAULT, split_levels=True),
        GRADIENTS,
        dataclasses.replace(GRADIENTS, draws=6),
    ],
    ids=["posterior", "split", "gradients", "six_draws"],
)
def test_the_better_instruction_is_learned(config: Any) -> None:
    p, _, _ = learn(make_policy(SPACES, config, 24), 120)
    assert int(np.argmax(p)) == 2


@pytest.mark.parametrize("kind", ["posterior", "score_function"])
def test_missing_rollouts_teach_nothing_and_break_nothing(kind: Any) -> None:
    policy = make_policy(SPACES, dataclasses.replace(DEFAULT, policy=kind), 10)
    p, q, _ = learn(policy, 4, missing=True)
    assert np.all(np.isfinite(p))
    assert np.all(np.isfinite(q))
    assert np.ptp(p) < 0.02
    assert not policy.share().any()
    assert all(one.count == 0 for one in policy.nominate(p, q))


def test_draws_of_a_gradient_step_meet_one_minibatch_and_a_candidate_of_a_posterior_goes_on_where_it_stopped() -> (
    None
):
    gradients = GradientPolicy(SPACES, GRADIENTS, 12).draw(
        SPACES.lower.uniform(), SPACES.upper.uniform(), rng(), 6
    )
    assert len(set(gradients.examples)) == 1
    order = ExampleOrder(7, DEFAULT)
    first, second, other = (
        order.next_for((0,), rng(), 3),
        order.next_for((0,), rng(), 3),
        order.next_for((1,), rng(), 3),
    )
    assert first + second == tuple(order.order[:6])
    assert other == first  # paired
    assert order.next_for((0,), rng(), 3)[0] == order.order[6]


def test_random_minibatches_hold_no_example_twice() -> None:
    order = ExampleOrder(5, dataclasses.replace(DEFAULT, common_examples=False))
    drawn = order.next_for(None, rng(4), 9)
    assert sorted(drawn) == [0, 1, 2, 3, 4]
    assert drawn != order.next_for(None, rng(5), 9)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_split_levels_never_share_an_example_where_there_are_two(count: int, common: bool, size: int) -> None:
    config = dataclasses.replace(DEFAULT, split_levels=True, common_examples=common)
    order = ExampleOrder(count, config)
    assert count == 1 or not set(order.lower) & set(order.upper)
    for _ in range(3):
        drawn = set(order.next_for(None, rng(), size))
        assert drawn & set(order.lower)
        assert drawn & set(order.upper)


def test_a_demo_fills_no_two_slots_and_private_arms_of_others_are_never_drawn() -> None:
    space = small_space(2, private=[1])
    spaces = WorkerSpace(space, tuple(usable_arms(block, "w0") for block in space.upper))
    policy = PosteriorPolicy(spaces, DEFAULT, 10)
    for seed in range(40):
        for candidate in policy.draw(spaces.lower.uniform(), spaces.upper.uniform(), rng(seed), 6).candidates:
            demos = [arm for arm in candidate[1:] if arm]
            assert len(demos) == len(set(demos))
            assert space.is_shared(candidate)


def test_a_loss_counts_once_however_often_it_is_seen() -> None:
    policy = PosteriorPolicy(SPACES, DEFAULT, 4)
    batch = policy.draw(SPACES.lower.uniform(), SPACES.upper.uniform(), rng(), 6)
    losses = [np.ones(len(row)) for row in batch.examples]
    policy.update(SPACES.lower.uniform(), SPACES.upper.uniform(), batch, losses)
    count = policy.upper_model.count
    policy.update(SPACES.lower.uniform(), SPACES.upper.uniform(), batch, losses)
    assert policy.upper_model.count == count


def test_a_space_of_one_candidate_can_still_be_drawn() -> None:
    space = Space((Block("i", "p", "instructions", (Arm(""),)),))
    for config in (DEFAULT, PAPER):
        spaces = WorkerSpace(space, ())
        policy = make_policy(spaces, config, 3)
        for step in range(3):
            batch = policy.draw(spaces.lower.uniform(), spaces.upper.uniform(), rng(step), 6)
            assert set(batch.candidates) == {(0,)}
            losses = [np.full(len(row), 0.5) for row in batch.examples]
            estimate = policy.update(spaces.lower.uniform(), spaces.upper.uniform(), batch, losses)
            assert np.all(np.isfinite(estimate.lower))


def test_nominations_begin_with_the_decoded_candidate() -> None:
    for config in (DEFAULT, GRADIENTS):
        policy = make_policy(SPACES, config, 24)
        p, q, _ = learn(policy, 40)
        first, *others = policy.nominate(p, q)
        assert first.candidate[0] == int(np.argmax(p))
        assert 1 <= len(others) <= 3


def test_effects_travel_only_where_they_are_shared() -> None:
    policy = PosteriorPolicy(SPACES, dataclasses.replace(DEFAULT, share_effects=False), 10)
    learn(policy, 3)
    assert policy.share().shape == (2, 0)
    policy.merge(np.zeros((2, 0)))
    gradients = GradientPolicy(SPACES, GRADIENTS, 10)
    gradients.merge(np.zeros((2, 0)))
    assert gradients.share().shape == (2, 0)


def test_estimates_can_be_scaled_to_one_and_clipped() -> None:
    for changes, bound in (({"normalise": True}, 1.0), ({"gradient_clip": 0.3}, 0.3)):
        policy = GradientPolicy(SPACES, dataclasses.replace(GRADIENTS, **changes), 10)  # type: ignore[arg-type]
        p, q = SPACES.lower.uniform(), SPACES.upper.uniform()
        batch = policy.draw(p, q, rng(), 6)
        losses = [np.full(len(row), float(number)) for number, row in enumerate(batch.examples)]
        estimate = policy.update(p, q, batch, losses)
        size = np.abs(estimate.lower).max() if "normalise" in changes else np.linalg.norm(estimate.lower)
        assert size == pytest.approx(bound)
        flat = policy.update(p, q, batch, [np.zeros(len(row)) for row in batch.examples])
        assert np.all(np.isfinite(flat.lower))


def test_a_repeated_rollout_is_evidence_only_where_scores_are_noisy() -> None:
    counts = {}
    for repeats in (False, True):
        policy = make_policy(SPACES, dataclasses.replace(DEFAULT, repeats=repeats), 2)
        assert isinstance(policy, PosteriorPolicy)
        p, q = SPACES.lower.uniform(), SPACES.upper.uniform()
        batch = policy.draw(p, q, rng(), 6)
        losses = [np.full(len(row), 0.5) for row in batch.examples]
        for _ in range(3):
            policy.update(p, q, batch, losses)
        counts[repeats] = policy.upper_model.count
    assert counts[True] == 3 * counts[False] > 0
