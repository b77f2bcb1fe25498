"""The K-round lower-level estimate (``algorithm.md`` 8.4), buffered and over messages."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.lower_level import LowerEstimate, Surrogate, buffered_estimate, solve_rounds
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.testing.toys import NothingToScore, QuadraticPolicy, toy_machines

ROUNDS = AlgorithmConfig(
    geometry="euclidean",
    floor=0.0,
    share_effects=False,
    race=False,
    share_demos=False,
    clip_consensus=False,
    aggregator="sign",
    policy="score_function",
    hypergradient=True,
    lower_rounds=200,
    round_step=0.2,
    round_consensus_step=0.1,
    round_dual_step=0.1,
    proximal=1.0,
    penalty=0.0,
    plane_tolerance=0.01,
    # The main loop stands still, so that the rounds start from the uniform point.
    lower_step=0.0,
    upper_step=0.0,
    consensus_step=0.0,
    dual_step=0.0,
    iterations=2,
)
UPPER = np.array([0.25, 0.75])


def by_server(config: AlgorithmConfig, seed: int = 0) -> LowerEstimate:
    """phi as the shipped server and workers compute it."""
    server, workers = toy_machines([QuadraticPolicy(0.1), QuadraticPolicy(0.3)], config)
    for worker in workers:
        worker.q = UPPER.copy()
    engine = SimulatedEngine(lognormal_delays(0.03, 1.0, seed))
    asyncio.run(engine.run(server, workers, NothingToScore()))
    assert server.estimate is not None
    return server.estimate


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("active_workers", [1, 2])
def test_rounds_meet_at_the_known_optimum(buffered: bool, active_workers: int) -> None:
    config = dataclasses.replace(
        ROUNDS,
        buffered_lower=buffered,
        hypergradient=buffered,
        active_workers=active_workers,
        max_staleness=1,
        plane_period=2,
    )
    phi = by_server(config)
    np.testing.assert_allclose(phi.p[:, 0], 0.325, atol=1e-3)
    assert phi.z[0] == pytest.approx(0.325, abs=1e-3)


def test_messages_and_buffered_samples_give_the_same_estimate() -> None:
    config = dataclasses.replace(ROUNDS, max_staleness=1, lower_rounds=17, penalty=0.01)
    rounds = by_server(dataclasses.replace(config, buffered_lower=False, hypergradient=False))
    buffered = by_server(dataclasses.replace(config, buffered_lower=True))
    np.testing.assert_allclose(rounds.p, buffered.p, rtol=1e-12)
    np.testing.assert_allclose(rounds.z, buffered.z, rtol=1e-12)


def test_the_rounds_do_not_depend_on_who_is_fast() -> None:
    config = dataclasses.replace(
        ROUNDS, buffered_lower=False, hypergradient=False, max_staleness=1, lower_rounds=23
    )
    first, second = by_server(config, seed=1), by_server(config, seed=2)
    assert first.p.tolist() == second.p.tolist()
    assert first.z.tolist() == second.z.tolist()


@pytest.mark.parametrize("penalty", [0.005, 0.02])
def test_the_penalty_moves_the_estimate_by_at_most_four_times_itself(penalty: float) -> None:
    phi = by_server(dataclasses.replace(ROUNDS, buffered_lower=True, penalty=penalty, max_staleness=1))
    assert abs(phi.z[0] - 0.325) <= 4 * penalty
    assert np.all(np.abs(phi.p[:, 0] - 0.325) <= 4 * penalty)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("rounds", [1, 7, 40])
def test_total_derivative_against_finite_differences(clip: bool, rounds: int) -> None:
    """Through every worker's p and z: a change of one worker's q moves all of them."""
    config = dataclasses.replace(
        ROUNDS, lower_rounds=rounds, clip_consensus=clip, penalty=0.04 if clip else 0.0
    )
    layout = Layout((3, 2))
    rng = np.random.default_rng(rounds)
    p = np.stack([np.concatenate([rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(2))]) for _ in range(2)])
    curvatures = [np.diag(rng.uniform(0.2, 1.0, 5)) for _ in range(2)]
    crosses = [rng.normal(size=(5, 2)) * 0.1 for _ in range(2)]
    gradients = [rng.normal(size=5) * 0.1 for _ in range(2)]

    def solve(change: np.ndarray) -> LowerEstimate:
        models = [
            Surrogate(gradient + cross @ change[2 * v : 2 * v + 2], p[v], curvature, cross)
            for v, (gradient, cross, curvature) in enumerate(zip(gradients, crosses, curvatures, strict=True))
        ]
        return solve_rounds(layout, config, p, p.mean(axis=0), models)

    phi = solve(np.zeros(4))
    assert phi.p_by_q is not None
    assert phi.z_by_q is not None
    for column, ahead in enumerate(np.eye(4) * 1e-7):
        plus, minus = solve(ahead), solve(-ahead)
        np.testing.assert_allclose((plus.p - minus.p) / 2e-7, phi.p_by_q[..., column], atol=1e-6)
        np.testing.assert_allclose((plus.z - minus.z) / 2e-7, phi.z_by_q[:, column], atol=1e-6)


def test_a_linear_model_has_the_same_gradient_everywhere() -> None:
    flat = Surrogate(np.array([1.0, -1.0]), np.array([0.5, 0.5]))
    assert flat.at(np.array([0.9, 0.1])).tolist() == [1.0, -1.0]
    curved = Surrogate(np.array([1.0, -1.0]), np.array([0.5, 0.5]), np.eye(2), np.eye(2))
    moved = curved.moved(np.array([0.6, 0.4]), np.array([0.01, 0.0]))
    np.testing.assert_allclose(moved.gradient, [1.11, -1.1])
    assert moved.point.tolist() == [0.6, 0.4]


def test_models_with_and_without_curvature_and_cross_mix() -> None:
    config = dataclasses.replace(ROUNDS, lower_rounds=3)
    p = np.full((2, 2), 0.5)
    models = [
        Surrogate(np.array([0.1, 0.0]), p[0]),
        Surrogate(np.array([0.1, 0.0]), p[1], np.eye(2), np.array([[0.1, 0.0], [0.0, 0.0]])),
    ]
    phi = solve_rounds(Layout((2,)), config, p, p[0], models)
    assert phi.p_by_q is not None
    assert phi.p_by_q.shape == (2, 2, 2)
    linear = solve_rounds(Layout((2,)), config, p, p[0], [models[0], models[0]])
    assert linear.p_by_q is not None
    assert linear.p_by_q.shape == (2, 2, 0)


def test_a_worker_that_never_answered_stays_where_it_is() -> None:
    config = dataclasses.replace(ROUNDS, lower_rounds=3)
    p = np.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]])
    model = Surrogate(np.array([0.5, 0.0]), p[0], None, np.array([[0.3, 0.0], [0.0, 0.0]]))
    owner = np.repeat([0.0, 1.0, 2.0], 2)
    phi = buffered_estimate(Layout((2,)), config, p, p[0], [model, None, model], owner)
    assert phi.p[1].tolist() == [0.9, 0.1]
    assert phi.p[0, 0] < 0.5
    assert phi.p_by_q is not None
    assert not phi.p_by_q[1].any()
    assert not phi.p_by_q[:, :, 2:4].any()
    assert phi.p_by_q[0][:, :2].any()
    blind = Surrogate(model.gradient, model.point)
    mixed = buffered_estimate(Layout((2,)), config, p, p[0], [blind, None, model], owner)
    assert mixed.p_by_q is not None
    assert not mixed.p_by_q[:, :, :4].any()
    assert mixed.p_by_q[2][:, 4:].any()
    plain = buffered_estimate(
        Layout((2,)),
        dataclasses.replace(config, hypergradient=False),
        p,
        p[0],
        [model, None, model],
        owner[:0],
    )
    assert plain.p_by_q is None
    assert plain.p.tolist() == phi.p.tolist()
