"""Liars and robust aggregation (``algorithm.md`` 8.10, 7.10)."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.consensus import aggregate, update_consensus
from asyndbt_dspy.core.messages import RoundRequest, Send, StepRequest
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.testing.toys import AnchoredPolicy, NothingToScore, round_reply, step_reply, toy_machines

HONEST, LIE = np.array([0.6, 0.4]), np.array([0.0, 1.0])
FROZEN = [HONEST, HONEST, HONEST, LIE, LIE]

PLAIN = AlgorithmConfig(
    active_workers=5,
    max_staleness=1,
    geometry="euclidean",
    floor=0.0,
    share_effects=False,
    race=False,
    share_demos=False,
    buffered_lower=False,
    clip_consensus=False,
    aggregator="sign",
    proximal=1.0,
    penalty=0.0,
    round_consensus_step=0.05,
    round_dual_step=0.0,
    lower_rounds=400,
    dual_damping=0.0,
)
ROBUST = dataclasses.replace(
    PLAIN,
    clip_consensus=True,
    penalty=0.02,
    round_consensus_step=0.05,  # times psi: .001
    round_dual_step=0.1,
    consensus_step=0.05,
    dual_step=0.1,
    lower_step=0.1,
    lower_rounds=2000,
)


def play(config: AlgorithmConfig, iterations: int) -> ServerState:
    """The shipped server against five scripted workers that always send the same p."""
    server, _ = toy_machines([AnchoredPolicy(HONEST)] * 5, dataclasses.replace(config, iterations=iterations))
    queue = [one.message for one in server.start() if isinstance(one, Send)]
    while queue:
        request = queue.pop(0)
        if isinstance(request, (StepRequest, RoundRequest)):
            p = FROZEN[server.numbers[request.worker]]
            reply = step_reply(request, p) if isinstance(request, StepRequest) else round_reply(request, p)
            queue += [one.message for one in server.receive(reply) if isinstance(one, Send)]
    return server


def test_rounds_without_clipping_end_at_the_plain_mean() -> None:
    phi = play(PLAIN, iterations=2).estimate
    assert phi is not None
    np.testing.assert_allclose(phi.z, [0.36, 0.64], atol=1e-6)


def test_robust_rounds_stay_with_the_honest_majority() -> None:
    phi = play(ROBUST, iterations=2).estimate
    assert phi is not None
    np.testing.assert_allclose(phi.z, [0.6, 0.4], atol=0.01)


def test_the_robust_main_loop_stays_with_the_honest_majority() -> None:
    main = dataclasses.replace(ROBUST, plane_iterations=0)
    np.testing.assert_allclose(play(main, iterations=2000).z, [0.6, 0.4], atol=0.01)
    unclipped = dataclasses.replace(main, clip_consensus=False)
    assert play(unclipped, iterations=2000).z[0] < 0.5  # the liars' duals win in the end


def run_live(config: AlgorithmConfig, iterations: int) -> tuple[ServerState, np.ndarray]:
    """Three honest workers that keep learning (curvature 1 at (.6, .4)) and two that always send (0, 1)."""
    policies = [AnchoredPolicy(HONEST)] * 3 + [AnchoredPolicy(np.array([-1e3, 1e3]))] * 2
    server, workers = toy_machines(policies, dataclasses.replace(config, iterations=iterations))
    for liar in workers[3:]:
        liar.p = LIE.copy()
    asyncio.run(SimulatedEngine(lognormal_delays(0.03, 1.0, 0)).run(server, workers, NothingToScore()))
    assert workers[4].p.tolist() == LIE.tolist()
    return server, np.array([worker.p for worker in workers[:3]])


def test_live_honest_workers_are_biased_by_no_more_than_the_bound() -> None:
    config = dataclasses.replace(ROBUST, plane_iterations=0, consensus_step=0.02, dual_step=0.02)
    server, honest = run_live(config, 2500)
    # At the stationary point 3 (theta + psi sign) = 4 psi: a bias of 4/3 psi.
    assert server.z[0] == pytest.approx(0.573, abs=2e-3)
    np.testing.assert_allclose(honest[:, 0], 0.573, atol=3e-3)


def test_live_honest_workers_are_captured_when_nothing_is_clipped() -> None:
    config = dataclasses.replace(ROBUST, plane_iterations=0, clip_consensus=False)
    server, honest = run_live(config, 1500)
    np.testing.assert_allclose(server.z, LIE, atol=0.01)
    np.testing.assert_allclose(honest, [LIE] * 3, atol=0.01)


@pytest.mark.parametrize(
    ("aggregator", "trim", "expected"),
    [
        ("mean", 0, 0.36),
        ("trimmed_mean", 1, 0.4),
        ("trimmed_mean", 2, 0.6),
        ("median", 0, 0.6),
    ],
)
def test_aggregates(aggregator: str, trim: int, expected: float) -> None:
    config = dataclasses.replace(PLAIN, aggregator=aggregator, trim=trim)  # type: ignore[arg-type]
    assert aggregate(config, np.array(FROZEN))[0] == pytest.approx(expected)
    z = update_consensus(
        Layout((2,)),
        dataclasses.replace(config, consensus_step=0.0),
        HONEST,
        np.array(FROZEN),
        np.zeros((5, 2)),
        np.zeros(2),
    )
    assert z[0] == pytest.approx(expected)


def test_a_median_is_projected_back_onto_the_simplex() -> None:
    config = dataclasses.replace(PLAIN, aggregator="median")
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    z = update_consensus(Layout((3,)), config, p[0], p, np.zeros((3, 3)), np.zeros(3))
    np.testing.assert_allclose(z, np.full(3, 1 / 3))


def test_a_trim_that_leaves_nobody_is_refused_at_the_start_and_shrinks_with_evictions() -> None:
    config = dataclasses.replace(PLAIN, aggregator="trimmed_mean", trim=1, active_workers=1)
    with pytest.raises(ConfigurationError, match="trim=1 cuts 2 of 2 workers"):
        toy_machines([AnchoredPolicy(HONEST)] * 2, config)
    assert aggregate(config, np.array([HONEST, LIE]))[0] == pytest.approx(0.3)
    assert aggregate(dataclasses.replace(config, trim=2), np.array([HONEST, HONEST, LIE]))[
        0
    ] == pytest.approx(0.6)
