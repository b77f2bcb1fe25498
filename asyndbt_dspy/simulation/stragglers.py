"""Asynchronous against synchronous workers of unequal speed: the protocol of the algorithm's straggler experiments.

One delay per round trip, log-normal with median 30 ms; some workers several times slower. Both sides run the shipped
server, workers and race on one made-up problem with as many rollouts. The synchronous side waits for everybody in every
iteration (S = R, tau = 1) and spreads its race evenly; it keeps the buffered plane refreshes and the race that closes its
heats without stragglers, which only helps it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import zlib
from dataclasses import dataclass

import numpy as np

from asyndbt_dspy.core.config import DEFAULT, AlgorithmConfig
from asyndbt_dspy.core.policies import WorkerSpace
from asyndbt_dspy.core.server import Member, ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.meter import RunMeter
from asyndbt_dspy.engines.protocols import SERVER, Recorded
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.simulation.machines import made_up_space
from asyndbt_dspy.testing.toys import TableEvaluator

MEDIAN_S = 0.03
_WORTH = (0.0, 0.05, 0.3, -0.1, 0.1, -0.2)
"""What each instruction adds to the chance of a right answer."""
_BASE = 0.4
_CLOSED = 0.8
"""Part of the way from the first loss to the best one that counts as reaching the target."""


@dataclass(frozen=True)
class Case:
    """One arm of the protocol.

    Attributes:
        workers, active, max_staleness: R, S, tau.
        stragglers: Workers that are ``slowdown`` times slower.
        sigma: Of the delays' logarithm.
        keep_busy: A worker goes on with its next minibatch where it would wait for others.
        automatic: S and tau adapt; ``active`` and ``max_staleness`` are where they start.
        lost: Workers that stop answering after ten steps.
    """

    workers: int
    active: int
    max_staleness: int = 15
    stragglers: int = 0
    slowdown: float = 4.0
    sigma: float = 1.0
    lost: int = 0
    keep_busy: bool = True
    automatic: bool = False


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        contributions: Evaluations that came back: steps and race units.
        calls: Rollouts.
        seconds: Virtual, to the end of the race; ``search_s`` to the end of the search.
        target_s, target_calls: Until the loss under z was at the target; ``inf`` if it never was.
    """

    contributions: int
    calls: int
    seconds: float
    search_s: float
    target_s: float
    target_calls: float
    largest_staleness: int
    mean_staleness: float
    utilisation: float
    iterations: int

    @property
    def rate(self) -> float:
        return self.contributions / self.seconds

    @property
    def rollout_rate(self) -> float:
        return self.calls / self.seconds


def _score(worker: str, candidate: tuple[int, ...], example: int, held_out: bool) -> float:
    toss = zlib.crc32(f"{worker}/{candidate}/{example}/{held_out}".encode()) % 1000 / 1000
    return float(toss < _BASE + _WORTH[candidate[0]])


def expected_loss(z: np.ndarray) -> float:
    """Loss under the consensus: 1 minus the chance of a right answer."""
    return 1.0 - _BASE - float(np.dot(z, _WORTH))


def settings(case: Case, synchronous: bool) -> AlgorithmConfig:
    base = dataclasses.replace(
        DEFAULT, policy="score_function", draws=4, minibatch=3, lower_step=0.1, iterations=10**9
    )
    if synchronous:
        return dataclasses.replace(base, active_workers=case.workers, max_staleness=1)
    return dataclasses.replace(
        base,
        active_workers=case.active,
        max_staleness=case.max_staleness,
        keep_busy=case.keep_busy,
        auto_active=case.automatic,
        auto_staleness=case.automatic,
    )


def run_case(case: Case, seed: int, *, synchronous: bool, steps: int = 2_400, held_out: int = 432) -> Outcome:
    """One run of ``case``.

    Args:
        steps: Of all workers together; with ``held_out``, the race's examples in all, the budget of every arm.
    """
    held_out //= case.workers
    config = settings(case, synchronous)
    space = made_up_space(len(_WORTH), demos=6, slots=2)
    spaces = WorkerSpace(space, tuple(tuple(range(len(block.arms))) for block in space.upper))
    members = [Member(f"w{number}", spaces.allowed, held_out) for number in range(case.workers)]
    race = (config.race_candidates + 1) * held_out * case.workers
    calls = steps * config.draws * config.minibatch + race
    server = ServerState(space, members, config, calls)
    workers = [
        WorkerState(member.name, number, spaces, config, examples=60, seed=seed)
        for number, member in enumerate(members)
    ]
    factors = {f"w{number}": case.slowdown for number in range(case.stragglers)}
    delays = lognormal_delays(MEDIAN_S, case.sigma, seed, factors)
    dying = {f"w{case.workers - 1 - number}" for number in range(case.lost)}
    engine = SimulatedEngine(
        lambda one: math.inf if one.worker in dying and one.task > 10 else delays(one),
        answer_timeout_s=2.0 if dying else math.inf,
    )
    meter, target = RunMeter(server), _Target(server)
    asyncio.run(engine.run(server, workers, TableEvaluator(_score), [meter, target]))
    return Outcome(
        contributions=meter.contributions,
        calls=server.calls_spent,
        seconds=meter.end_s,
        search_s=target.search_s,
        target_s=target.reached_s,
        target_calls=target.reached_calls,
        largest_staleness=meter.largest_staleness,
        mean_staleness=meter.mean_staleness,
        utilisation=meter.utilisation,
        iterations=server.version,
    )


class _Target:
    """Notes when the loss under z first reaches the target, and when the race begins."""

    def __init__(self, server: ServerState) -> None:
        self.server = server
        first, best = expected_loss(server.z), 1.0 - _BASE - max(_WORTH)
        self.loss = first + _CLOSED * (best - first)
        self.reached_s = self.reached_calls = math.inf
        self.search_s = 0.0

    def __call__(self, recorded: Recorded) -> None:
        if recorded.machine != SERVER:
            return
        if self.server.race is None:
            self.search_s = recorded.time_s
        if math.isinf(self.reached_s) and expected_loss(self.server.z) <= self.loss:
            self.reached_s, self.reached_calls = recorded.time_s, float(self.server.calls_spent)
