"""Time in which the process stands still counts for no time limit."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest
from test_stragglers import evaluator, virtually
from virtual_loop import standing_still

from asyndbt_dspy.lms.call_watch import held_back, on_the_wire, watching_calls
from asyndbt_dspy.programs.paid_rollouts import STOP
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


@pytest.mark.parametrize(("stops", "score"), [(False, 1.0), (True, None)])
def test_a_rollout_that_waits_for_a_rate_limit_is_not_missing_unless_the_run_is_to_stop(
    stops: bool, score: float | None
) -> None:
    async def go() -> Any:
        made, runner = evaluator([])
        made.rollout_timeout_s = 60.0

        async def five_calls(*_: Any, **__: Any) -> Rollout:
            await queued(*[100.0, 1.0] * 5)
            return Rollout(1.0)

        runner.run = five_calls  # type: ignore[method-assign]
        rollout = asyncio.ensure_future(made.rollout("w", dspy.Predict("question -> answer"), dspy.Example()))
        await asyncio.sleep(1.0)
        if stops:
            made.gate.hold(STOP)
        return await rollout

    rollout, seconds = virtually(go())
    assert rollout.score == score
    assert not stops or seconds < 61.0


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


@pytest.mark.parametrize(("stops", "expected"), [(True, 60.0), (False, 300.0)])
def test_nobody_is_waited_for_in_a_queue_once_the_run_is_to_stop(stops: bool, expected: float) -> None:
    async def go() -> None:
        with watching_calls(asyncio.get_running_loop().time) as calls:
            await Patience(lambda: stops).within(60.0, queued(300.0), calls.held_s)

    if stops:
        with pytest.raises(asyncio.TimeoutError):
            virtually(go())
    else:
        assert round(virtually(go())[1], 2) == expected


def test_calls_that_never_end_do_not_hold_the_others_for_ever() -> None:
    """Ten limits after the last call that ended by itself, a place in the queue is worth nothing any more."""

    async def go() -> list[Any]:
        patience, late = Patience(lambda: False), []
        for first in (1.0, 1e6):
            with watching_calls(asyncio.get_running_loop().time) as calls:
                try:
                    await patience.within(60.0, queued(first), calls.held_s)
                except asyncio.TimeoutError:
                    late.append(asyncio.get_running_loop().time())
        return late

    (ended,), _ = virtually(go())
    assert 600.0 < ended <= 1_500.0
