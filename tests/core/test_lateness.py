"""Points of late workers move along with the consensus, and nobody is drowned by it (``stale_step``)."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import statistics

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT, AlgorithmConfig
from asyndbt_dspy.core.lateness import Carried, moved_along
from asyndbt_dspy.core.messages import Evaluate, Outcome, Scored, Send, StepReply, StepRequest
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.core.snapshots import snapshot
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.simulation.stragglers import Case, run_case
from asyndbt_dspy.testing.toys import AnchoredPolicy, NothingToScore, step_reply, toy_machines

EVEN = np.array([0.5, 0.5])
SINGLE = AlgorithmConfig(
    active_workers=1,
    max_staleness=9,
    share_effects=False,
    race=False,
    share_demos=False,
    consensus_step=0.0,
    dual_step=0.0,
    plane_iterations=0,
    penalty=0.0,
    geometry="euclidean",
    floor=0.0,
    lower_step=0.1,
)


def requests(instructions: list[object]) -> dict[str, StepRequest]:
    sent = [one.message for one in instructions if isinstance(one, Send)]
    return {one.worker: one for one in sent if isinstance(one, StepRequest)}


def after_three_answers_of_the_fast_one(config: AlgorithmConfig) -> ServerState:
    """``w0`` says (.8, .2) three times; what ``w1`` and ``w2`` hold is as old as the run."""
    server, _ = toy_machines([AnchoredPolicy(EVEN)] * 3, config)
    sent = requests(list(server.start()))
    for _ in range(3):
        sent |= requests(list(server.receive(step_reply(sent["w0"], np.array([0.8, 0.2])))))
    return server


def test_an_old_point_counts_as_if_it_had_moved_with_z() -> None:
    carried = Carried(2, EVEN)
    points, z = np.array([[0.5, 0.5], [0.3, 0.7]]), np.array([0.9, 0.1])
    assert carried.points(points, z, 0) is points, "nothing is old yet"
    carried.hand_out(0, z)
    carried.take_in(0, 3)
    assert carried.points(points, z, 3) == pytest.approx(np.array([[0.5, 0.5], [0.6, 0.4]]))
    assert Carried(2, EVEN, moves=False).points(points, z, 3) is points


def test_old_points_do_not_hold_back_the_consensus() -> None:
    # z: mean(.8, .5, .5) = .6; the others' points move half of .1: .6333; then two thirds of .1333: .6593.
    assert after_three_answers_of_the_fast_one(SINGLE).z[0] == pytest.approx(0.6 + 1 / 30 + 7 / 270)
    plain = after_three_answers_of_the_fast_one(dataclasses.replace(SINGLE, stale_step=False))
    assert plain.z[0] == pytest.approx(0.6)


def test_the_server_remembers_what_a_late_answer_was_made_from() -> None:
    server = after_three_answers_of_the_fast_one(SINGLE)
    (first,) = requests(list(server.receive(step_reply(_begun(server, "w1"), EVEN)))).values()
    assert first.worker == "w1"
    assert server.carried.version.tolist() == [2, 0, 0]
    assert server.carried.seen[1].tolist() == EVEN.tolist()
    assert "carried" in snapshot(server)


def _begun(server: ServerState, worker: str) -> StepRequest:
    return StepRequest(worker, 0, EVEN, np.zeros(2), np.zeros(2), np.zeros(2), np.zeros((2, 0)))


def test_a_synchronous_run_has_nothing_old() -> None:
    config = dataclasses.replace(SINGLE, active_workers=2, max_staleness=1)
    server, _ = toy_machines([AnchoredPolicy(EVEN)] * 2, config)
    sent = requests(list(server.start()))
    for _ in range(3):
        instructions: list[object] = []
        for name, lower in (("w0", [0.9, 0.1]), ("w1", [0.2, 0.8])):
            instructions = list(server.receive(step_reply(sent[name], np.array(lower))))
        assert server.z == pytest.approx([0.55, 0.45])
        sent = requests(instructions)


@pytest.mark.parametrize("staleness", [0, 3])
@pytest.mark.parametrize("stale_step", [True, False])
def test_a_late_worker_steps_shorter_and_from_a_point_that_moved_along(
    staleness: int, stale_step: bool
) -> None:
    config = dataclasses.replace(SINGLE, stale_step=stale_step, lower_step=0.1)
    _, (worker,) = toy_machines([AnchoredPolicy(np.array([0.9, 0.1]))], config)
    none, seen, z = np.zeros(2), np.array([0.4, 0.6]), np.array([0.2, 0.8])

    def step(version: int, consensus: np.ndarray, late: int) -> np.ndarray:
        request = StepRequest(
            "w0", version, consensus, none, none, np.zeros(2), np.zeros((2, 0)), staleness=late
        )
        (task,) = worker.receive(request)
        assert isinstance(task, Evaluate)
        outcomes = tuple(tuple(Outcome(1.0) for _ in row) for row in task.examples)
        (answer,) = worker.receive(Scored("w0", task.task, outcomes, 0))
        assert isinstance(answer, Send)
        assert isinstance(answer.message, StepReply)
        return answer.message.lower

    first = step(0, seen, 0)
    assert first == pytest.approx([0.54, 0.46]), "a tenth of the way to its anchor"
    late = staleness if stale_step else 0
    begun = first + late / (1 + late) * (z - seen)
    gradient = first - np.array([0.9, 0.1])
    assert step(7, z, staleness) == pytest.approx(begun - 0.1 / math.sqrt(1 + late) * gradient)


def test_who_moved_along_has_no_arm_at_nothing() -> None:
    layout = Layout((2, 2))
    point, z, seen = (
        np.array([0.9, 0.1, 0.5, 0.5]),
        np.array([0.9, 0.1, 0.5, 0.5]),
        np.array([0.4, 0.6, 0.5, 0.5]),
    )
    moved = moved_along(layout, point, z, seen, 9)
    assert moved[:2].sum() == pytest.approx(1.0)
    assert moved[1] == pytest.approx(0.001 / 1.351)
    assert moved[2:].tolist() == [0.5, 0.5]
    assert moved_along(layout, point, z, None, 9) is point


@pytest.mark.parametrize("active", [1, 2])
def test_a_slow_worker_that_wants_something_else_has_its_full_say(active: int) -> None:
    config = dataclasses.replace(
        DEFAULT,
        active_workers=active,
        keep_busy=True,
        iterations=2_000,
        share_effects=False,
        race=False,
        share_demos=False,
        lower_step=0.1,
    )
    anchors = [np.array([0.9, 0.1]), np.array([0.9, 0.1]), np.array([0.1, 0.9])]
    server, workers = toy_machines([AnchoredPolicy(one) for one in anchors], config)
    delays = lognormal_delays(0.03, 1.0, 0, {"w2": 8.0})
    asyncio.run(SimulatedEngine(delays).run(server, workers, NothingToScore()))
    # Two thirds of the workers want .9 and one .1: the mean is .633, whoever is fast.
    assert server.z[0] == pytest.approx(0.633, abs=0.02)


def test_the_target_is_reached_sooner_with_a_slow_worker() -> None:
    def seconds(synchronous: bool) -> float:
        case = Case(3, 2, stragglers=1)
        runs = [run_case(case, seed, synchronous=synchronous, steps=300, held_out=48) for seed in range(8)]
        return statistics.median(one.target_s for one in runs)

    assert seconds(False) < 0.45 * seconds(True)
