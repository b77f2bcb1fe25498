"""Rates and concurrency of metered LMs against a provider on a real socket."""

from __future__ import annotations

import asyncio

import pytest
from metering import PRICE, call_many, lm_on

from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
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
            for number in range(20):
                lms[2](f"question {number}")

        async def run() -> None:
            await asyncio.gather(
                call_many(lms[0], 20, 20), call_many(lms[1], 20, 20), asyncio.to_thread(in_thread)
            )

        asyncio.run(run())
        calls = provider.seen()
    assert len(calls) == 61
    # 40 in the first second; three quotas would send all 61. A few more on a machine that is busy, where requests bunch up.
    assert provider.most_in_window(1.0) <= 2 * 20 + 10
    # 19.8 a second with a second's worth at once: 60 calls need two seconds; three quotas would need none.
    assert calls[-1].at_s - calls[1].at_s >= 1.9
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
