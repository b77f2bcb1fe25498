"""Rate limits: long windows on a virtual clock, threads and loops together on the real one."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
from arrivals import assert_rate
from metering import until
from virtual_loop import run_virtually

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.endpoints import Endpoints, endpoint_address, endpoint_key
from asyndbt_dspy.lms.limits import EndpointGate, LimiterName, RateLimits, make_pace
from asyndbt_dspy.lms.scripted import scripted_lm
from asyndbt_dspy.testing.provider import most_in_window


async def send(gate: EndpointGate, count: int, tokens: float = 0.0) -> list[float]:
    """Times at which ``count`` attempts, all asked for at once, went out."""
    times: list[float] = []

    async def one() -> None:
        await gate.enter(tokens)
        times.append(asyncio.get_running_loop().time())
        gate.leave()

    await asyncio.gather(*[one() for _ in range(count)])
    return times


@pytest.mark.parametrize("per_minute", [600, 60, 59, 45, 7, 100, 6000])
def test_no_minute_has_more_requests_than_allowed_and_the_quota_is_used(per_minute: int) -> None:
    async def run() -> list[float]:
        return await send(EndpointGate(RateLimits(requests_per_minute=per_minute)), count=per_minute * 3)

    times, _ = run_virtually(run())
    a_seconds_worth = per_minute / 60
    assert most_in_window(times, 60.0) <= per_minute + a_seconds_worth
    in_two_minutes = sum(one < 120 for one in times)
    assert in_two_minutes >= 0.95 * 2 * per_minute - 1


def test_a_pause_does_not_save_up_quota() -> None:
    """After an idle minute no more than a second's worth goes out at once: no double quota around an edge."""

    async def run() -> list[float]:
        gate = EndpointGate(RateLimits(requests_per_minute=600))
        first = await send(gate, 600)
        await asyncio.sleep(90)
        return first + await send(gate, 600)

    times, _ = run_virtually(run())
    assert most_in_window(times, 60.0) <= 610
    assert most_in_window(times, 1.0) <= 21


@pytest.mark.parametrize("tokens", [30, 500, 2500, 25_000])
def test_tokens_of_a_minute(tokens: int) -> None:
    """Also where one call is more than a second's worth, or more than a minute's."""
    per_minute = 60_000
    count = 240_000 // tokens

    async def run() -> list[float]:
        gate = EndpointGate(RateLimits(tokens_per_minute=per_minute))
        return await send(gate, count, tokens)

    times, took_s = run_virtually(run())
    calls = per_minute / tokens
    assert most_in_window(times, 60.0) <= calls + max(1, calls / 60) + 1
    assert took_s == pytest.approx(count * tokens / 1000, rel=0.05)


def test_measured_tokens_make_the_guess_good() -> None:
    """Announced as 1,000 each and measured as 100: the gate learns to let ten times as many through."""

    async def run() -> float:
        gate = EndpointGate(RateLimits(tokens_per_minute=60_000))
        for _ in range(600):
            await gate.enter(1000)
            gate.leave(tokens_over=-900)
        return asyncio.get_running_loop().time()

    took_s, _ = run_virtually(run())
    assert took_s == pytest.approx(60, rel=0.1)


@pytest.mark.parametrize("limiter", ["aiolimiter", "asyncio-throttle"])
def test_both_limiters_keep_the_rate_in_real_time(limiter: LimiterName) -> None:
    async def run() -> list[float]:
        return await send(EndpointGate(RateLimits(1200, limiter=limiter)), count=120)

    assert_rate(asyncio.run(run()), 20)


def test_throttle_admits_weights() -> None:
    async def run() -> float:
        pace = make_pace(6000, "asyncio-throttle", is_weighted=True)  # 99 tokens a second
        start_s = time.monotonic()
        for _ in range(3):
            await pace.acquire(60)
        return time.monotonic() - start_s

    assert 0.7 <= asyncio.run(run()) <= 4.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"requests_per_minute": 0}, "requests_per_minute=0 must be > 0"),
        ({"tokens_per_minute": -5}, "tokens_per_minute=-5 must be > 0"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute=nan"),
        ({"limiter": "mine"}, "limiter='mine' is none of"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        RateLimits(**settings)


# -- 429


def test_retry_after_holds_everybody_back() -> None:
    async def run() -> list[float]:
        gate = EndpointGate(RateLimits())
        await gate.enter(0)
        gate.refused(30.0, started_s=0.0)
        gate.leave()
        return await send(gate, 5)

    times, _ = run_virtually(run())
    assert min(times) >= 30.0


def test_pauses_double_while_the_endpoint_keeps_refusing_and_end_with_an_answer() -> None:
    async def run() -> list[float]:
        gate, pauses = EndpointGate(RateLimits()), []
        for _ in range(9):
            before_s = gate.now()
            await gate.enter(0)
            pauses.append(gate.now() - before_s)
            gate.refused(None, started_s=gate.now())
            gate.leave()
        await gate.enter(0)
        gate.answered()
        gate.leave()
        await gate.enter(0)
        gate.refused(None, started_s=gate.now())
        gate.leave()
        before_s = gate.now()
        await gate.enter(0)
        return [*pauses, gate.now() - before_s]

    pauses, _ = run_virtually(run())
    assert pauses == pytest.approx([0, 1, 2, 4, 8, 16, 32, 60, 60, 1], abs=0.01)


def test_an_endpoint_that_copes_with_ten_is_given_about_ten() -> None:
    """Above ten in flight this endpoint answers 429; 40 callers find that out, and few of their calls are refused."""

    async def run() -> tuple[int, int, bool]:
        gate, in_flight, refused, answers = EndpointGate(RateLimits()), 0, 0, 0

        async def caller() -> None:
            nonlocal in_flight, refused, answers
            for _ in range(50):
                await gate.enter(0)
                started_s, is_too_much = gate.now(), in_flight >= 10
                in_flight += 1
                await asyncio.sleep(0.01 if is_too_much else 0.5)
                in_flight -= 1
                if is_too_much:
                    refused += 1
                    gate.refused(None, started_s)
                else:
                    answers += 1
                    gate.answered()
                gate.leave()

        await asyncio.gather(*[caller() for _ in range(40)])
        return refused, answers, gate.in_flight == 0

    (refused, answers, is_empty), _ = run_virtually(run())
    assert is_empty
    assert refused + answers == 2000
    assert refused < 0.1 * answers


def test_a_wave_of_refusals_halves_once() -> None:
    async def run() -> float:
        gate = EndpointGate(RateLimits())
        for _ in range(16):
            await gate.enter(0)
        for _ in range(16):
            gate.refused(None, started_s=0.0)
            gate.leave()
            await asyncio.sleep(0.001)
        return gate.most_in_flight

    most, _ = run_virtually(run())
    assert most == 8.0


def test_who_is_cancelled_while_waiting_takes_nothing() -> None:
    async def run() -> int:
        gate = EndpointGate(RateLimits(requests_per_minute=60))
        waiting = [asyncio.ensure_future(gate.enter(0)) for _ in range(10)]
        await asyncio.sleep(2.5)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return gate.in_flight

    in_flight, _ = run_virtually(run())
    assert in_flight == 3


# -- shared by threads, loops and workers


def test_threads_and_loops_share_one_quota() -> None:
    endpoints, times, lock = Endpoints(), [], threading.Lock()
    endpoint = endpoints.get("one", RateLimits(requests_per_minute=1200))

    def note() -> None:
        with lock:
            times.append(time.monotonic())

    def in_thread() -> None:
        for _ in range(30):
            passed = endpoint.enter_blocking(0, None)
            note()
            endpoint.leave(passed)

    async def one() -> None:
        passed = await endpoint.enter(0, None)
        note()
        endpoint.leave(passed)

    async def in_loop() -> None:
        await asyncio.gather(*[one() for _ in range(30)])

    threads = [threading.Thread(target=in_thread) for _ in range(2)]
    threads += [threading.Thread(target=lambda: asyncio.run(in_loop())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    endpoints.close()
    assert len(times) == 120
    assert_rate(times, 20)


def test_slots_bound_what_one_worker_has_in_flight_and_a_cancelled_wait_loses_none() -> None:
    endpoints = Endpoints()
    endpoint, slots = endpoints.get("one", RateLimits()), endpoints.slots(2)

    async def run() -> list[int]:
        in_flight, seen = 0, []

        async def one() -> None:
            nonlocal in_flight
            passed = await endpoint.enter(0, slots)
            in_flight += 1
            seen.append(in_flight)
            await asyncio.sleep(0.002)
            in_flight -= 1
            endpoint.leave(passed)

        for _ in range(5):
            tasks = [asyncio.ensure_future(one()) for _ in range(8)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(asyncio.gather(one(), one()), 10)
        return seen

    seen = asyncio.run(run())
    endpoints.close()
    assert max(seen) == 2


def test_a_plain_call_on_the_loop_itself_waits_for_no_task_of_that_loop() -> None:
    """A metric without ``async`` that asks a judge: the slot that it would wait for is held by a task behind it."""
    endpoints = Endpoints()
    endpoint, slots = endpoints.get("one", RateLimits(requests_per_minute=6000)), endpoints.slots(1)

    async def run() -> None:
        held = await endpoint.enter(0, slots)
        endpoint.leave(endpoint.enter_blocking(0, slots))
        endpoint.leave(held)
        has_ended.set()

    # In a thread: a loop that stands still cannot be ended from within.
    has_ended = threading.Event()
    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    assert has_ended.wait(10)
    endpoints.close()


def test_an_endpoint_without_limits_starts_no_thread() -> None:
    before = threading.active_count()
    endpoints = Endpoints()
    endpoint = endpoints.get("one", RateLimits())
    endpoint.leave(endpoint.enter_blocking(0, None), was_answered=True)
    assert threading.active_count() == before


def test_a_429_guards_an_endpoint_that_had_no_limits() -> None:
    endpoints = Endpoints()
    endpoint = endpoints.get("one", RateLimits())
    first, second = endpoint.enter_blocking(0, None), endpoint.enter_blocking(0, None)
    endpoint.leave(first, is_too_much=True, retry_after_s=0.3)
    endpoint.leave(second, was_answered=True)
    start_s = time.monotonic()
    third = endpoint.enter_blocking(0, None)
    assert time.monotonic() - start_s >= 0.25
    endpoint.leave(third, was_answered=True)
    endpoints.close()


def test_attempts_that_went_out_before_the_gate_leave_through_it() -> None:
    """Three calls of a judge are out when a worker with slots makes the gate: a 429 must not wait for them for ever."""
    endpoints = Endpoints()
    endpoint, slots = endpoints.get("one", RateLimits()), endpoints.slots(8)

    async def run() -> None:
        judged = [await endpoint.enter(0, None) for _ in range(3)]
        work = await endpoint.enter(0, slots)
        assert endpoint.gate().in_flight == 4
        for passed in (*judged, work):
            endpoint.leave(passed, was_answered=True)
        work = await endpoint.enter(0, slots)  # behind them in the queue of the gate's loop
        assert endpoint.gate().in_flight == 1
        endpoint.leave(work, is_too_much=True, retry_after_s=0.0)
        for kind in (slots, None):
            endpoint.leave(await asyncio.wait_for(endpoint.enter(0, kind), 5))

    asyncio.run(run())
    endpoints.close()


def test_once_there_is_a_gate_attempts_without_slots_are_counted_too() -> None:
    """Else they would leave a gate that never counted them, and after a 429 it would let too many through."""
    endpoints = Endpoints()
    endpoint, slots = endpoints.get("one", RateLimits()), endpoints.slots(8)

    async def run() -> None:
        work = await endpoint.enter(0, slots)
        judged = [await endpoint.enter(0, None) for _ in range(3)]
        judged.append(await asyncio.to_thread(endpoint.enter_blocking, 0, None))
        assert endpoint.gate().in_flight == 5
        endpoint.leave(work, is_too_much=True, retry_after_s=0.0)
        for passed in judged:
            endpoint.leave(passed, was_answered=True)
        work = await asyncio.wait_for(endpoint.enter(0, slots), 5)
        assert endpoint.gate().in_flight >= 1
        endpoint.leave(work)
        await until(lambda: endpoint.gate().in_flight == 0)

    asyncio.run(run())
    endpoints.close()


def test_the_smaller_limits_hold_and_later_ones_are_refused() -> None:
    endpoints = Endpoints()
    endpoint = endpoints.get("one", RateLimits(600))
    assert endpoints.get("one", RateLimits(60, 1000)) is endpoint
    assert endpoint.limits == RateLimits(60, 1000)
    assert endpoints.get("one", RateLimits()).limits == RateLimits(60, 1000)
    endpoint.leave(endpoint.enter_blocking(0, None))
    with pytest.raises(ConfigurationError, match="came too late"):
        endpoints.get("one", RateLimits(30))
    endpoints.close()


def test_an_endpoint_is_an_address_and_a_key() -> None:
    import dspy

    def key(model: str, **settings: Any) -> str:
        return endpoint_key(dspy.LM(model, **settings), lambda name: None)

    first = key("openai/a", api_base="http://127.0.0.1:1/v1", api_key="k")
    assert first == key("openai/b", api_base="http://127.0.0.1:1/v1/", api_key="k")
    assert first != key("openai/a", api_base="http://127.0.0.1:1/v1", api_key="other")
    assert first != key("openai/a", api_key="k")
    assert "#" in first and "k#" not in first


def test_an_address_may_come_from_the_environment() -> None:
    import dspy

    both = {"OPENAI_BASE_URL": "http://a/v1", "OPENAI_API_BASE": "http://b/v1"}
    claude = {"ANTHROPIC_API_BASE": "http://c", "ANTHROPIC_BASE_URL": "http://d"}

    def address(model: str, env: dict[str, str], **settings: Any) -> str | None:
        return endpoint_address(dspy.LM(model, **settings), env.get)

    assert address("openai/m", {}) is None
    assert address("openai/m", both) == address("openai/m", both, engine="litellm") == "http://a/v1"
    assert address("anthropic/m", both) is None
    assert address("anthropic/m", claude) == "http://c"
    assert address("openai/m", both, api_base="http://own/v1") == "http://own/v1"
    assert address("openai/m", both, engine="lm15") is None  # that engine asks nobody but the provider
    own = scripted_lm(lambda messages: "ok")
    assert endpoint_address(own, {"SCRIPTED_BASE_URL": "http://a/v1"}.get) is None
    here = endpoint_key(dspy.LM("openai/m", api_key="k"), both.get)
    assert here == endpoint_key(dspy.LM("openai/m", api_key="k", api_base="http://a/v1"), {}.get)
