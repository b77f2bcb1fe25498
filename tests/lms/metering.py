"""Set-up shared by the tests that call LMs on the loopback provider."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import dspy

from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.lms.failures import causes, classify
from asyndbt_dspy.lms.prices import Price
from asyndbt_dspy.testing.provider import Provider

PRICE = Price(prompt=0.15, completion=0.6)
PRICES = {"prompt_dollars_per_million": 0.15, "completion_dollars_per_million": 0.6}


def lm_on(provider: Provider, engine: str, **settings: Any) -> dspy.LM:
    """An LM of the provider, without DSPy's cache and, unless asked for, without retries."""
    known = {"cache": False, "num_retries": 0, "max_tokens": 50, "timeout": 10, "api_key": "k", **settings}
    return dspy.LM(known.pop("model", "openai/m"), api_base=provider.url, engine=engine, **known)


async def until(is_so: Callable[[], object]) -> None:
    """Wait for a state that another thread brings about."""
    while not is_so():
        await asyncio.sleep(0.005)


def outcome_of(error: BaseException) -> str:
    if any(isinstance(one, BudgetExceededError) for one in causes(error)):
        return "budget"
    return classify(error).value


async def call_many(
    lm: dspy.LM, count: int, in_flight: int, prompt: Callable[[int], str] = "question {}".format
) -> Counter[str]:
    """Outcomes of ``count`` calls, ``in_flight`` at a time: ``answer``, ``budget`` or a kind of failure."""
    gate = asyncio.Semaphore(in_flight)

    async def one(number: int) -> str:
        async with gate:
            try:
                await lm.acall(prompt(number))
            except Exception as error:  # noqa: BLE001 - sorted
                return outcome_of(error)
            return "answer"

    return Counter(await asyncio.gather(*[one(number) for number in range(count)]))
