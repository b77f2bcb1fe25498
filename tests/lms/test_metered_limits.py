"""Rates and concurrency of metered LMs against a provider on a real socket."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import pytest
from arrivals import assert_rate
from metering import PRICE, call_many, lm_on, until

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.lms.call_watch import CallWatch, watching_calls
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.lms.scripted import AsyncScriptedEngine, ScriptedEngine
from asyndbt_dspy.testing.provider import Provider

both_engines = pytest.mark.parametrize("engine", ["auto", "litellm"])


@both_engines
def test_three_workers_on_one_endpoint_share_its_limit(engine: str) -> None:
    """1,200 a minute for three workers with models of their own, one of them in threads; a short window in real time."""
    with Provider() as provider:
        ledger = Ledger()
        lms = [
            metered(
                lm_on(provider, engine, model=f"openai/m{number}"),
                ledger=ledger,
                worker=f"w{number}",
                requests_per_minute=1200,
                prices=PRICE,
            )
            for number in range(3)
        ]
        asyncio.run(call_many(lms[0], 1, 1))  # LiteLLM is imported before the clock matters

        def in_thread() -> None:
            for number in range(40):
                lms[2](f"question {number}")

        async def run() -> None:
            await asyncio.gather(
                call_many(lms[0], 40, 40), call_many(lms[1], 40, 40), asyncio.to_thread(in_thread)
            )

        asyncio.run(run())
        calls = provider.seen()
    assert len(calls) == 121
    assert_rate([call.at_s for call in calls[1:]], 20)
    assert all(ledger.line(f"w{number}").waited_s > 0 for number in range(3))


def test_max_concurrency_bounds_attempts_of_tasks_and_threads() -> None:
    with Provider(latency_s=0.02) as provider:
        lm = metered(lm_on(provider, "auto"), ledger=Ledger(), worker="a", max_concurrency=3, prices=PRICE)

        async def run() -> None:
            threads = [asyncio.to_thread(lm, f"t {number}") for number in range(10)]
            await asyncio.gather(call_many(lm, 10, 10), *threads)

        asyncio.run(run())
    assert provider.attempts == 20
    assert provider.most_in_flight == 3


def test_an_endpoint_that_keeps_refusing_is_given_less() -> None:
    """The provider takes 20 requests in any half second; DSPy alone runs against it again and again."""

    def refused(is_metered: bool) -> int:
        with Provider(requests_per_window=(20, 0.5)) as provider:
            plain = lm_on(provider, "auto", num_retries=8)
            lm = metered(plain, ledger=Ledger(), worker="a", prices=PRICE) if is_metered else plain
            answers = asyncio.run(call_many(lm, 100, in_flight=40))
            assert answers["answer"] == 100 or not is_metered  # DSPy alone may give a call up
            return int(provider.faults()["status"])

    assert refused(is_metered=True) < 0.7 * refused(is_metered=False)  # measured: 47 to 63 of 140


@pytest.mark.parametrize("limit", ["concurrency", "budget"])
@pytest.mark.parametrize("in_threads", [False, True])
def test_who_watches_learns_that_a_call_waits_for_its_turn(limit: str, in_threads: bool) -> None:
    """Two calls, of which one may be on the wire: it is not held back, and the other one is."""
    now = [0.0]

    async def main() -> None:
        opened, on_wire = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        class Gated(AsyncScriptedEngine):
            async def complete(self, request: Any) -> Any:
                on_wire.set()
                await opened.wait()
                return await super().complete(request)

        class GatedPlain(ScriptedEngine):
            def complete(self, request: Any) -> Any:
                loop.call_soon_threadsafe(on_wire.set)
                asyncio.run_coroutine_threadsafe(opened.wait(), loop).result(10)
                return super().complete(request)

        engines = {"engine": GatedPlain(lambda _: "ok", True), "async_engine": Gated(lambda _: "ok", True)}
        settings = {"max_concurrency": 1} if limit == "concurrency" else {}
        # Of 300 tokens the first call reserves more than half, and gives most of it back.
        budget = Budget(tokens=300) if limit == "budget" else None
        plain = dspy.LM("gated/m", cache=False, max_tokens=60, num_retries=0, **engines)
        lm = metered(plain, ledger=Ledger(budget), worker="a", prices=PRICE, **settings)

        def called() -> tuple[CallWatch, asyncio.Future[Any]]:
            with watching_calls(lambda: now[0]) as watch:
                call = asyncio.to_thread(lm, "q") if in_threads else lm.acall("q")
                return watch, asyncio.ensure_future(call)

        with watching_calls(lambda: now[0]) as both:
            first, first_call = called()
            await on_wire.wait()
            second, second_call = called()

        def is_held() -> bool:
            now[0] += 1.0
            return second.held_s() > 0

        await until(is_held)
        before = first.held_s(), both.held_s(), second.held_s()
        now[0] += 100.0
        assert (first.held_s(), both.held_s(), second.held_s()) == (*before[:2], before[2] + 100.0)
        opened.set()
        await asyncio.gather(first_call, second_call)
        after = second.held_s()
        now[0] += 100.0
        assert second.held_s() == after

    asyncio.run(asyncio.wait_for(main(), 20))
