"""Server and workers under dropped, repeated, reordered, late and spoilt messages.

Invariants:

1. z and every p lie on their simplexes; multipliers are >= 0; staleness is at most tau - 1.
2. Calls are conserved: spent + left + kept for the race + under way = budget; never more is spent.
3. Until the run is over, something is under way: there is no state in which all wait for each other.
4. What is refused raises ``ProtocolError`` and changes nothing, in no machine.
5. No private arm is in any message to the server, or in any that leaves it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from asyndbt_dspy.core.config import DEFAULT, PAPER
from asyndbt_dspy.core.messages import (
    Finish,
    RaceReply,
    RaceRequest,
    RoundReply,
    RoundRequest,
    Scored,
    Send,
    StepReply,
    StepRequest,
    StopSearch,
    WorkerLost,
    encode,
)
from asyndbt_dspy.core.policies import Nomination
from asyndbt_dspy.errors import ProtocolError
from asyndbt_dspy.testing.network import SERVER, Network, Parcel, corruptions
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score, small_machines, small_space

BUDGET = 150
SMALL = {"minibatch": 3, "draws": 2, "race_candidates": 3}
CONFIGS = {
    "default": dataclasses.replace(DEFAULT, **SMALL, max_staleness=3),
    "two_of_three": dataclasses.replace(DEFAULT, **SMALL, active_workers=2, max_staleness=2, split_levels=True),
    "paper_with_race": dataclasses.replace(
        PAPER, **SMALL, active_workers=2, max_staleness=2, plane_period=2, lower_rounds=2, race=True, race_fraction=0.4
    ),
    "always_busy": dataclasses.replace(DEFAULT, **SMALL, active_workers=2, max_staleness=2, keep_busy=True),
    "rounds_every_time": dataclasses.replace(PAPER, **SMALL, max_staleness=4, plane_period=1, lower_rounds=1),
    "gradients_with_q": dataclasses.replace(
        DEFAULT, **SMALL, policy="score_function", hypergradient=True, max_staleness=2,
        aggregator="trimmed_mean", trim=1,
    ),
}  # fmt: skip
PRIVATE = 2


def sometimes_missing(worker: str, candidate: tuple[int, ...], example: int, held_out: bool) -> float | None:
    if (example + sum(candidate)) % 7 == 3:
        return None
    return additive_score(worker, candidate, example, held_out)


def network(name: str, seed: int = 0, calls: int | None = BUDGET) -> Network:
    machines = small_machines(
        CONFIGS[name], calls=calls, seed=seed, space=small_space(3, private=[PRIVATE]), examples=7, held_out=5
    )
    return Network(*machines, TableEvaluator(sometimes_missing, cross_entropies=bool(seed % 2)))


def check_invariants(net: Network) -> None:
    server = net.server
    assert server.layout.is_distribution(server.z)
    assert all(server.layout.is_distribution(row) for row in server.p)
    for worker in net.workers.values():
        assert worker.spaces.lower.is_distribution(worker.p)
        assert worker.spaces.upper.is_distribution(worker.q)
    assert all(plane.multiplier >= 0 for plane in server.planes)
    assert max(server.staleness) <= server.config.max_staleness - 1
    assert server.calls_spent <= BUDGET
    check_budget(net)
    assert net.finished == (server.phase == "finished")
    if not net.finished:
        assert net.in_flight
    for parcel in (*net.in_flight[-3:], *net.delivered[-1:]):
        check_privacy(net, parcel)


def check_budget(net: Network) -> None:
    server = net.server
    assert server.calls_left is not None
    if server.race is not None or net.finished:
        return
    asked = server._rounds.asked if server._rounds is not None else set()
    under_way = sum(server.step_calls(number) for number in {*server.roster.outstanding} | asked)
    assert server.calls_left >= 0
    assert server.calls_spent + server.calls_left + server.race_calls + under_way == BUDGET


def check_privacy(net: Network, parcel: Parcel) -> None:
    space = net.server.space
    event = parcel.event
    if parcel.to == SERVER:
        assert f"d:w{PRIVATE}" not in json.dumps(encode(event))
        for nomination in getattr(event, "nominations", ()):
            assert space.is_shared(nomination.candidate)
    elif isinstance(event, RaceRequest):
        assert all(space.is_shared(candidate) for candidate in event.candidates)


def refuse(net: Network, parcel: Parcel) -> None:
    before = json.dumps(net.state())
    posted = list(net.in_flight)
    with pytest.raises(ProtocolError):
        net.hand_over(parcel)
    assert json.dumps(net.state()) == before
    assert net.in_flight == posted


def drain(net: Network, choose: Any) -> None:
    for _ in range(2000):
        if net.finished:
            return
        net.deliver(choose(len(net.in_flight)))
        check_invariants(net)
    pytest.fail("the run does not end")


@pytest.mark.parametrize("name", CONFIGS)
@given(data=st.data())
@settings(
    max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)  # shrinking takes minutes
def test_hostile_network(name: str, data: st.DataObject) -> None:
    net = network(name, seed=data.draw(st.integers(0, 3), "seed"))
    actions = st.sampled_from(["deliver"] * 8 + ["repeat", "spoil", "lose", "stop", "misdirect"])
    late: list[Parcel] = []
    for _ in range(data.draw(st.integers(0, 80), "events")):
        if net.finished:
            break
        action = data.draw(actions)
        place = data.draw(st.integers(0, len(net.in_flight) - 1))
        if action == "deliver":
            net.deliver(place)
        elif action == "repeat" and net.delivered:
            refuse(net, net.delivered[data.draw(st.integers(0, len(net.delivered) - 1))])
        elif action == "spoil":
            parcel = net.in_flight[place]
            wrong = [event for _, event in corruptions(parcel.event)]
            refuse(net, dataclasses.replace(parcel, event=wrong[data.draw(st.integers(0, len(wrong) - 1))]))
        elif action == "misdirect":
            parcel = net.in_flight[place]
            others = [one for one in (SERVER, *net.workers) if one != parcel.to]
            refuse(net, dataclasses.replace(parcel, to=data.draw(st.sampled_from(others))))
        elif action == "lose" and data.draw(st.integers(0, 9)) == 0:
            name_lost = f"w{data.draw(st.integers(0, 2))}"
            if net.server.live[net.server.numbers[name_lost]]:
                late += [one for one in net.in_flight if one.sender == name_lost and one.to == SERVER]
                net.lose(name_lost)
        elif action == "stop" and data.draw(st.integers(0, 9)) == 0:
            left = data.draw(st.none() | st.integers(0, 60))
            race, is_dry = data.draw(st.booleans()), data.draw(st.booleans())
            net.hand_over(Parcel(SERVER, SERVER, StopSearch("interrupted", race, left, is_dry)))
        for parcel in late:
            refuse(net, parcel)
        check_invariants(net)
    rng = np.random.default_rng(data.draw(st.integers(0, 99), "order"))
    drain(net, lambda count: int(rng.integers(count)))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_spoilt_variant_of_every_message_is_refused_in_every_phase(name: str) -> None:
    """Exhaustive where the property test samples: each kind of event in each phase, each field, each way."""
    net = network(name)
    met: set[tuple[str, str]] = set()
    while not net.finished:
        parcel = net.in_flight[0]
        key = (type(parcel.event).__name__, net.server.phase)
        if key not in met:
            met.add(key)
            before = json.dumps(net.state())
            for _, wrong in corruptions(parcel.event):
                with pytest.raises(ProtocolError):
                    net.hand_over(dataclasses.replace(parcel, event=wrong))
            assert json.dumps(net.state()) == before
        net.deliver(0)
    kinds = {kind for kind, _ in met}
    assert {"StepRequest", "StepReply", "Scored"} <= kinds
    assert ("RaceReply" in kinds) == net.server.config.race
    assert ("RoundReply" in kinds) == (not net.server.config.buffered_lower)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_message_of_a_run_is_refused_by_every_machine_once_it_is_over(name: str) -> None:
    net = network(name)
    drain(net, lambda count: 0)
    while net.in_flight:
        net.deliver(0)
    before = json.dumps(net.state())
    for parcel in net.delivered:
        for machine in (SERVER, *net.workers):
            repeated = dataclasses.replace(parcel, to=machine)
            if type(parcel.event).__name__ == "Stop" and machine == parcel.to:
                net.hand_over(repeated)  # being told twice to stop is no error
                continue
            with pytest.raises(ProtocolError):
                net.hand_over(repeated)
    assert json.dumps(net.state()) == before
    refuse(net, Parcel(SERVER, SERVER, StopSearch("late")))


@pytest.mark.parametrize("calls", [0, 1, 5, 6, 17, 18, 40, None])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_budget_leaves_the_run_without_an_end(name: str, calls: int | None) -> None:
    """From no call at all to no bound at all."""
    config = CONFIGS[name]
    machines = small_machines(dataclasses.replace(config, iterations=9), calls=calls, examples=7, held_out=5)
    net = Network(*machines, TableEvaluator(sometimes_missing))
    for _ in range(2000):
        if net.finished:
            break
        net.deliver(len(net.in_flight) // 2)
    assert net.finished
    assert net.server.version <= 9
    assert calls is None or net.server.calls_spent <= calls
    if calls is None:
        assert net.server.version == 9


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("when", range(0, 60, 4))
def test_losing_everybody_ends_the_run_wherever_it_is(name: str, when: int) -> None:
    net = network(name)
    for _ in range(when):
        if not net.finished:
            net.deliver(0)
    for worker in net.workers:
        if not net.finished:
            net.lose(worker)
    assert net.finished
    assert net.server.calls_spent <= BUDGET


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_under_way_at_a_lost_worker_counts_as_spent(name: str) -> None:
    net = network(name)
    for _ in range(400):
        if net.finished:
            break
        parcel = net.in_flight[0]
        if isinstance(parcel.event, (StepRequest, RoundRequest, RaceRequest)) and parcel.to == "w1":
            spent = net.server.calls_spent
            units = net.server.race.outstanding.values() if net.server.race is not None else []
            held = sum(len(one.candidates) * len(one.examples) for one in units if one.worker == "w1")
            copy = network(name)
            while len(copy.delivered) < len(net.delivered):
                copy.deliver(0)
            copy.lose("w1")
            kind = type(parcel.event).__name__
            due = held if kind == "RaceRequest" else copy.server.step_calls(1)
            assert copy.server.calls_spent == spent + due, kind
        net.deliver(0)
    assert net.finished


@pytest.mark.parametrize(
    "wrong",
    [
        Nomination((0, 5, 0), -0.1, 0.1, 3),  # a private demo
        Nomination((0, 99, 0), -0.1, 0.1, 3),
        Nomination((0, 0), -0.1, 0.1, 3),
        Nomination((0, 1.5, 0), -0.1, 0.1, 3),  # type: ignore[arg-type]
        Nomination((0, 1, 0), float("nan"), 0.1, 3),
        Nomination((0, 1, 0), -0.1, float("inf"), 3),
        "no nomination",
    ],
    ids=str,
)
def test_nominations_that_must_not_be_made(wrong: Any) -> None:
    net = network("default")
    while not isinstance(net.in_flight[0].event, StepReply):
        net.deliver(0)
    parcel = net.in_flight[0]
    refuse(net, dataclasses.replace(parcel, event=dataclasses.replace(parcel.event, nominations=(wrong,))))


def test_a_q_that_should_have_stayed_at_home_is_refused() -> None:
    net = network("default")
    while not isinstance(net.in_flight[0].event, StepReply):
        net.deliver(0)
    parcel = net.in_flight[0]
    worker = net.workers[parcel.sender]
    refuse(net, dataclasses.replace(parcel, event=dataclasses.replace(parcel.event, upper=worker.q)))


def test_a_message_that_is_too_late_is_refused() -> None:
    """The server never lets it come to that; a worker that answers a request of long ago is refused all the same."""
    net = network("default")
    while not isinstance(net.in_flight[0].event, StepReply):
        net.deliver(0)
    parcel = net.in_flight[0]
    net.server.version += net.server.config.max_staleness
    with pytest.raises(ProtocolError, match="3 updates late; the bound is 2"):
        net.server.receive(parcel.event)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_was_sent_does_not_change_afterwards(name: str) -> None:
    """Machines of one process hand over arrays, not copies: none of them may be written to later."""
    net, posted = network(name), []
    while not net.finished:
        known = {id(parcel) for parcel, _ in posted}
        posted += [(one, json.dumps(encode(one.event))) for one in net.in_flight if id(one) not in known]
        net.deliver(0)
    assert len(posted) > 50
    assert all(json.dumps(encode(parcel.event)) == text for parcel, text in posted)


@pytest.mark.parametrize("event", [None, "message", Finish("done"), 3], ids=str)
def test_what_is_no_event_at_all(event: Any) -> None:
    net = network("default")
    for machine in (SERVER, "w0"):
        refuse(net, Parcel(machine, SERVER, event))


def test_nothing_is_received_before_the_start_and_there_is_one_start() -> None:
    server, _ = small_machines(CONFIGS["default"])
    with pytest.raises(ProtocolError, match="before start"):
        server.receive(WorkerLost("w0", "early"))
    server.start()
    with pytest.raises(ProtocolError, match="started already"):
        server.start()


def test_who_was_set_aside_is_heard_no_more() -> None:
    net = network("default")
    net.deliver(0)
    assert isinstance(net.in_flight[-1].event, Scored)
    [sent] = [one for one in net.workers["w0"].receive(net.in_flight[-1].event) if isinstance(one, Send)]
    net.server.receive(WorkerLost("w0", "gone"))
    before = net.server.snapshot()
    for event in (sent.message, WorkerLost("w0", "again")):
        with pytest.raises(ProtocolError, match=f"'w0' was set aside and sent a {type(event).__name__}"):
            net.server.receive(event)
    assert net.server.snapshot() == before


def test_a_request_that_comes_twice_is_refused_before_and_after_its_answer() -> None:
    net = network("default")
    request, worker = net.in_flight[0].event, net.workers["w0"]
    assert isinstance(request, StepRequest)
    net.deliver(0)
    with pytest.raises(ProtocolError, match="'w0' has a StepRequest in hand and got another StepRequest"):
        worker.receive(request)
    net.deliver(len(net.in_flight) - 1)
    before = worker.snapshot()
    with pytest.raises(ProtocolError, match=r"is a repetition or late: .* after "):
        worker.receive(request)
    assert worker.pending is None and worker.snapshot() == before


def test_refusals_say_what_came_and_what_was_due() -> None:
    net = network("paper_with_race")
    with pytest.raises(ProtocolError, match="unknown worker 'nobody'; known: \\['w0', 'w1', 'w2'\\]"):
        net.server.receive(WorkerLost("nobody", ""))
    net.deliver(0)
    scored = net.in_flight[-1].event
    assert isinstance(scored, Scored)
    with pytest.raises(ProtocolError, match="waits for task 1, got 7"):
        net.workers["w0"].receive(dataclasses.replace(scored, task=7))
    with pytest.raises(ProtocolError, match="waits for task None, got 1"):
        net.workers["w1"].receive(dataclasses.replace(scored, worker="w1"))
    with pytest.raises(ProtocolError, match="owes no step"):
        drain_to_reply(net, "w0")
    with pytest.raises(ProtocolError, match="owes no round"):
        net.server.receive(RoundReply("w1", 0, 0, net.server.z, 0))
    with pytest.raises(ProtocolError, match="owes no race unit"):
        net.server.receive(RaceReply("w1", 1, (), (), 0))


def drain_to_reply(net: Network, worker: str) -> None:
    """Deliver the worker's first answer twice."""
    while not any(isinstance(one.event, StepReply) for one in net.in_flight):
        net.deliver([one.to for one in net.in_flight].index(worker))
    place = [type(one.event) for one in net.in_flight].index(StepReply)
    parcel = net.deliver(place)
    net.hand_over(parcel)
