"""A search whose budget is gone (``StopSearch``): what is under way counts, and the race is as long as is paid for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from asyndbt_dspy.core.config import DEFAULT, PAPER, AlgorithmConfig
from asyndbt_dspy.core.messages import RaceRequest, RoundRequest, StepRequest, StopSearch
from asyndbt_dspy.testing.network import SERVER, Network, Parcel
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score, small_machines

SPENT = StopSearch("spent", calls=30, is_dry=True)


def searching(config: AlgorithmConfig = DEFAULT, **machines: Any) -> Network:
    """A run without a number of calls, in the middle of its search, with every worker's step under way."""
    net = Network(*small_machines(config, calls=None, **machines), TableEvaluator(additive_score))
    while net.server.version < 3 or len(net.server.roster.outstanding) < 3:
        net.deliver(0)
    return net


def stop(net: Network, event: StopSearch) -> None:
    net.hand_over(Parcel(SERVER, SERVER, event))


def steps_sent(net: Network) -> int:
    return sum(isinstance(one.event, StepRequest) for one in [*net.in_flight, *net.delivered])


def test_steps_under_way_are_waited_for_and_count() -> None:
    net = searching()
    known, sent = dict(net.server.nominations), steps_sent(net)
    stop(net, SPENT)
    assert net.server.phase == "search"
    while net.server.phase == "search":
        net.deliver(0)
    assert net.server.phase == "race"
    assert steps_sent(net) == sent, "none is sent any more"
    changed = [number for number, one in net.server.nominations.items() if one != known.get(number)]
    assert len(changed) >= 2, "their answers were taken: at most one of three is left behind"


@pytest.mark.parametrize("calls", [0, 13, 30, 100])
def test_the_race_is_as_long_as_is_paid_for(calls: int) -> None:
    net = searching()
    stop(net, dataclasses.replace(SPENT, calls=calls))
    asked = 0
    while not net.finished:
        parcel = net.deliver(0)
        if isinstance(parcel.event, RaceRequest):
            asked += len(parcel.event.candidates) * len(parcel.event.examples)
    assert net.server.finish_reason == "spent"
    assert asked <= calls
    race = net.server.race
    assert race is not None
    if calls >= 13:
        assert asked >= calls / 2
        assert len(race.candidates) == max(2, min(8, calls // 12)), "as many as so few can tell apart"
        assert race.standings()[0].count >= 6


def test_a_smaller_share_of_metric_calls_stays() -> None:
    net = Network(*small_machines(DEFAULT, calls=100), TableEvaluator(additive_score))
    net.deliver(0)
    stop(net, dataclasses.replace(SPENT, calls=1000))
    while not net.finished:
        net.deliver(0)
    assert net.server.calls_spent <= 100


def test_time_and_an_interrupt_still_end_it_at_once() -> None:
    net = searching()
    stop(net, SPENT)
    stop(net, StopSearch("time"))
    assert (net.server.phase, net.server.finish_reason) == ("race", "time")
    assert net.server.race is not None and len(net.server.race.candidates) == 2, (
        "what is left is as known before"
    )
    net = searching()
    stop(net, SPENT)
    stop(net, StopSearch("interrupt", race=False))
    assert (net.server.phase, net.server.finish_reason) == ("finished", "interrupt")


def test_being_told_twice_changes_nothing() -> None:
    net = searching()
    stop(net, SPENT)
    before = net.server.snapshot()
    stop(net, SPENT)
    assert net.server.snapshot() == before


def test_when_the_last_worker_under_way_is_lost_the_race_begins() -> None:
    net = searching()
    stop(net, SPENT)
    for name in ("w0", "w1"):
        net.lose(name)
    assert net.server.phase in ("search", "race")
    while net.server.phase == "search":
        net.deliver(0)
    assert net.server.phase == "race"


def test_without_a_race_the_program_is_decoded_from_all_answers() -> None:
    net = searching(dataclasses.replace(DEFAULT, race=False))
    stop(net, SPENT)
    assert net.server.phase == "search"
    while not net.finished:
        net.deliver(0)
    assert net.server.race is None
    assert net.server.finish_reason == "spent"


def test_a_round_that_runs_ends_first_and_no_other_begins() -> None:
    config = dataclasses.replace(PAPER, race=True, race_fraction=0.4, lower_rounds=3, plane_period=1)
    net = Network(*small_machines(config, calls=None), TableEvaluator(additive_score))
    while net.server.phase != "rounds":
        net.deliver(0)
    stop(net, SPENT)
    while net.server.phase != "race":
        parcel = net.deliver(0)
        assert not (isinstance(parcel.event, RoundRequest) and parcel.event.number > 1)
    while not net.finished:
        net.deliver(0)
    assert net.server.finish_reason == "spent"


def test_no_round_begins_in_what_follows() -> None:
    config = dataclasses.replace(PAPER, race=True, race_fraction=0.4, plane_period=1, active_workers=3)
    net = Network(*small_machines(config, calls=None), TableEvaluator(additive_score))
    net.deliver(0)
    stop(net, SPENT)
    while not net.finished:
        net.deliver(0)
    assert not any(isinstance(one.event, RoundRequest) for one in net.delivered)
