"""The bilevel toy with known optimum, through the shipped machines and a virtual clock (``algorithm.md`` 8.7)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing

import pytest

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.testing.toys import NothingToScore, QuadraticPolicy, toy_machines

Setting = tuple[int, int, int]
"""(R, S, tau)."""

SYNCHRONOUS: tuple[Setting, ...] = ((2, 2, 1), (3, 3, 1))
ASYNCHRONOUS: tuple[Setting, ...] = ((2, 1, 5), (3, 2, 5), (3, 2, 15))
SEEDS = range(6)
ITERATIONS = 2000
OPTIMA = {2: (0.1, 0.3), 3: (0.1, 0.3, 0.2)}


def config(active_workers: int, max_staleness: int, hypergradient: bool) -> AlgorithmConfig:
    return AlgorithmConfig(
        active_workers=active_workers,
        max_staleness=max_staleness,
        iterations=ITERATIONS,
        geometry="euclidean",
        floor=0.0,
        normalise=False,
        stale_step=False,
        clip_consensus=False,
        aggregator="sign",
        share_effects=False,
        race=False,
        share_demos=False,
        lower_step=0.1,
        upper_step=0.1,
        consensus_step=0.05,
        plane_step=0.02,
        dual_step=0.02,
        lower_rounds=200,
        round_step=0.2,
        round_consensus_step=0.1,
        round_dual_step=0.1,
        proximal=1.0,
        penalty=0.0,
        plane_damping=0.01,
        dual_damping=0.01,
        plane_tolerance=0.01,
        plane_period=10,
        plane_iterations=ITERATIONS,
        plane_drop=1e-3,
        policy="score_function",
        hypergradient=hypergradient,
        buffered_lower=True,
        rekey_planes=True,
        race_fraction=0.0,
    )


def solve(setting: Setting, hypergradient: bool, seed: int) -> list[tuple[float, float]]:
    """(s, r) of every worker after 2,000 iterations, and z as the last point with the mean s."""
    count, active_workers, max_staleness = setting
    policies = [QuadraticPolicy(a) for a in OPTIMA[count]]
    server, workers = toy_machines(policies, config(active_workers, max_staleness, hypergradient))
    asyncio.run(SimulatedEngine(lognormal_delays(0.03, 1.0, seed)).run(server, workers, NothingToScore()))
    assert server.version == ITERATIONS
    points = [(float(worker.q[0]), float(worker.p[0])) for worker in workers]
    return [*points, (sum(s for s, _ in points) / count, float(server.z[0]))]


def tasks() -> list[tuple[Setting, bool, int]]:
    # Without delays to choose from, synchronous runs are equal bit for bit (test_synchrony): one seed shows them all.
    with_q = [(one, True, seed) for one in ASYNCHRONOUS for seed in SEEDS]
    return [*((one, hyper, 0) for one in SYNCHRONOUS for hyper in (True, False)), *with_q] + [
        (one, False, 0) for one in ASYNCHRONOUS
    ]


@pytest.fixture(scope="module")
def solved() -> dict[tuple[Setting, bool, int], list[tuple[float, float]]]:
    """All runs, on two processes: they share nothing."""
    todo = sorted(tasks(), key=lambda one: (not one[1], -one[0][0]))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return dict(zip(todo, pool.map(solve, *zip(*todo, strict=True)), strict=True))


@pytest.mark.parametrize(("setting", "hypergradient", "seed"), tasks(), ids=str)
def test_the_optimum_is_reached(
    solved: dict[tuple[Setting, bool, int], list[tuple[float, float]]],
    setting: Setting,
    hypergradient: bool,
    seed: int,
) -> None:
    """With the q-part of the hypergradient the bilevel optimum; without it plain alternating minimisation."""
    expected = (0.5, 0.45) if hypergradient else (0.2, 0.3)
    for point in solved[setting, hypergradient, seed]:
        assert point == pytest.approx(expected, abs=0.01)
