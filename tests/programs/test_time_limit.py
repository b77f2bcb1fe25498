"""Time in which the process stands still counts for no time limit."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import dspy
import pytest
from test_stragglers import evaluator, virtually
from virtual_loop import standing_still

from asyndbt_dspy.lms.call_watch import held_back, on_the_wire, watching_calls
from asyndbt_dspy.programs.paid_rollouts import STOP, RolloutGate, WithdrawnError
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.programs.time_limit import Patience, within


async def steps(*seconds: float) -> str:
    for one in seconds:
        await asyncio.sleep(one)
    return "answer"


def outcome(*seconds: float, limit: float = 60.0, still: tuple[float, float] | None = None) -> Any:
    async def go() -> Any:
        if still is not None:
            standing_still(*still)
        try:
            return await within(limit, steps(*seconds))
        except asyncio.TimeoutError:
            return "late"

    found, seconds = virtually(go())
    return found, round(seconds, 3)


def test_an_answer_in_time_is_returned_and_a_late_one_is_cut_off_at_the_limit() -> None:
    assert outcome(20.0, 30.0) == ("answer", 50.0)
    assert outcome(20.0, 60.0) == ("late", 60.0)


def test_a_process_that_stood_still_gives_its_calls_their_time_once_more() -> None:
    assert outcome(20.0, 30.0, still=(10.0, 300.0)) == ("answer", 340.0)
    assert outcome(20.0, 90.0, still=(10.0, 300.0)) == ("late", 370.0)


def test_a_worker_is_not_set_aside_for_time_in_which_nothing_ran() -> None:
    async def go() -> Any:
        made, runner = evaluator([])
        made.rollout_timeout_s = 60.0

        async def two_calls(*_: Any, **__: Any) -> Rollout:
            await steps(20.0, 30.0)
            return Rollout(1.0)

        runner.run = two_calls  # type: ignore[method-assign]
        standing_still(10.0, 300.0)
        return await made.rollout("w", dspy.Predict("question -> answer"), dspy.Example())

    assert virtually(go())[0].score == 1.0


def test_a_timer_that_is_a_little_late_is_no_such_thing() -> None:
    assert outcome(20.0, 45.0, still=(58.0, 5.0))[0] == "late"


def test_who_waits_may_be_cancelled_and_an_error_comes_through() -> None:
    cancelled: list[bool] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def go() -> None:
        waiting = asyncio.ensure_future(within(60.0, endless()))
        await asyncio.sleep(1.0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert cancelled == [True]

    async def wrong() -> None:
        raise ValueError("no")

    virtually(go())
    with pytest.raises(ValueError, match="no"):
        virtually(within(60.0, wrong()))


async def queued(*seconds: float) -> str:
    """In a queue of ours, and at work, in turns."""
    for place, one in enumerate(seconds):
        if place % 2:
            await asyncio.sleep(one)
        else:
            with held_back():
                await asyncio.sleep(one)
    return "answer"


async def beside_a_call(seconds: float) -> str:
    """One call waits for its turn while another one is with its provider."""

    async def hanging() -> None:
        with on_the_wire():
            await asyncio.sleep(1e6)

    call = asyncio.ensure_future(hanging())
    try:
        return await queued(seconds)
    finally:
        call.cancel()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: queued(300.0, 50.0), ("answer", 350.0)),
        (lambda: queued(0.0, 30.0, 100.0, 20.0, 500.0, 5.0), ("answer", 655.0)),
        (lambda: queued(300.0, 70.0), ("late", 360.0)),
        (lambda: queued(0.0, 30.0, 100.0, 40.0), ("late", 160.0)),
        (lambda: beside_a_call(300.0), ("late", 60.0)),
    ],
)
def test_what_waits_for_its_turn_here_takes_none_of_its_time(call: Any, expected: tuple[str, float]) -> None:
    async def go() -> str:
        with watching_calls(asyncio.get_running_loop().time) as calls:
            try:
                return await within(60.0, call(), calls.held_s)
            except asyncio.TimeoutError:
                return "late"

    found, seconds = virtually(go())
    assert (found, round(seconds, 2)) == expected


def test_a_rollout_that_waits_for_a_rate_limit_is_not_missing() -> None:
    async def go() -> Any:
        made, runner = evaluator([])
        made.rollout_timeout_s = 60.0

        async def five_calls(*_: Any, **__: Any) -> Rollout:
            await queued(*[100.0, 1.0] * 5)
            return Rollout(1.0)

        runner.run = five_calls  # type: ignore[method-assign]
        return await made.rollout("w", dspy.Predict("question -> answer"), dspy.Example())

    assert virtually(go())[0].score == 1.0


def test_a_call_at_its_limit_is_not_looked_at_every_instant_while_it_is_held() -> None:
    """0.3 ms of its time are left: each look would be due 0.3 ms after the last one, for as long as it is held."""
    looks = 0

    async def go() -> str:
        with watching_calls(asyncio.get_running_loop().time) as calls:

            def held_s() -> float:
                nonlocal looks
                looks += 1
                return calls.held_s()

            return await within(60.0, queued(0.0, 59.9997, 500.0, 0.0), held_s)

    with pytest.raises(asyncio.TimeoutError):
        virtually(go())
    assert looks < 10


def patience(gate: RolloutGate, longest_s: float = math.inf) -> Patience:
    return Patience(gate, lambda worker: longest_s)


async def stopped_at(gate: RolloutGate, seconds: float, *, time_is_over: bool = False) -> None:
    await asyncio.sleep(seconds)
    if time_is_over:
        gate.over_since_s = asyncio.get_running_loop().time()
    gate.hold(STOP)


async def asked(seconds: float, wire: float = 0.0, then: float = 0.0) -> str:
    """A call that waits so long for its turn, is on the wire, and waits again for the next one."""
    with held_back():
        await asyncio.sleep(seconds)
    if wire:
        with on_the_wire():
            await asyncio.sleep(wire)
    with held_back():
        await asyncio.sleep(then)
    return "answer"


@pytest.mark.parametrize(
    ("call", "time_is_over", "expected"),
    [
        ((300.0,), False, ("withdrawn", 5.0)),  # stands in a queue
        ((1.0, 20.0), False, ("answer", 21.0)),  # on the wire: ends
        ((1.0, 20.0), True, ("answer", 21.0)),
        ((1.0, 2.0, 30.0), False, ("answer", 33.0)),  # was answered once, which is not lost
        ((1.0, 2.0, 30.0), True, ("withdrawn", 5.0)),  # nor waited for without end
        ((1.0, 10.0, 30.0), True, ("withdrawn", 11.0)),
        ((0.0, 50.0), True, ("withdrawn", 40.0)),  # takes longer than the worker's calls do
        ((0.0, 50.0), False, ("answer", 50.0)),
    ],
)
def test_what_only_waits_for_its_turn_is_taken_back_once_the_run_is_to_stop(
    call: tuple[float, ...], time_is_over: bool, expected: tuple[str, float]
) -> None:
    async def go() -> str:
        gate = RolloutGate()
        stop = asyncio.ensure_future(stopped_at(gate, 5.0, time_is_over=time_is_over))
        with watching_calls(asyncio.get_running_loop().time) as calls:
            async with gate:
                try:
                    return await patience(gate, 40.0).within(60.0, asked(*call), calls)
                except WithdrawnError:
                    return "withdrawn"
                finally:
                    await stop

    found, seconds = virtually(go())
    assert (found, round(seconds)) == expected


def test_what_is_in_flight_ends_soon_after_the_time_is_over_where_nothing_tells_what_is_usual() -> None:
    async def go() -> None:
        gate = RolloutGate()
        stop = asyncio.ensure_future(stopped_at(gate, 5.0, time_is_over=True))
        with watching_calls(asyncio.get_running_loop().time) as calls:
            async with gate:
                with pytest.raises(WithdrawnError):
                    await patience(gate).within(120.0, asked(0.0, 1e6), calls)
        await stop

    assert virtually(go())[1] == pytest.approx(15.0, abs=0.2)


@pytest.mark.parametrize(
    ("call", "is_search", "expected"),
    [
        ((300.0,), True, ("withdrawn", 5.0)),
        ((300.0,), False, ("answer", 300.0)),  # of the race, which goes on
        ((1.0, 20.0), True, ("answer", 21.0)),  # on the wire: paid for anyway
        ((1.0, 2.0, 30.0), True, ("answer", 33.0)),
    ],
)
def test_what_of_the_search_only_waits_is_taken_back_once_the_search_is_over(
    call: tuple[float, ...], is_search: bool, expected: tuple[str, float]
) -> None:
    async def go() -> tuple[str, int]:
        gate = RolloutGate()
        asyncio.get_running_loop().call_later(5.0, gate.end_search)
        with watching_calls(asyncio.get_running_loop().time) as calls:
            async with gate:
                own = patience(gate).within(600.0, asked(*call), calls, is_search=is_search)
                rollout = asyncio.ensure_future(own)
                await asyncio.sleep(4.0)
                working = gate.working
                try:
                    return await rollout, working
                except WithdrawnError:
                    return "withdrawn", working

    (found, working), seconds = virtually(go())
    assert (found, round(seconds)) == expected
    assert working == (len(call) > 1), "what only waits and is to be taken back does nothing"


def test_a_stop_after_the_searchs_end_looks_no_more_often() -> None:
    async def go() -> int:
        gate, looks = RolloutGate(), 0

        def only_waits(_: float | None) -> bool:
            nonlocal looks
            looks += 1
            return False

        async with gate:
            with gate.withdrawable(asyncio.ensure_future(asyncio.sleep(0)), only_waits, is_search=True):
                gate.end_search()
                gate.hold(STOP)
                await asyncio.sleep(1.0)
        return looks

    assert virtually(go())[0] < 25


def test_no_rollout_of_the_search_begins_once_it_is_over() -> None:
    async def go() -> None:
        made, runner = evaluator([])
        begun: list[bool] = []

        async def waiting(*_: Any, **__: Any) -> Rollout:
            begun.append(made.gate.is_search_over)
            await asked(30.0)
            return Rollout(1.0)

        runner.run = waiting  # type: ignore[method-assign]
        asks = dspy.Predict("question -> answer"), dspy.Example()
        early = asyncio.ensure_future(made.rollout("w", *asks, is_search=True))
        await asyncio.sleep(1.0)
        made.gate.end_search()
        late = asyncio.ensure_future(made.rollout("w", *asks, is_search=True))
        race = asyncio.ensure_future(made.rollout("w", *asks))
        for rollout in await asyncio.gather(early, late):
            assert rollout == Rollout(None), "as if the budget had refused it"
        assert made.use("w").missing == 0
        assert asyncio.get_running_loop().time() == pytest.approx(1.0)
        assert (await race).score == 1.0
        assert begun == [False, True]

    virtually(go())


def test_a_rollout_that_is_cancelled_as_it_is_taken_back_is_cancelled() -> None:
    async def go() -> None:
        gate = RolloutGate()
        with watching_calls(asyncio.get_running_loop().time) as calls:
            async with gate:
                rollout = asyncio.ensure_future(patience(gate).within(60.0, asked(300.0), calls))
                await asyncio.sleep(1.0)
                gate.hold(STOP)
                rollout.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await rollout

    virtually(go())


def test_a_rollout_that_was_taken_back_waits_at_the_gate_and_begins_anew() -> None:
    async def go() -> tuple[Rollout, list[float]]:
        made, runner = evaluator([])
        begun: list[float] = []

        async def slow_at_first(*_: Any, **__: Any) -> Rollout:
            begun.append(asyncio.get_running_loop().time())
            await asked(300.0 if len(begun) == 1 else 0.0)
            return Rollout(1.0)

        runner.run = slow_at_first  # type: ignore[method-assign]
        rollout = asyncio.ensure_future(made.rollout("w", dspy.Predict("question -> answer"), dspy.Example()))
        await asyncio.sleep(1.0)
        made.gate.hold(STOP)
        await made.gate.drained()
        await asyncio.sleep(1.0)
        assert not rollout.done()
        assert made.use("w").missing == 0, "it is no failure of the worker"
        made.gate.release(STOP)
        return await rollout, begun

    (rollout, begun), _ = virtually(go())
    assert rollout.score == 1.0
    assert [round(one) for one in begun] == [0, 2]


def test_calls_that_never_end_do_not_hold_the_others_for_ever() -> None:
    """Ten limits after the last call that ended by itself, a place in the queue is worth nothing any more."""

    async def go() -> list[Any]:
        shared, late = patience(RolloutGate()), []
        for first in (1.0, 1e6):
            with watching_calls(asyncio.get_running_loop().time) as calls:
                try:
                    await shared.within(60.0, queued(first), calls)
                except asyncio.TimeoutError:
                    late.append(asyncio.get_running_loop().time())
        return late

    (ended,), _ = virtually(go())
    assert 600.0 < ended <= 1_500.0
