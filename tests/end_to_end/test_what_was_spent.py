"""What a result says of LM calls, tokens and dollars, and what it leaves unsaid."""

from __future__ import annotations

import json
import logging
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, Price, Result, Worker
from asyndbt_dspy.testing.provider import Provider


class WithoutUsage(Provider):
    """Says of no answer what it took."""

    def _reply(self, call: Any, body: dict[str, Any]) -> bytes:
        found = json.loads(super()._reply(call, body))
        del found["usage"]
        return json.dumps(found).encode()


class Parallel(dspy.Module):
    """Asks three times, in threads of DSPy's."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(kit.Sort)

    def forward(self, message: str) -> dspy.Prediction:
        asked = dspy.Example(message=message).with_inputs("message")
        threads = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        return threads([(self.sort, asked)] * 3)[0]


def compiled(program: dspy.Module, lm: Any, **options: Any) -> Result:
    optimizer = AsynDBT(kit.metric, progress=False, **{"workers": 2, **options})
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        optimizer.compile(program, trainset=kit.examples(60))
    assert optimizer.result is not None
    return optimizer.result


def lm_on(provider: Provider, **more: Any) -> dspy.LM:
    return dspy.LM("openai/m", api_base=provider.url, api_key="k", cache=False, **more)


def row_of(result: Result, name: str) -> list[str]:
    table = str(result).partition("spent by")[2]
    return next(line for line in table.splitlines() if line.startswith(name)).split()


@pytest.mark.parametrize("prices", [{}, {"openai/m": Price(1.0, 2.0)}])
def test_calls_in_threads_of_dspys_are_their_workers(prices: dict[str, Price]) -> None:
    """Metered or not."""
    with Provider(kit.stairs(1)) as provider:
        budget = Budget(metric_calls=30)
        result = compiled(Parallel(), lm_on(provider), budget=budget, prices=prices, deterministic=True)
    used = sum(one.prompt_tokens + one.completion_tokens for one in result.workers)
    calls = sum(one.lm_calls for one in result.workers)
    assert (calls, used) == (len(provider.calls), sum(call.tokens for call in provider.calls))
    assert calls == 3 * result.metric_calls > 60
    for one in result.workers if prices else ():
        assert result.spending[one.name]["answers"] == one.lm_calls


def test_a_tracker_around_a_compile_hears_of_its_calls() -> None:
    with Provider(kit.stairs(1)) as provider, dspy.track_usage() as around:
        compiled(Parallel(), lm_on(provider), budget=Budget(metric_calls=30), deterministic=True)
    assert len(around.usage_data["openai/m"]) == len(provider.calls)


def test_tokens_that_nobody_reports_are_estimated_and_marked() -> None:
    with WithoutUsage(kit.stairs(1)) as provider:
        budget = Budget(metric_calls=40, lm_calls=400)
        result = compiled(dspy.Predict(kit.Sort), lm_on(provider), budget=budget, deterministic=True)
    assert sum(one.lm_calls for one in result.workers) == len(provider.calls) > 30
    lines = result.spending.values()
    assert sum(line["unmeasured"] for line in lines) == len(provider.calls)
    assert sum(line["unpriced"] for line in lines) == len(provider.calls)
    assert [line["cut_tokens"] for line in lines] == [0, 0]
    estimated = sum(line["prompt_tokens"] + line["completion_tokens"] for line in lines)
    asked = sum(len(json.dumps(call.body["messages"])) for call in provider.calls)
    assert asked / 8 < estimated < asked / 2
    row = row_of(result, "worker-1")
    assert (row[-2][0], row[-1]) == ("~", "unknown")
    assert f"~ {len(provider.calls)} answers came without a count of their tokens" in str(result)


def test_their_dollars_are_estimated_where_the_price_is_known() -> None:
    with WithoutUsage(kit.stairs(1)) as provider:
        prices = {"openai/m": Price(1.0, 2.0)}
        result = compiled(
            dspy.Predict(kit.Sort), lm_on(provider), budget=Budget(metric_calls=30), prices=prices
        )
    assert row_of(result, "worker-1")[-1].startswith("~0.00")


def test_a_cap_on_tokens_holds_where_nobody_reports_them() -> None:
    with WithoutUsage(kit.stairs(1)) as provider:
        budget = Budget(tokens=40_000)
        result = compiled(dspy.Predict(kit.Sort), lm_on(provider, max_tokens=50), budget=budget)
    assert len(provider.calls) > 10
    booked = sum(one["prompt_tokens"] + one["completion_tokens"] for one in result.spending.values())
    assert sum(call.tokens for call in provider.calls) <= booked <= 40_000


@pytest.mark.parametrize("budget", [Budget(lm_calls=40), Budget(tokens=40_000)])
def test_an_unknown_price_is_no_warning_where_no_dollars_were_asked_for(
    budget: Budget, caplog: pytest.LogCaptureFixture
) -> None:
    with Provider(kit.stairs(1)) as provider, caplog.at_level(logging.WARNING):
        result = compiled(dspy.Predict(kit.Sort), lm_on(provider, max_tokens=50), budget=budget)
    assert [one.getMessage() for one in caplog.records if "price" in one.getMessage()] == []
    assert row_of(result, "worker-1")[-1] == "unknown"


def test_an_unknown_price_beside_known_ones_is_told_once_per_lm(caplog: pytest.LogCaptureFixture) -> None:
    with Provider(kit.stairs(1)) as provider, caplog.at_level(logging.WARNING):
        workers = [Worker("a"), Worker("b"), Worker("c", lm=lm_on(provider), price=Price(1.0, 2.0))]
        compiled(dspy.Predict(kit.Sort), lm_on(provider), budget=Budget(metric_calls=40), workers=workers)
    told = [one.getMessage() for one in caplog.records if "no known price" in one.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("openai/m has no known price: its dollars are not counted")
