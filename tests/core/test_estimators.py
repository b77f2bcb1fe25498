"""Gradient estimates and importance weights (``algorithm.md`` 8.2, 8.3)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asyndbt_dspy.core import estimators
from asyndbt_dspy.core.config import DEFAULT
from asyndbt_dspy.core.messages import Evaluate, Outcome, Scored, Send, StepReply, StepRequest
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.testing.toys import small_machines


def expectation(layout: Layout, probabilities: np.ndarray, loss: np.ndarray, draws: int = 2) -> np.ndarray:
    """Mean of the shipped estimate over every set of draws, weighted by its probability."""
    arms = list(itertools.product(*(range(size) for size in layout.sizes)))
    odds = [float(np.prod(layout.block_values(probabilities, one))) for one in arms]
    mean = np.zeros(layout.length)
    for chosen in itertools.product(range(len(arms)), repeat=draws):
        table = np.array([[loss[arms[one]]] for one in chosen])
        centred, divisor = estimators.advantages(table)
        drawn = np.array([arms[one] for one in chosen])
        weight = float(np.prod([odds[one] for one in chosen]))
        mean += weight * estimators.score_function_estimate(layout, probabilities, drawn, centred, divisor)
    return mean


def test_one_block_over_all_nine_pairs() -> None:
    p = np.array([0.5, 0.3, 0.2])
    mean = expectation(Layout((3,)), p, np.array([1.0, 2.0, 4.0]))
    np.testing.assert_allclose(mean, [-0.9, 0.1, 2.1], atol=1e-12)


def test_two_blocks() -> None:
    layout = Layout((2, 2))
    mean = expectation(layout, np.array([0.5, 0.5, 0.25, 0.75]), np.array([[0.0, 1.0], [2.0, 5.0]]))
    np.testing.assert_allclose(mean, [-1.75, 1.75, -1.5, 0.5], atol=1e-12)


@given(st.integers(0, 999), st.floats(-1e3, 1e3))
def test_a_constant_loss_changes_nothing_and_the_estimate_is_half_of_bdpls(
    seed: int, constant: float
) -> None:
    rng = np.random.default_rng(seed)
    layout = Layout((4, 3))
    p = np.concatenate([rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(3))])
    arms = estimators.draw_arms(rng, layout, p, 6)
    losses = rng.normal(size=(6, 5))
    ours = estimators.score_function_estimate(layout, p, arms, *estimators.advantages(losses))
    shifted = estimators.score_function_estimate(layout, p, arms, *estimators.advantages(losses + constant))
    np.testing.assert_allclose(shifted, ours, atol=1e-9 * (1 + abs(constant)) * np.abs(1 / p[p > 0]).max())
    centred = losses.mean(axis=1) - losses.mean()
    bdpl = np.zeros(layout.length)
    for row, advantage in zip(arms, centred, strict=True):
        for part, arm in zip(layout.slices, row, strict=True):
            score = -1.0 / p[part]
            score[arm] = 1.0 / p[part][arm]
            bdpl[part] += advantage * score / 5.0
    np.testing.assert_allclose(bdpl, 2.0 * ours, rtol=1e-10, atol=1e-12 * np.abs(1 / p).max())


def test_an_arm_without_probability_leaves_the_estimate_finite() -> None:
    p = np.array([0.0, 0.4, 0.6])
    rng = np.random.default_rng(0)
    arms = estimators.draw_arms(rng, Layout((3,)), p, 6)
    estimate = estimators.score_function_estimate(
        Layout((3,)), p, arms, *estimators.advantages(rng.normal(size=(6, 2)))
    )
    assert np.all(np.isfinite(estimate))
    assert estimate[0] == 0.0


def enumerated_pairs(p_old: np.ndarray) -> list[tuple[float, np.ndarray, np.ndarray]]:
    return [
        (p_old[one] * p_old[two], np.array([[one], [two]]), np.array([[float(one)], [float(two)]]))
        for one, two in itertools.product(range(2), repeat=2)
    ]


def test_importance_weighted_estimate_in_logits() -> None:
    old, new, layout = np.array([0.5, 0.5]), np.array([0.9, 0.1]), Layout((2,))
    mean = np.zeros(2)
    for odds, arms, losses in enumerated_pairs(old):
        centred, divisor = estimators.advantages(losses)
        mean += odds * estimators.logit_estimate(layout, new, old, arms, centred, divisor, 10.0)
    np.testing.assert_allclose(mean, [-0.09, 0.09], atol=1e-12)


def test_dividing_by_the_old_probability_already_contains_the_weight() -> None:
    old, new, layout = np.array([0.5, 0.5]), np.array([0.9, 0.1]), Layout((2,))
    mean = np.zeros(2)
    for odds, arms, losses in enumerated_pairs(old):
        centred, divisor = estimators.advantages(losses)
        mean += odds * estimators.reweighted_estimate(layout, new, old, arms, centred, divisor, 10.0)
    # The gradient of sum_j p_j L_j is L up to a constant: (-.5, .5), whatever p is.
    np.testing.assert_allclose(mean, [-0.5, 0.5], atol=1e-12)
    np.testing.assert_allclose(new * (mean - new @ mean), [-0.09, 0.09], atol=1e-12)


def test_weights_are_joint_over_blocks_and_clipped() -> None:
    layout = Layout((2, 2))
    old, new = np.array([0.5, 0.5, 0.5, 0.5]), np.array([0.9, 0.1, 0.8, 0.2])
    arms = np.array([[0, 0], [1, 1]])
    np.testing.assert_allclose(
        estimators.importance_weights(layout, new, old, arms, 10.0), [1.8 * 1.6, 0.2 * 0.4]
    )
    assert estimators.importance_weights(layout, new, old, arms, 1.5).tolist() == pytest.approx([1.5, 0.08])
    np.testing.assert_allclose(
        estimators.importance_weights(layout, new, old, arms, 10.0, skip_block=0), [1.6, 0.4]
    )


@given(st.integers(0, 200))
def test_the_mixed_derivative_is_unbiased(seed: int) -> None:
    """``E cross`` = the mixed difference of the loss, up to constants of each block."""
    rng = np.random.default_rng(seed)
    lower, upper = Layout((2,)), Layout((2,))
    p, q, loss = rng.dirichlet(np.ones(2)), rng.dirichlet(np.ones(2)), rng.normal(size=(2, 2))
    assume(min(p.min(), q.min()) > 0.01)
    mean = np.zeros((2, 2))
    for pairs in itertools.product(itertools.product(range(2), range(2)), repeat=2):
        odds = float(np.prod([p[low] * q[up] for low, up in pairs]))
        centred, divisor = estimators.advantages(np.array([[loss[pair]] for pair in pairs]))
        low_arms, up_arms = (np.array([[pair[level]] for pair in pairs]) for level in range(2))
        mean += odds * estimators.cross_estimate(lower, upper, p, q, low_arms, up_arms, centred, divisor)
    mixed = mean[0, 0] - mean[0, 1] - mean[1, 0] + mean[1, 1]
    assert mixed == pytest.approx(loss[0, 0] - loss[0, 1] - loss[1, 0] + loss[1, 1], abs=1e-9)


def test_missing_rollouts_are_left_out_of_the_estimate() -> None:
    complete = np.array([[1.0, 5.0], [0.0, 2.0], [0.5, 2.0]])
    holed = np.array([[1.0, np.nan], [0.0, 2.0], [0.5, np.nan]])  # the second example has one answer only
    centred, divisor = estimators.advantages(holed)
    expected, _ = estimators.advantages(complete[:, :1])
    np.testing.assert_allclose(centred, expected)
    assert divisor == 2.0
    nothing, _ = estimators.advantages(np.full((2, 2), np.nan))
    assert nothing.tolist() == [0.0, 0.0]


def test_a_known_baseline_needs_no_second_draw() -> None:
    centred, divisor = estimators.advantages(np.array([[1.0, 0.0]]), np.array([0.25, 0.25]))
    assert (centred.tolist(), divisor) == ([0.25], 1.0)
    unknown = estimators.advantages(np.array([[1.0], [0.0]]), np.array([np.nan]))
    np.testing.assert_allclose(unknown[0], [0.5, -0.5])


@pytest.mark.parametrize(
    ("score", "cross_entropy", "loss"), [(0.75, None, 0.25), (1.0, 0.3, 0.3), (0.0, 99.0, 10.0)]
)
def test_loss_of_a_score(score: float, cross_entropy: float | None, loss: float) -> None:
    assert estimators.loss_of(score, estimators.cross_entropy_loss(cross_entropy)) == pytest.approx(loss)


def test_a_missing_score_is_no_loss() -> None:
    assert np.isnan(estimators.loss_of(None, 0.3))


@pytest.mark.parametrize(
    ("margin", "score", "loss"),
    [(0.5, 1.0, 0.0), (9.0, 1.0, 0.0), (-3.0, 0.0, 1.0), (-9.0, 0.0, 1.0), (-1.25, 0.0, 0.7)],
)
def test_the_loss_of_a_margin_is_its_clipped_share_and_the_metrics(
    margin: float, score: float, loss: float
) -> None:
    assert estimators.margin_loss(margin, score) == pytest.approx(loss)


def test_a_hopeless_example_weighs_no_more_than_a_wrong_one() -> None:
    """Where cross-entropies are 10 and 3, margins beyond the range cost the same."""
    assert estimators.margin_loss(-10.0, 0.0) == estimators.margin_loss(-3.0, 0.0) == 1.0


def test_clipping_and_centring() -> None:
    np.testing.assert_allclose(estimators.clip_norm(np.array([3.0, 4.0]), 1.0), [0.6, 0.8])
    assert estimators.clip_norm(np.array([3.0, 4.0]), 5.0).tolist() == [3.0, 4.0]
    centred = estimators.centre_blocks(Layout((2,)), np.array([1.0, 3.0]), np.array([0.25, 0.75]))
    assert centred.tolist() == [-1.5, 0.5]


def test_answers_without_a_distribution_are_on_the_scale_of_those_with_one() -> None:
    losses = estimators.Undescribed()
    assert losses.loss(0.0, None) == 1.0, "of nothing is known yet"
    near, far = estimators.margin_loss(-0.1, 0.0), estimators.margin_loss(-3.0, 0.0)
    sure = estimators.margin_loss(2.0, 1.0)
    for score, soft in ((0.0, near), (0.0, far), (1.0, sure), (0.0, None), (None, None)):
        losses.note(score, soft)
    assert losses.loss(0.0, None) == pytest.approx((near + far) / 2), "like the other wrong answers"
    assert losses.loss(1.0, None) == pytest.approx(sure)
    assert losses.loss(0.0, near) == near
    assert np.isnan(losses.loss(None, None))


def step(first: Outcome, others: Outcome, **changes: Any) -> StepReply:
    """A worker's answer to its first request, where the first outcome of each draw differs from the others."""
    config = dataclasses.replace(DEFAULT, share_effects=False, **changes)
    (state,) = small_machines(config, workers=1, use_distributions=True)[1]
    lower, upper = state.spaces.lower, state.spaces.upper
    none, none_upper = np.zeros(lower.length), np.zeros(upper.length)
    (task,) = state.receive(StepRequest("w0", 0, lower.uniform(), none, none, none_upper, np.zeros((2, 0))))
    assert isinstance(task, Evaluate)
    rows = tuple((first, *(others for _ in row[1:])) for row in task.examples)
    (answer,) = state.receive(Scored("w0", task.task, rows, 0))
    assert isinstance(answer, Send)
    assert isinstance(answer.message, StepReply)
    return answer.message


def test_a_worker_takes_a_right_label_that_the_metric_refuses_for_no_worse_than_a_near_miss() -> None:
    """Its LM tells nothing of such an answer (``programs.cross_entropy``); without any distribution it loses 1."""
    refused, near = Outcome(0.0), Outcome(0.0, 0.7, -0.1)
    assert step(refused, near).loss == pytest.approx(estimators.margin_loss(-0.1, 0.0))
    assert step(refused, Outcome(0.0)).loss == 1.0


def test_what_was_skipped_is_no_failure() -> None:
    """A candidate is not scored on an example that it shows."""
    skipped, failed = Outcome(None, skipped=True), Outcome(None)
    for is_zero, loss in ((False, 0.0), (True, 1 / 6)):
        answer = step(failed, Outcome(1.0), missing_is_zero=is_zero)
        assert (answer.missing, answer.loss) == (DEFAULT.draws, pytest.approx(loss))
        answer = step(skipped, Outcome(1.0), missing_is_zero=is_zero)
        assert (answer.missing, answer.loss) == (0, 0.0)
