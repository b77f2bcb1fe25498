"""The old points of late workers do not hold the consensus back, and nobody is drowned (``stale_step``)."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import statistics

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT, AlgorithmConfig, resolve
from asyndbt_dspy.core.lateness import Distances
from asyndbt_dspy.core.messages import Evaluate, Outcome, Scored, Send, StepReply, StepRequest
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.core.snapshots import snapshot
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.simulation.stragglers import Case, run_case
from asyndbt_dspy.testing.toys import AnchoredPolicy, NothingToScore, step_reply, toy_machines

EVEN = np.array([0.5, 0.5])
PAIR = Layout((2,))
SINGLE = AlgorithmConfig(
    active_workers=1,
    keep_busy=True,
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


CALM = {
    "keep_busy": True,
    "share_effects": False,
    "race": False,
    "share_demos": False,
    "plane_iterations": 0,
    "dual_step": 0.0,
    "consensus_step": 0.0,
    "penalty": 0.0,
}
"""Nothing but the workers' steps moves z."""


def requests(instructions: list[object]) -> dict[str, StepRequest]:
    sent = [one.message for one in instructions if isinstance(one, Send)]
    return {one.worker: one for one in sent if isinstance(one, StepRequest)}


def after_three_answers_of_the_fast_one(config: AlgorithmConfig) -> ServerState:
    """``w0`` says (.8, .2) three times; what ``w1`` and ``w2`` hold is as old as the run."""
    server, _ = toy_machines([AnchoredPolicy(EVEN)] * 3, config)
    sent = requests(list(server.start()))
    for _ in range(3):
        asked = sent["w0"]
        reply = dataclasses.replace(step_reply(asked, np.array([0.8, 0.2])), calls=1, repeat=asked.repeat)
        sent |= requests(list(server.receive(reply)))
    return server


def test_a_worker_counts_with_how_far_from_z_it_wants_to_be() -> None:
    distances = Distances(2, EVEN, PAIR)
    points, z = np.array([[0.5, 0.5], [0.3, 0.7]]), np.array([0.9, 0.1])
    distances.hand_out(0, z)
    distances.take_back(0)
    distances.hand_out(0, EVEN)  # its next step begins before its answer is used
    distances.take_in(0)
    assert distances.seen.tolist() == [z.tolist(), EVEN.tolist()]
    # (.5, .3) are (-.4, -.2) from what they were made from; one answer of two workers goes half as far.
    rows = np.arange(2)
    assert distances.points(points, z, rows, 1) == pytest.approx(np.array([[0.7, 0.3], [0.8, 0.2]]))
    assert distances.points(points, z, rows, 9) == pytest.approx(np.array([[0.5, 0.5], [0.7, 0.3]]))
    assert distances.points(points, z, rows[1:], 1) == pytest.approx(np.array([[0.7, 0.3]]))
    assert Distances(2, EVEN, PAIR, count_so=False).points(points, z, rows, 1).tolist() == points.tolist()


def test_old_points_do_not_hold_back_the_consensus() -> None:
    # The mean of (.3, 0, 0) is .1, a third of it per answer; seen from the newer z it is less and less.
    assert after_three_answers_of_the_fast_one(SINGLE).z[0] == pytest.approx(_three_updates())
    plain = after_three_answers_of_the_fast_one(dataclasses.replace(SINGLE, stale_step=False))
    assert plain.z[0] == pytest.approx(0.6)


def _three_updates() -> float:
    z = 0.5
    for _ in range(3):
        z += (0.8 - z) / 3 / 3
    return z


def test_a_late_answer_counts_from_what_it_was_made_from() -> None:
    server = after_three_answers_of_the_fast_one(dataclasses.replace(SINGLE, active_workers=2))
    # Three answers of w0 made one update of two; w1 is one update late, and goes on at once.
    assert server.version == 1
    moved = server.z.copy()
    assert moved[0] > 0.5
    server.receive(step_reply(_begun(server, "w1"), np.array([0.6, 0.4])))
    assert server.version == 2
    assert server.distances.seen[1].tolist() == EVEN.tolist()
    assert "distances" in snapshot(server)


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
def test_a_late_worker_takes_shorter_steps(staleness: int, stale_step: bool) -> None:
    config = dataclasses.replace(SINGLE, stale_step=stale_step, lower_step=0.1)
    _, (worker,) = toy_machines([AnchoredPolicy(np.array([0.9, 0.1]))], config)
    none = np.zeros(2)
    request = StepRequest("w0", 7, EVEN, none, none, np.zeros(2), np.zeros((2, 0)), staleness=staleness)
    (task,) = worker.receive(request)
    assert isinstance(task, Evaluate)
    outcomes = tuple(tuple(Outcome(1.0) for _ in row) for row in task.examples)
    (answer,) = worker.receive(Scored("w0", task.task, outcomes, 0))
    assert isinstance(answer, Send)
    assert isinstance(answer.message, StepReply)
    late = staleness if stale_step else 0
    assert answer.message.lower[0] == pytest.approx(0.5 + 0.1 / math.sqrt(1 + late) * 0.4)


@pytest.mark.parametrize(("workers", "active"), [(3, 1), (18, 1), (18, 9)])
def test_the_consensus_comes_to_rest_with_many_workers(workers: int, active: int) -> None:
    config = dataclasses.replace(DEFAULT, **CALM, active_workers=active, iterations=600)
    server, machines = toy_machines([AnchoredPolicy(np.array([0.7, 0.3]))] * workers, config)
    seen: list[float] = []
    delays = lognormal_delays(0.03, 1.0, 0, {"w0": 4.0})
    engine = SimulatedEngine(delays)
    asyncio.run(engine.run(server, machines, NothingToScore(), [lambda _: seen.append(server.z[0])]))
    later = seen[len(seen) // 2 :]
    assert max(later) - min(later) < 0.02
    assert later[-1] == pytest.approx(0.69, abs=0.02), "the anchor is .7, less the floor"


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
    assert server.z[0] == pytest.approx(0.633, abs=0.03)


@pytest.mark.parametrize(("fast", "slow"), [(1, 1), (1, 2), (1, 4), (2, 4), (1, 9)])
def test_what_slow_workers_said_of_an_old_z_does_not_throw_it_about(fast: int, slow: int) -> None:
    """Workers know what they want, .6 or .2, and some are twenty times slower: z is the mean, and stays there."""
    config = dataclasses.replace(DEFAULT, **CALM, iterations=400)
    count = fast + slow
    server, _ = toy_machines([AnchoredPolicy(EVEN)] * count, resolve(config, count, "auto", None))
    random = np.random.default_rng(0)
    under_way: list[tuple[float, StepRequest]] = []
    seen: list[float] = []

    def begin(now: float, instructions: list[object]) -> None:
        for name, asked in requests(instructions).items():
            takes = 1.0 if int(name[1:]) < fast else 20.0
            under_way.append((now + takes * (1.0 + 0.05 * random.random()), asked))

    begin(0.0, list(server.start()))
    while server.phase == "search":
        now, asked = min(under_way, key=lambda one: one[0])
        under_way.remove((now, asked))
        wants = 0.6 if int(asked.worker[1:]) < fast else 0.2
        reply = step_reply(asked, np.array([wants, 1.0 - wants]))
        begin(now, list(server.receive(dataclasses.replace(reply, calls=1, repeat=asked.repeat))))
        seen.append(server.z[0])
    later = np.array(seen[len(seen) // 2 :])
    mean = (0.6 * fast + 0.2 * slow) / count
    assert np.abs(later - mean).max() < 0.04
    assert later.mean() == pytest.approx(mean, abs=0.01)


def test_a_word_counts_in_full_once_and_then_as_far_as_its_point() -> None:
    """In each block for itself; a distance of nothing stays nothing."""
    distances, rows = Distances(3, np.tile(EVEN, 2), Layout((2, 2))), np.arange(3)
    p = np.array([[0.9, 0.1, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.9, 0.1]])
    z = np.array([0.8, 0.2, 0.3, 0.7])
    for number in rows:
        distances.take_in(number)
    full = z + (p - 0.5) * 2 / 3
    np.testing.assert_allclose(distances.points(p, z, rows, 2), full)
    # Of two thirds, one is left. z is .1 short of .9, beyond .5 and .7 beyond .1 in the first block, .6 short of .9 in the second.
    moved = (
        np.array([[0.4 + 0.1, -0.4 - 0.1, 0, 0], [0] * 4, [-0.4 - 0.4, 0.4 + 0.4, 0.4 + 0.4, -0.4 - 0.4]]) / 3
    )
    np.testing.assert_allclose(distances.points(p, z, rows, 2) - z, moved, atol=1e-12)
    beyond = np.array([0.95, 0.05, 0.95, 0.05])
    assert distances.points(p, beyond, rows, 3)[0].tolist() == beyond.tolist(), "it says nothing more there"
    distances.take_in(0)
    np.testing.assert_allclose(distances.points(p, beyond, rows, 3)[0], beyond + np.array([0.4, -0.4, 0, 0]))


def test_the_target_is_reached_sooner_with_a_slow_worker() -> None:
    def seconds(synchronous: bool) -> float:
        case = Case(3, 2, stragglers=1)
        runs = [run_case(case, seed, synchronous=synchronous, steps=300, held_out=48) for seed in range(8)]
        return statistics.median(one.target_s for one in runs)

    assert seconds(False) < 0.45 * seconds(True)
