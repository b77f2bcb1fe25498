"""When and how a search ends, and what wins."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT, PAPER, AlgorithmConfig
from asyndbt_dspy.core.messages import ArmsJoined, Finish, Send, StopSearch
from asyndbt_dspy.core.server import Member, ServerState
from asyndbt_dspy.core.space import Arm, Block, Space
from asyndbt_dspy.engines.simulated import SimulatedEngine, work_delays
from asyndbt_dspy.testing.network import Network
from asyndbt_dspy.testing.toys import (
    AnchoredPolicy,
    NothingToScore,
    Score,
    TableEvaluator,
    additive_score,
    small_machines,
    small_space,
    toy_machines,
)


def play(
    config: AlgorithmConfig, calls: int | None = 600, score: Score = additive_score, **changes: object
) -> ServerState:
    server, workers = small_machines(config, calls=calls, **changes)  # type: ignore[arg-type]
    asyncio.run(SimulatedEngine(work_delays()).run(server, workers, TableEvaluator(score)))
    return server


def test_a_search_that_stands_still_is_stationary() -> None:
    config = dataclasses.replace(
        DEFAULT, share_effects=False, stationarity=1e-6, patience=3, geometry="euclidean", aggregator="sign",
        dual_step=0.0, consensus_step=0.05, penalty=1e-9, plane_iterations=0, iterations=5000,
    )  # fmt: skip
    server, workers = toy_machines([AnchoredPolicy(np.array([0.7, 0.3]))] * 2, config)
    asyncio.run(SimulatedEngine(work_delays()).run(server, workers, NothingToScore()))
    assert server.finish_reason.startswith("stationary: step norm")
    assert 3 <= server.version < 200


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("period", [1, 2])
def test_the_number_of_iterations_is_a_bound(buffered: bool, period: int) -> None:
    config = dataclasses.replace(
        PAPER, iterations=5, buffered_lower=buffered, plane_period=period, active_workers=2
    )
    server = play(config, calls=None)
    assert server.version == 5
    assert server.finish_reason == "5 iterations done"


def test_the_default_finds_what_helps_and_the_race_confirms_it() -> None:
    server = play(DEFAULT, calls=1200, held_out=40, examples=40)
    assert server.winner[0] == 2
    assert server.race is not None
    standings = {one.candidate: one for one in server.race.standings()}
    assert standings[server.winner].advantage > 0


def test_without_a_race_the_program_is_decoded() -> None:
    server = play(dataclasses.replace(PAPER, lower_step=0.02, adam=False, consensus_step=0.02), calls=900)
    assert server.race is None
    assert server.winner[0] == int(np.argmax(server.z))
    best = min((rows[0] for rows in server.nominations.values()), key=lambda one: one.value)
    assert server.winner[1:] == best.candidate[1:]


def test_without_a_race_an_early_stop_decodes_too() -> None:
    machines = small_machines(dataclasses.replace(PAPER, lower_step=0.05, adam=False))
    net = Network(*machines, TableEvaluator(additive_score))
    while net.server.version < 3:
        net.deliver(0)
    net.server.z = np.array([0.1, 0.2, 0.6, 0.1])
    net.server.receive(StopSearch("interrupted", race=False))
    assert net.server.phase == "finished"
    assert net.server.winner[0] == 2


def test_stops_during_the_race() -> None:
    net = Network(
        *small_machines(dataclasses.replace(DEFAULT, race_fraction=0.5)), TableEvaluator(additive_score)
    )
    while net.server.phase != "race":
        net.deliver(0)
    before = net.server.snapshot()
    (wait,) = net.server.receive(StopSearch("hurry", race=True))
    assert type(wait).__name__ == "Wait"
    assert net.server.snapshot() == before
    net.server.receive(StopSearch("now", race=False))
    assert (net.server.phase, net.server.finish_reason) == ("finished", "now")


def test_a_stop_before_anything_was_learned_returns_the_student() -> None:
    server, _ = small_machines(DEFAULT)
    server.start()
    server.receive(StopSearch("at once"))
    assert server.phase == "finished"
    assert server.winner == server.space.student


@pytest.mark.parametrize("preset", [DEFAULT, PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("levels", ["prompts", "demos"])
def test_prompts_alone_and_demos_alone(preset: AlgorithmConfig, levels: str) -> None:
    space = small_space(3)
    part = Space(space.lower if levels == "prompts" else space.upper)
    server = play(
        preset, space=part, score=lambda worker, candidate, example, held_out: float(example % 3 > 0)
    )
    assert server.phase == "finished"
    assert len(server.winner) == len(part.blocks)
    assert server.calls_spent > 100


def test_idle_workers_get_what_others_give_back() -> None:
    """A worker that the budget had left idle goes on once cheaper steps have returned calls."""
    config = dataclasses.replace(DEFAULT, race=False, minibatch=3, plane_iterations=0)

    def free(worker: str, candidate: tuple[int, ...], example: int, held_out: bool) -> float | None:
        return None if worker == "w0" else 1.0  # w0's rollouts fail and cost nothing

    server, workers = small_machines(config, calls=14)  # two steps of six at a time, three workers
    net = Network(server, workers, TableEvaluator(free))
    assert sorted(server.roster.outstanding) == [0, 1]
    served: set[str] = set()
    for _ in range(400):
        if net.finished:
            break
        served.add(net.deliver(0).sender)
    assert "w2" in served
    assert server.calls_spent <= 14


def test_a_search_that_scores_nothing_new_ends() -> None:
    """All rollouts are free (cached): the budget alone would never end it."""
    server, workers = small_machines(dataclasses.replace(DEFAULT, iterations=100_000), calls=100)
    net = Network(server, workers, TableEvaluator(additive_score, cached=True))
    for _ in range(1_000):
        if net.finished:
            break
        net.deliver(0)
    assert net.finished
    assert "nothing new to score" in server.finish_reason


def _free_from_the_third_answer_on(space: Space) -> Network:
    """A run that counts no calls, and in which all that may be drawn is known after three of them."""
    server, workers = small_machines(
        dataclasses.replace(DEFAULT, iterations=100_000), calls=None, space=space
    )
    table = TableEvaluator(additive_score)
    net = Network(server, workers, table)
    for number in range(1_000):
        if net.finished:
            break
        table.cached = number >= 3
        net.deliver(0)
    return net


def test_so_does_one_that_time_alone_would_end() -> None:
    net = _free_from_the_third_answer_on(small_space(3))
    assert net.finished
    assert "nothing new to score" in net.server.finish_reason
    assert 0 < net.server.calls_spent < 100


def test_but_not_while_arms_are_to_join() -> None:
    space = small_space(3)
    late = Space((dataclasses.replace(space.blocks[0], late=1), *space.blocks[1:]))
    net = _free_from_the_third_answer_on(late)
    assert not net.finished
    net.server.receive(ArmsJoined((4,)))
    for _ in range(100):
        if net.finished:
            break
        net.deliver(0)
    assert "nothing new to score" in net.server.finish_reason


def test_pending_tells_what_a_worker_has_in_hand() -> None:
    net = Network(*small_machines(DEFAULT), TableEvaluator(additive_score))
    assert net.workers["w0"].pending is None
    parcel = net.deliver(0)
    assert net.workers["w0"].pending is parcel.event


def test_a_policy_without_a_mixed_derivative_has_planes_without_a_q_part() -> None:
    config = dataclasses.replace(
        DEFAULT, policy="score_function", hypergradient=True, race=False, iterations=12,
        plane_tolerance=1e-3, share_effects=False,
    )  # fmt: skip
    server, workers = toy_machines([AnchoredPolicy(np.array([one, 1.0 - one])) for one in (0.9, 0.2)], config)
    asyncio.run(SimulatedEngine(work_delays()).run(server, workers, NothingToScore()))
    assert server.planes
    assert server.q.size
    assert not any(plane.d.any() for plane in server.planes)


def _demos(allowed: tuple[int, ...]) -> tuple[Space, list[Member]]:
    """One demo slot, with an order that nothing is put into; ``allowed``: the demos open to the first of two workers."""
    arms = (Arm(""), Arm("d:1", "b", shared=False))
    blocks = (
        Block("p/instructions", "p", "instructions", (Arm(""),)),
        Block("p/demos/0", "p", "demo", arms),
        Block("p/order", "p", "order", (Arm(""), Arm("o:1", order=(0,)))),
    )
    return Space(blocks), [Member("a", (allowed, (0, 1)), 5), Member("b", ((0,), (0, 1)), 5)]


def test_where_the_student_is_the_only_program_nothing_is_asked() -> None:
    space, members = _demos(allowed=(0,))
    server = ServerState(space, members, DEFAULT, 100)
    instructions = server.start()
    assert [type(one) for one in instructions] == [Send, Send, Finish]
    assert (server.finish_reason, server.winner) == ("there is nothing to search", space.student)
    server = ServerState(*_demos(allowed=(0, 1)), DEFAULT, 100)
    server.start()
    assert server.phase == "search"
    late = dataclasses.replace(space.blocks[0], arms=(Arm(""), Arm("i:1")), late=1)
    server = ServerState(Space((late, *space.blocks[1:])), members, DEFAULT, 100)
    server.start()
    assert server.phase == "search", "what joins later is a choice"
    assert not any(server.space.has_choice(one.allowed, late=False) for one in members)
