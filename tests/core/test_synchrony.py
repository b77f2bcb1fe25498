"""Order of arrival, staleness and eviction (``algorithm.md`` 8.8, 8.9)."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyndbt_dspy.core.config import DEFAULT, PAPER, AlgorithmConfig
from asyndbt_dspy.core.messages import Evaluate, Send, StepReply
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.protocols import SERVER, Recorded
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.testing.toys import (
    AnchoredPolicy,
    NothingToScore,
    TableEvaluator,
    additive_score,
    score_table,
    small_machines,
    toy_machines,
)

ALL_OF_THEM = {"active_workers": 3, "max_staleness": 1, "race": False, "plane_period": 2}
SYNCHRONOUS = {
    "posterior": dataclasses.replace(DEFAULT, **ALL_OF_THEM, split_levels=True),
    "score_function": dataclasses.replace(
        DEFAULT, **ALL_OF_THEM, policy="score_function", hypergradient=True, adam=True, geometry="euclidean"
    ),
    "paper": dataclasses.replace(PAPER, **ALL_OF_THEM, lower_rounds=2),
}


def states(server: ServerState, workers: list[WorkerState]) -> str:
    """Every bit of every machine (JSON keeps float64 exactly)."""
    return json.dumps([server.snapshot(), *(worker.snapshot() for worker in workers)])


def synchronous_loop(config: AlgorithmConfig) -> str:
    """The same machines in a plain loop: every worker in turn, no engine, no clock."""
    server, workers = small_machines(config, calls=600)
    table = TableEvaluator(additive_score)
    inbox = server.start()
    while inbox:
        replies: list[Any] = []
        for instruction in inbox:
            if isinstance(instruction, Send):
                worker = workers[server.numbers[instruction.message.worker]]
                for request in worker.receive(instruction.message):  # type: ignore[arg-type]
                    if isinstance(request, Evaluate):
                        replies += worker.receive(score_table(request, table))
        inbox = [instruction for reply in replies for instruction in server.receive(reply.message)]
    assert server.phase == "finished"
    assert server.version > 4
    return states(server, workers)


@pytest.mark.parametrize("name", SYNCHRONOUS)
@pytest.mark.parametrize("seed", range(4))
def test_with_all_workers_and_no_staleness_delays_change_no_bit(name: str, seed: int) -> None:
    server, workers = small_machines(SYNCHRONOUS[name], calls=600)
    engine = SimulatedEngine(lognormal_delays(1.0, 2.0, seed), eager=bool(seed % 2))
    asyncio.run(engine.run(server, workers, TableEvaluator(additive_score)))
    assert states(server, workers) == synchronous_loop(SYNCHRONOUS[name])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_staleness_stays_below_its_bound_for_any_delays(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), "R")
    active = data.draw(st.integers(1, count), "S")
    bound = data.draw(st.integers(1, 6), "tau")
    rounds = data.draw(st.booleans(), "rounds")
    delays = st.floats(0.01, 100.0)
    config = AlgorithmConfig(
        active_workers=active,
        max_staleness=bound,
        iterations=25,
        share_effects=False,
        race=False,
        plane_period=4,
        lower_rounds=2,
        buffered_lower=not rounds,
    )
    server, workers = toy_machines([AnchoredPolicy(np.array([0.9, 0.1]))] * count, config)
    seen: list[int] = []

    def watch(recorded: Recorded) -> None:
        if recorded.machine == SERVER and isinstance(recorded.event, StepReply):
            seen.append(server.staleness[server.numbers[recorded.event.worker]])

    engine = SimulatedEngine(lambda request: data.draw(delays))
    asyncio.run(engine.run(server, workers, NothingToScore(), [watch]))
    assert server.version == 25
    assert len(seen) >= 25
    assert max(seen) <= bound - 1
    assert server.live.all()  # kept by waiting, not by setting late workers aside


@pytest.mark.parametrize("rounds", [False, True], ids=["buffered", "rounds"])
@pytest.mark.parametrize("answers", [0, 3])
def test_a_worker_that_stops_answering_is_evicted_and_the_run_goes_on(rounds: bool, answers: int) -> None:
    config = AlgorithmConfig(
        active_workers=2,
        max_staleness=4,
        iterations=40,
        share_effects=False,
        race=False,
        aggregator="sign",
        buffered_lower=not rounds,
        plane_period=3,
        lower_rounds=2,
        dual_step=0.5,
        consensus_step=0.05,
    )
    server, workers = toy_machines(
        [AnchoredPolicy(np.array([target, 1 - target])) for target in (0.9, 0.8, 0.1)], config
    )
    told = {"w2": 0}

    def delays(request: Evaluate) -> float:
        if request.worker != "w2":
            return 1.0
        told["w2"] += 1
        return 1.0 if told["w2"] <= answers else float("inf")

    at_loss: list[tuple[int, float]] = []

    def watch(recorded: Recorded) -> None:
        if type(recorded.event).__name__ == "WorkerLost":
            at_loss.append((server.version, recorded.time_s))

    engine = SimulatedEngine(delays, answer_timeout_s=10.0)
    asyncio.run(engine.run(server, workers, NothingToScore(), [watch]))
    assert len(at_loss) == 1
    assert server.version == 40
    assert at_loss[0][0] < 40
    assert server.live.tolist() == [1.0, 1.0, 0.0]
    # What is left is the consensus of the two that live: nothing of the lost one's p, duals or planes pulls any more.
    assert server.z[0] > 0.7


def test_a_lost_workers_duals_and_point_leave_the_sum() -> None:
    config = AlgorithmConfig(
        active_workers=1, max_staleness=1, share_effects=False, race=False, aggregator="sign", penalty=0.0,
        clip_consensus=False, plane_iterations=0, consensus_step=1.0,
    )  # fmt: skip
    server, _ = toy_machines([AnchoredPolicy(np.array([1.0, 0.0]))] * 2, config)
    server.start()
    server.duals[1] = [0.3, -0.3]
    both, one = (update(server, live) for live in ([1.0, 1.0], [1.0, 0.0]))
    np.testing.assert_allclose(both, [0.8, 0.2])
    np.testing.assert_allclose(one, [0.5, 0.5])


def update(server: ServerState, live: list[float]) -> np.ndarray:
    server.live, server.z = np.array(live), server.layout.uniform()
    server._iterate([])
    return server.z
