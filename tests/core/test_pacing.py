"""Who is slow, as the order of answers tells, and what follows from it for search and race."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT, AlgorithmConfig
from asyndbt_dspy.core.messages import RaceReply, RaceRequest, Scored, StepReply, StepRequest
from asyndbt_dspy.core.pacing import Paces, Synchrony
from asyndbt_dspy.core.racing import RaceState
from asyndbt_dspy.engines.meter import RunMeter
from asyndbt_dspy.engines.protocols import Recorded, replay
from asyndbt_dspy.engines.simulated import Delays, SimulatedEngine, lognormal_delays, work_delays
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score, small_machines

THREE_OF_FOUR = dataclasses.replace(DEFAULT, active_workers=3)


def observed(seconds: list[int], rounds: int = 40, config: AlgorithmConfig = THREE_OF_FOUR) -> Paces:
    """Workers answer every so many ticks, each at once asked again."""
    paces = Paces(len(seconds), config)
    for number in range(len(seconds)):
        paces.hand_out(number)
    for tick in range(1, rounds + 1):
        for number, every in enumerate(seconds):
            if tick % every == 0:
                paces.take_back(number, 6)
                paces.hand_out(number)
    paces.refresh()
    return paces


def test_the_slow_one_is_known_by_what_the_others_did_meanwhile() -> None:
    paces = observed([1, 1, 1, 4])
    assert [paces.speed(number) for number in range(3)] == [1.0, 1.0, 1.0]
    assert paces.speed(3) == pytest.approx(1 / 4, rel=0.15)


def test_a_little_slower_is_not_slow_and_the_fewer_the_answers_the_more_it_takes() -> None:
    assert observed([2, 2, 2, 3]).speed(3) == 1.0
    assert observed([1, 1, 1, 3], rounds=5).speed(3) == 1.0  # one answer
    assert observed([1, 1, 1, 3], rounds=12).speed(3) < 0.5
    assert observed([1, 1, 1, 8], rounds=10).speed(3) < 0.25  # one answer, but what an answer


def test_who_never_answered_is_slow_by_what_it_has_in_hand() -> None:
    assert observed([1, 1, 1, 99], rounds=3).speed(3) == 1.0
    assert observed([1, 1, 1, 99], rounds=30).speed(3) < 0.1
    assert observed([9, 9], rounds=5, config=dataclasses.replace(DEFAULT, active_workers=1)).speed(1) == 1.0


def test_who_is_gone_or_answers_unasked_counts_for_nothing() -> None:
    paces = observed([1, 1, 1, 4])
    paces.forget(3)
    paces.take_back(3, 6)
    assert paces.speed(3) == 1.0


@pytest.mark.parametrize("changes", [{"active_workers": 4}, {"balance": False}])
def test_nothing_is_noted_where_it_would_not_be_used(changes: dict[str, Any]) -> None:
    assert observed([1, 1, 1, 4], config=dataclasses.replace(DEFAULT, **changes)).speed(3) == 1.0


# ------------------------------------------------------------------------------------------------------ S and tau

AUTO = dataclasses.replace(DEFAULT, active_workers=9, max_staleness=15, auto_active=True)


def test_the_slowest_worker_is_known_in_answers() -> None:
    assert observed([1, 1, 1, 4], config=AUTO).slowest == pytest.approx(14, abs=2)
    assert Paces(3, AUTO).slowest == 0.0


def test_what_a_slow_worker_has_in_hand_counts_before_it_has_answered() -> None:
    """S would else be small until the bound on staleness holds everybody up, for as long as it takes."""
    paces = observed([1, 1, 1, 99], rounds=40, config=AUTO)
    steps = 3 * 40 * 6 / (AUTO.draws * AUTO.minibatch)  # whole ones
    assert paces.slowest == pytest.approx(steps, rel=0.05)


def test_automatic_s_is_as_small_as_staleness_allows() -> None:
    synchrony = Synchrony(AUTO)
    for slowest, active in ((0.0, 9), (3.0, 1), (18.0, 3), (70.0, 10), (900.0, 18)):
        synchrony.adapt(slowest, 18, 0)
        assert (synchrony.active, synchrony.staleness) == (active, 15)


def test_automatic_tau_follows_a_straggler_and_comes_back() -> None:
    synchrony = Synchrony(
        dataclasses.replace(DEFAULT, active_workers=2, max_staleness=15, auto_staleness=True)
    )
    taus = []
    for slowest, oldest in ((5.0, 0), (40.0, 20), (900.0, 40), (5.0, 50), (5.0, 3)):
        synchrony.adapt(slowest, 4, oldest)
        taus.append(synchrony.staleness)
    assert taus == [15, 41, 60, 51, 15]


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_runs_stay_within_the_bound_in_force(seed: int) -> None:
    config = dataclasses.replace(AUTO, active_workers=3, max_staleness=3, auto_staleness=True, keep_busy=True)
    server, meter, events = simulated(config, lognormal_delays(1.0, 1.0, seed, {"w4": 6.0}))
    assert sum(isinstance(one.event, StepReply) for one in events) < 5 * server.version, "S was below R"
    assert 2 < meter.largest_staleness < 12


# --------------------------------------------------------------------------------------------------- the search


def simulated(config: AlgorithmConfig, delays: Delays, workers: int = 5, calls: int = 900) -> Any:
    def machines() -> Any:
        return small_machines(config, workers=workers, calls=calls, examples=12, held_out=8)

    server, states = machines()
    meter, events = RunMeter(server), list[Recorded]()
    engine = SimulatedEngine(delays)
    asyncio.run(engine.run(server, states, TableEvaluator(additive_score), [meter, events.append]))
    again, fresh = machines()
    replay(events, again, fresh)
    assert again.snapshot() == server.snapshot()
    return server, meter, events


def test_answers_that_the_bound_keeps_from_an_update_are_known_at_the_end() -> None:
    """One worker holds up every update, and all calls are made: neither it nor an update is waited for."""
    config = dataclasses.replace(DEFAULT, active_workers=1, max_staleness=3, keep_busy=True)
    server, meter, _ = simulated(config, work_delays({"w4": 1e6}), calls=150)
    assert meter.search_end_s < 1e6
    assert server.arrived, "no update took these in"
    for number, reply in server.arrived.items():
        np.testing.assert_array_equal(server.p[number], reply.lower)
        np.testing.assert_array_equal(server.effects.factors[number], reply.effects)


@pytest.mark.parametrize("seed", range(3))
def test_nobody_waits_where_everybody_is_kept_busy(seed: int) -> None:
    config = dataclasses.replace(DEFAULT, active_workers=3, max_staleness=4)
    waiting = simulated(config, lognormal_delays(1.0, 1.0, seed, {"w4": 4.0}))[1]
    server, busy, events = simulated(
        dataclasses.replace(config, keep_busy=True), lognormal_delays(1.0, 1.0, seed, {"w4": 4.0})
    )
    assert busy.search_end_s < waiting.search_end_s
    assert busy.utilisation > waiting.utilisation
    assert 1 <= busy.largest_staleness <= 3
    repeats = [one.event.repeat for one in events if isinstance(one.event, StepRequest)]
    assert 1 <= max(repeats) <= 3
    assert server.calls_spent <= 900


def test_two_answers_of_one_worker_make_an_update_where_it_is_kept_busy() -> None:
    config = dataclasses.replace(DEFAULT, active_workers=2, max_staleness=60, balance=False)
    delays = work_delays({f"w{number}": 100.0 for number in range(1, 5)})
    _, _, waiting = simulated(config, delays, calls=200)
    server, _, busy = simulated(dataclasses.replace(config, keep_busy=True), delays, calls=200)

    def of_others_first(events: list[Recorded]) -> float:
        return next(
            one.time_s for one in events if isinstance(one.event, StepReply) and one.event.worker != "w0"
        )

    begun = [one for one in busy if isinstance(one.event, StepRequest) and one.time_s < of_others_first(busy)]
    assert [one.event.version for one in begun if one.event.worker == "w0"][:5] == [0, 0, 1, 1, 2]
    alone = [one for one in waiting if isinstance(one.event, StepRequest) and one.event.worker == "w0"]
    assert [one.event.version for one in alone if one.time_s < of_others_first(waiting)] == [0]
    assert server.calls_spent <= 200


def test_the_search_ends_while_a_slow_worker_still_has_a_step_under_way() -> None:
    config = dataclasses.replace(DEFAULT, active_workers=2, max_staleness=60, policy="score_function")
    delays = work_delays({"w4": 7.0})
    fast, slow = (
        simulated(dataclasses.replace(config, balance=balance), delays, calls=1600)
        for balance in (True, False)
    )
    assert fast[1].search_end_s < slow[1].search_end_s - 30
    opened = next(one.time_s for one in slow[2] if isinstance(one.event, RaceRequest))
    assert opened == slow[1].search_end_s


@pytest.mark.parametrize(
    ("keep_busy", "balance", "left_behind"), [(True, True, 2), (True, False, 1), (False, True, 0)]
)
def test_where_nobody_waits_the_race_begins_while_few_of_five_work_on_their_last_steps(
    keep_busy: bool, balance: bool, left_behind: int
) -> None:
    """More of them where their last steps are short."""
    config = dataclasses.replace(
        DEFAULT, active_workers=3, max_staleness=60, balance=balance, keep_busy=keep_busy
    )
    server, _, events = simulated(config, lognormal_delays(1.0, 0.3, 0))
    opened = next(one.time_s for one in events if isinstance(one.event, RaceRequest))
    late = [one for one in events if isinstance(one.event, StepReply) and one.time_s > opened]
    assert len(late) == left_behind
    assert server.calls_spent <= 900


@pytest.mark.parametrize("balance", [True, False])
def test_a_slow_worker_gets_smaller_units(balance: bool) -> None:
    config = dataclasses.replace(DEFAULT, active_workers=2, balance=balance)
    _, _, events = simulated(config, work_delays({"w4": 7.0}), calls=1600)
    asked: dict[str, int] = {}
    sizes: dict[str, list[int]] = {"w0": [], "w4": []}
    for event in (one.event for one in events):
        if isinstance(event, StepRequest | RaceRequest):
            asked[event.worker] = event.minibatch if isinstance(event, StepRequest) else -1
        elif isinstance(event, Scored) and asked[event.worker] >= 0 and event.worker in sizes:
            width = {len(row) for row in event.outcomes}
            assert width == {asked[event.worker] or config.minibatch}
            sizes[event.worker] += width
    assert set(sizes["w0"]) == {6}
    assert sizes["w4"][0] == 6, "nothing is known of it yet"
    assert set(sizes["w4"][1:]) == ({2} if balance else {6})


@pytest.mark.parametrize(("minibatch", "speed", "size"), [(6, 0.5, 3), (6, 0.1, 2), (6, 1.0, 6), (1, 0.1, 1)])
def test_units_shrink_to_two_examples_and_no_further(minibatch: int, speed: float, size: int) -> None:
    paces = observed([1, 1, 1, round(1 / speed)], config=dataclasses.replace(DEFAULT, minibatch=minibatch))
    assert paces.minibatch(3) == size


@pytest.mark.parametrize(("keep_busy", "balance"), [(True, True), (True, False), (False, True)])
def test_the_last_steps_are_short_where_nobody_waits(keep_busy: bool, balance: bool) -> None:
    config = dataclasses.replace(DEFAULT, active_workers=3, keep_busy=keep_busy, balance=balance)
    server, _, events = simulated(
        config, work_delays({f"w{number}": 1.0 + number / 10 for number in range(5)})
    )
    sizes = [one.event.minibatch or config.minibatch for one in events if isinstance(one.event, StepRequest)]
    first_short = next((number for number, size in enumerate(sizes) if size < 6), len(sizes))
    short = len(sizes) - first_short
    assert set(sizes[:first_short]) == {6}
    assert set(sizes[first_short:]) == ({2} if keep_busy and balance else set())
    # The last step of each of five workers, 12 rollouts, in units of 4.
    assert short == (pytest.approx(15, abs=3) if keep_busy and balance else 0)
    assert server.calls_spent <= 900


@pytest.mark.parametrize(
    ("calls_left", "living", "size"), [(None, 5, 6), (60, 5, 6), (59, 5, 2), (12, 1, 6), (11, 1, 2)]
)
def test_a_last_step_is_one_for_which_less_than_a_whole_one_is_left_each(
    calls_left: int | None, living: int, size: int
) -> None:
    paces = observed([1] * living, config=dataclasses.replace(THREE_OF_FOUR, keep_busy=True))
    assert paces.minibatch(0, calls_left, living) == size


def test_the_barrier_form_has_units_of_one_size() -> None:
    assert observed([1, 1, 1, 8], config=dataclasses.replace(DEFAULT, buffered_lower=False)).minibatch(3) == 6


# --------------------------------------------------------------------------------------------------- the race


def race(speeds: dict[str, float], calls: int = 96) -> RaceState:
    holdings = dict.fromkeys(("a", "b", "c"), 24)
    return RaceState(
        (0,), [(1,)], holdings, calls, AlgorithmConfig(race_candidates=1), chunk=8, speeds=speeds
    )


def finish(state: RaceState, seconds: dict[str, float]) -> tuple[float, dict[str, int]]:
    """Let workers take units until the race is over; returns when, and how many examples each scored."""
    free, scored = dict.fromkeys(seconds, 0.0), dict.fromkeys(seconds, 0)
    under_way: dict[str, Any] = {}
    now = 0.0
    while not state.done:
        for worker in seconds:
            unit = None if worker in under_way else state.assign(worker)
            if unit is not None:
                under_way[worker], free[worker] = unit, now + seconds[worker] * len(unit.examples)
        worker = min(under_way, key=lambda one: free[one])
        now, unit = free[worker], under_way.pop(worker)
        scored[worker] += len(unit.examples)
        rows = tuple(tuple(1.0 for _ in unit.examples) for _ in unit.candidates)
        state.receive(RaceReply(worker, unit.unit, rows, rows, 2 * len(unit.examples)))
    return now, scored


def test_the_race_is_spread_by_speed() -> None:
    slow = {"a": 1.0, "b": 1.0, "c": 8.0}
    even, _ = finish(race({}), slow)
    told, scored = finish(race({"c": 0.125}), slow)
    assert (told, even) == (24.0, 128.0)
    assert scored == {"a": 23, "b": 22, "c": 3}


def test_who_holds_few_examples_leaves_its_surplus_to_the_others() -> None:
    state = RaceState(
        (0,), [(1,)], {"a": 4, "b": 40}, 64, AlgorithmConfig(race_candidates=1), speeds={"b": 0.01}
    )
    assert state.quota == {"a": 4, "b": 28}


def test_the_race_does_not_wait_for_what_a_slow_worker_has_not_begun() -> None:
    """c's step still runs when the race opens: a and b score their part, and that is enough."""
    state = race({"c": 0.25})
    scored = 0
    for _ in range(20):
        for worker in ("a", "b"):
            unit = state.assign(worker)
            if unit is not None:
                rows = tuple(tuple(1.0 for _ in unit.examples) for _ in unit.candidates)
                state.receive(RaceReply(worker, unit.unit, rows, rows, 2 * len(unit.examples)))
                scored += len(unit.examples)
    assert state.done
    assert scored == 42
