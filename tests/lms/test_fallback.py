"""Several LMs behind one: order, dead ones, pauses, and hedges whose loser is cancelled and counted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from dspy import lm15
from metering import PRICE, lm_on, outcome_of, until

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.failures import FailureKind, classify
from asyndbt_dspy.lms.fallback import Rotation, fallback
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.lms.scripted import scripted_lm
from asyndbt_dspy.testing.provider import Call, Fault, Provider

AUTH = lm15.AuthError("no such key", status=401)
BUSY = lm15.RateLimitError("busy", status=429, retry_after=30.0)
BROKEN = lm15.TransportError("cut")

both_ways = pytest.mark.parametrize("way", ["thread", "task"])
both_engines = pytest.mark.parametrize("engine", ["auto", "litellm"])


def ask(lm: dspy.LM, way: str, prompt: str = "question") -> str:
    answer = lm(prompt) if way == "thread" else asyncio.run(lm.acall(prompt))
    return str(answer[0])


def raising(error: Exception) -> Callable[[Any], str]:
    def script(messages: Any) -> str:
        raise error

    return script


# -- the rotation, on a clock that is told


def test_a_dead_endpoint_is_left_out_and_tried_again_ever_later() -> None:
    rotation = Rotation(2, retry_dead_after_s=60)
    assert rotation.order(0) == [0, 1]
    rotation.failed(0, AUTH, 0)
    assert rotation.order(59.9) == [1]
    assert rotation.order(60) == [0, 1]
    rotation.failed(0, AUTH, 60)
    assert rotation.order(179) == [1]
    assert rotation.order(180) == [0, 1]
    rotation.answered(0)
    rotation.failed(0, AUTH, 200)
    assert rotation.order(260) == [0, 1]
    now_s = 300.0
    for _ in range(20):
        rotation.failed(0, AUTH, now_s)
        now_s += 600
    assert rotation.order(now_s - 1) == [1]
    assert rotation.order(now_s) == [0, 1]


def test_a_pause_is_kept_to_the_second() -> None:
    rotation = Rotation(2, retry_dead_after_s=60)
    rotation.failed(0, BUSY, 0)
    assert rotation.order(29) == [1]
    assert rotation.order(30) == [0, 1]
    rotation.failed(1, lm15.RateLimitError("busy"), 100)
    assert rotation.order(100.5) == [0]
    assert rotation.order(101) == [0, 1]


def test_one_cut_connection_is_forgiven_and_three_are_not() -> None:
    rotation = Rotation(2, retry_dead_after_s=60)
    rotation.failed(0, BROKEN, 0)
    rotation.failed(0, BROKEN, 1)
    assert rotation.order(1) == [0, 1]
    rotation.failed(0, BROKEN, 2)
    assert rotation.order(61) == [1]
    assert rotation.order(62) == [0, 1]


@pytest.mark.parametrize(("error", "rest_s"), [(AUTH, 60), (lm15.RateLimitError("busy"), 1)])
def test_attempts_that_fail_together_leave_an_lm_out_once(error: Exception, rest_s: float) -> None:
    rotation = Rotation(2, retry_dead_after_s=60)
    for number in range(8):
        rotation.failed(0, error, now_s=10 + number / 100, started_s=9)
    assert rotation.order(10 + rest_s - 0.1) == [1]
    assert rotation.order(10 + rest_s) == [0, 1]


def test_attempts_that_fail_together_are_one_of_three_in_a_row() -> None:
    rotation = Rotation(2, retry_dead_after_s=60)
    for wave_s in (10.0, 20.0):
        for number in range(8):
            rotation.failed(0, BROKEN, now_s=wave_s + number / 100, started_s=wave_s - 1)
    assert rotation.order(21) == [0, 1]
    rotation.failed(0, BROKEN, now_s=30, started_s=29)
    assert rotation.order(89) == [1]
    assert rotation.order(90) == [0, 1]


def test_among_attempts_that_fail_together_a_dead_endpoint_and_the_longest_pause_are_heard() -> None:
    rotation = Rotation(3, retry_dead_after_s=60)
    for error in (BROKEN, AUTH, BROKEN):
        rotation.failed(0, error, now_s=10, started_s=9)
    for error in (BROKEN, lm15.RateLimitError("busy", retry_after=5), BUSY):
        rotation.failed(1, error, now_s=10, started_s=9)
    assert rotation.order(39) == [2]
    assert rotation.order(40) == [1, 2]
    assert rotation.order(70) == [0, 1, 2]


def test_with_no_lm_in_service_those_that_rest_are_tried_the_first_back_first() -> None:
    rotation = Rotation(3, retry_dead_after_s=60)
    rotation.failed(2, AUTH, 0)
    for now_s in range(3):
        rotation.failed(0, BROKEN, now_s + 0.5)
        rotation.failed(1, BROKEN, now_s)
    assert rotation.order(3) == [1, 0]
    for now_s in range(3, 20):  # tried early, in vain: that makes no rest longer
        rotation.failed(1, BROKEN, now_s + 0.1, started_s=now_s)
    assert rotation.order(62) == [1, 2]
    rotation.answered(0)
    assert rotation.order(20) == [0]


def test_a_pause_that_an_endpoint_asked_for_is_not_cut_short_by_those_that_rest() -> None:
    rotation = Rotation(2, retry_dead_after_s=60)
    rotation.failed(0, BUSY, 0)
    for now_s in range(3):
        rotation.failed(1, BROKEN, now_s)
    assert rotation.order(29) == []
    error = rotation.unavailable(20)
    assert isinstance(error, lm15.RateLimitError)
    assert error.retry_after == 10
    assert rotation.order(30) == [0]


def test_with_all_left_out_dspy_is_told_to_wait_for_the_first_that_rests() -> None:
    rotation = Rotation(3, retry_dead_after_s=60)
    rotation.failed(0, AUTH, 0)
    rotation.failed(1, BUSY, 0)
    rotation.failed(2, lm15.RateLimitError("busy", retry_after=45), 0)
    error = rotation.unavailable(10)
    assert isinstance(error, lm15.RateLimitError)
    assert error.retry_after == 20


def test_with_all_dead_the_worker_is_told_so() -> None:
    rotation = Rotation(2, retry_dead_after_s=60)
    rotation.failed(0, AUTH, 0)
    rotation.failed(1, AUTH, 0)
    assert classify(rotation.unavailable(1)) is FailureKind.ENDPOINT


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hedge_after_s": 0}, "hedge_after_s=0 must be > 0"),
        ({"hedge_after_s": float("nan")}, "hedge_after_s=nan"),
        ({"retry_dead_after_s": -1}, "retry_dead_after_s=-1 must be > 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        fallback([scripted_lm(lambda messages: "ok")], **settings)
    with pytest.raises(ConfigurationError, match="got 0 LMs"):
        fallback([])


# -- one LM after the other


@both_ways
@pytest.mark.parametrize("error", [AUTH, BUSY, BROKEN, lm15.ServerError("x", status=500)])
def test_the_next_lm_answers_where_the_first_cannot(way: str, error: Exception) -> None:
    lm = fallback([scripted_lm(raising(error)), scripted_lm(lambda messages: "second")])
    assert ask(lm, way) == "second"


@both_ways
def test_a_dead_key_costs_one_attempt_until_it_is_tried_again(way: str) -> None:
    now = [0.0]
    with Provider() as provider:
        provider.dead.add("old")
        ledger = Ledger()
        lms = [
            metered(lm_on(provider, "auto", api_key=key), ledger=ledger, worker="a", prices=PRICE)
            for key in ("old", "new")
        ]
        lm = fallback(lms, retry_dead_after_s=60, clock=lambda: now[0])
        for _ in range(5):
            assert ask(lm, way) == "ok"
        assert len(provider.seen(key="old")) == 1
        now[0], provider.dead = 61.0, set()
        assert ask(lm, way) == "ok"
        assert ask(lm, way) == "ok"
    assert (len(provider.seen(key="old")), len(provider.seen(key="new"))) == (3, 5)
    assert ledger.line("a").attempts == provider.attempts == 8


@both_ways
def test_calls_that_fail_side_by_side_leave_an_lm_out_for_no_longer_than_one(way: str) -> None:
    now, calls = [0.0], 8
    met = threading.Barrier(calls)

    def script(messages: Any) -> str:
        if now[0] >= 60:
            return "first"
        met.wait(10)  # all are out before one fails
        raise AUTH

    def plainly(messages: Any) -> str:
        return "second"

    def tick() -> float:
        now[0] += 0.001
        return now[0]

    # In tasks, the calls of a plain script would run one after the other: they get a thread each there too.
    lm = fallback([scripted_lm(script), scripted_lm(plainly)], retry_dead_after_s=60, clock=tick)
    with ThreadPoolExecutor(calls) as pool:
        answers = list(pool.map(lambda _: ask(lm, way), range(calls)))
    assert answers == ["second"] * calls
    assert ask(lm, way) == "second"
    now[0] = 61.0
    assert ask(lm, way) == "first"


@both_ways
def test_after_an_outage_of_all_the_next_call_is_answered(way: str) -> None:
    """However long each of them is left out: with nobody else to ask, an LM is asked as if it were alone."""
    is_out = True

    def script(messages: Any) -> str:
        if is_out:
            raise BROKEN
        return "up"

    lm = fallback([scripted_lm(script), scripted_lm(script)], retry_dead_after_s=60, clock=lambda: 0.0)
    for _ in range(5):
        with pytest.raises(dspy.LMError) as caught:
            ask(lm, way)
        assert outcome_of(caught.value) == "transient"
    is_out = False
    assert ask(lm, way) == "up"


@both_ways
def test_a_prompt_that_is_too_long_is_no_reason_to_ask_another(way: str) -> None:
    asked: list[Any] = []
    second = scripted_lm(lambda messages: asked.append(messages) or "second")
    lm = fallback([scripted_lm(raising(lm15.ContextLengthError("too long"))), second])
    with pytest.raises(dspy.LMError) as caught:
        ask(lm, way)
    assert classify(caught.value) is FailureKind.EXAMPLE
    assert not asked


@both_ways
def test_when_all_fail_dspy_retries_those_that_may_recover(way: str) -> None:
    counts = [0, 0]

    def busy_once(messages: Any) -> str:
        counts[1] += 1
        if counts[1] == 1:
            raise lm15.RateLimitError("busy", status=429, retry_after=0.05)
        return "second"

    def dead(messages: Any) -> str:
        counts[0] += 1
        raise AUTH

    lm = fallback([scripted_lm(dead, num_retries=2), scripted_lm(busy_once)])
    assert ask(lm, way) == "second"
    assert counts == [1, 2]


@both_ways
def test_the_budget_ends_a_call_whoever_is_next(way: str) -> None:
    ledger = Ledger(Budget(lm_calls=1))
    lms = [metered(scripted_lm(lambda messages: "ok"), ledger=ledger, worker="a") for _ in range(2)]
    lm = fallback(lms)
    ask(lm, way)
    with pytest.raises(dspy.LMError) as caught:
        ask(lm, way)
    assert outcome_of(caught.value) == "budget"
    assert ledger.line("a").attempts == 1


def test_capabilities_are_what_all_can() -> None:
    lms = [scripted_lm(lambda messages: "ok", supports_schema=can) for can in (True, False)]
    lm = fallback(lms)
    assert not lm.supports_response_schema
    assert "response_format" not in lm.supported_params
    assert fallback(lms[:1]).supports_response_schema


# -- hedging


def slow_first(call: Call) -> Fault:
    return Fault("slow", seconds=20.0) if call.model == "slow" else Fault()


def team_on(provider: Provider, engine: str, ledger: Ledger, **settings: Any) -> dspy.LM:
    lms = [
        metered(lm_on(provider, engine, model=f"openai/{name}"), ledger=ledger, worker="a", prices=PRICE)
        for name in ("slow", "quick")
    ]
    return fallback(lms, **settings)


def settled(ledger: Ledger) -> bool:
    """Whether every attempt is over; the loser of a hedge is booked a moment after the winner's answer."""
    end_s = time.monotonic() + 5
    while ledger.spent.reserved_tokens and time.monotonic() < end_s:
        time.sleep(0.005)
    return not ledger.spent.reserved_tokens


@both_engines
@both_ways
def test_a_straggler_is_hedged_its_loser_cancelled_and_both_counted(engine: str, way: str) -> None:
    with Provider(lambda messages: "ok then", fault=slow_first) as provider:
        ledger = Ledger()
        lm = team_on(provider, engine, ledger, hedge_after_s=0.2)
        lm_on(provider, engine, model="openai/warm")("up")
        start_s = time.monotonic()
        assert ask(lm, way) == "ok then"
        assert 0.2 <= time.monotonic() - start_s < 5
        assert settled(ledger)
        line = ledger.line("a")
        slow, quick = provider.seen(model="slow"), provider.seen(model="quick")
    assert (len(slow), len(quick)) == (1, 1)
    assert (line.attempts, line.answers, line.cut) == (2, 1, 1)
    assert line.prompt_tokens + line.completion_tokens == quick[0].tokens
    assert line.cut_tokens >= slow[0].tokens


@both_ways
def test_a_quick_answer_needs_no_hedge(way: str) -> None:
    with Provider() as provider:
        ledger = Ledger()
        lm = team_on(provider, "auto", ledger, hedge_after_s=5)
        assert ask(lm, way) == "ok"
    assert [call.model for call in provider.calls] == ["slow"]


@both_ways
def test_a_hedge_that_fails_does_not_end_the_call(way: str) -> None:
    def fault(call: Call) -> Fault:
        return Fault("slow", seconds=0.5) if call.model == "slow" else Fault("status", status=401)

    with Provider(lambda messages: "late", fault=fault) as provider:
        ledger = Ledger()
        assert ask(team_on(provider, "auto", ledger, hedge_after_s=0.1), way) == "late"
    assert (ledger.line("a").answers, ledger.line("a").refused) == (1, 1)


@both_ways
def test_a_hedge_that_the_budget_refuses_does_not_end_the_call(way: str) -> None:
    fault = {"slow": Fault("slow", seconds=0.5)}
    with Provider(fault=lambda call: fault.get(call.model, Fault())) as provider:
        ledger = Ledger(Budget(lm_calls=1))
        assert ask(team_on(provider, "auto", ledger, hedge_after_s=0.1), way) == "ok"
    assert provider.attempts == ledger.line("a").attempts == 1


def test_a_cancelled_call_cancels_what_runs_for_it() -> None:
    with Provider(fault=lambda call: Fault("never")) as provider:
        ledger = Ledger()
        lm = team_on(provider, "auto", ledger, hedge_after_s=0.1)

        async def run() -> None:
            task = asyncio.ensure_future(lm.acall("question"))
            await until(lambda: provider.attempts == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(asyncio.wait_for(run(), 20))
        assert settled(ledger)
        line = ledger.line("a")
    assert (line.attempts, line.cut) == (2, 2)


def test_threads_hedge_side_by_side() -> None:
    with Provider(fault=slow_first) as provider:
        ledger = Ledger()
        lm = team_on(provider, "auto", ledger, hedge_after_s=0.1)
        answers: list[str] = []
        threads = [threading.Thread(target=lambda: answers.append(lm("question")[0])) for _ in range(8)]
        start_s = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert time.monotonic() - start_s < 5
        assert settled(ledger)
    assert answers == ["ok"] * 8
    assert ledger.line("a").attempts == provider.attempts == 16
