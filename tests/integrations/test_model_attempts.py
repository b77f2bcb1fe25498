"""Retries and fallbacks of a chain's model: every attempt counts, and they do what they do without an optimizer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import dspy
import pytest
from langchain_asyndbt import langchain_lm, optimize_chain, to_chat_model
from langchain_core.exceptions import ModelRateLimitError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import ConfigurableField, Runnable, RunnableLambda, RunnableSequence
from pydantic import Field
from test_optimize_chain import DATA, Copycat, chain_of, dspy_metric

from asyndbt_dspy import Budget, Price, Worker
from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError
from asyndbt_dspy.lms.failures import causes
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.testing.provider import Provider


class Faulty(Copycat):
    """A copycat that raises at every second call."""

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        found = super()._generate(messages, *args, **kwargs)
        if len(self.asked) % 2 == 0:
            raise TimeoutError("slow")
        return found


class Scripted(BaseChatModel):
    """Answers, or raises, what comes next; when all of it was said, the last one again."""

    says: list[Any]
    asked: list[int] = Field(default_factory=list)

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> ChatResult:
        self.asked.append(len(messages))
        said = self.says[min(len(self.asked), len(self.says)) - 1]
        if isinstance(said, Exception):
            raise said
        usage = {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
        return ChatResult(generations=[ChatGeneration(message=AIMessage(said, usage_metadata=usage))])


def retrying(model: Runnable, **more: Any) -> Runnable:
    return model.with_retry(**{"stop_after_attempt": 4, "wait_exponential_jitter": False, **more})


COMBINED: dict[str, Callable[[Any, Any], Runnable]] = {
    "plain": lambda model, other: model,
    "retries": lambda model, other: retrying(model),
    "fallbacks": lambda model, other: model.with_fallbacks([other]),
    "fallbacks of retries": lambda model, other: retrying(model).with_fallbacks([retrying(other)]),
    "retries of fallbacks": lambda model, other: retrying(model.with_fallbacks([other])),
    "bound": lambda model, other: retrying(model.bind(stop=["x"])).with_config(tags=["t"]),
    "a sequence to fall back on": lambda model, other: model.with_fallbacks(
        [RunnableSequence(RunnableLambda(lambda value: value), other)]
    ),
    "alternatives": lambda model, other: (
        retrying(other)
        .configurable_alternatives(ConfigurableField("which"), other=retrying(model))
        .with_config(configurable={"which": "other"})
    ),
}


@pytest.mark.parametrize("combined", COMBINED)
def test_a_cap_on_calls_holds_for_every_attempt_of_a_chains_model(combined: str) -> None:
    model, other, kept = Faulty(asked=[]), Copycat(asked=[]), []
    optimize_chain(
        chain_of(COMBINED[combined](model, other)),
        metric=dspy_metric,
        trainset=DATA,
        budget=Budget(lm_calls=50),
        progress=False,
        on_done=lambda optimizer, program: kept.append(optimizer.result),
    )
    booked = sum(line["attempts"] for line in kept[0].spending.values())
    assert 25 < len(model.asked) + len(other.asked) == booked <= 50


def asked_once(model: Runnable, ledger: Ledger, *, is_async: bool, **options: Any) -> Any:
    """The answer of a metered LM without DSPy's retries, in the settings of a rollout."""
    lm = metered(
        langchain_lm(model, num_retries=0, max_tokens=20, **options),
        ledger=ledger,
        worker="w",
        prices=Price(1.0, 1.0),
    )
    return asyncio.run(lm.acall("hello"))[0] if is_async else lm("hello")[0]


sides = pytest.mark.parametrize("is_async", [False, True])


@sides
def test_attempts_are_booked_by_what_became_of_them(is_async: bool) -> None:
    busy = ModelRateLimitError("busy")
    first, second = Scripted(says=[busy, TimeoutError("slow")]), Scripted(says=["yes"])
    ledger = Ledger()
    model = retrying(first, stop_after_attempt=2).with_fallbacks([second])
    assert asked_once(model, ledger, is_async=is_async) == "yes"
    line = ledger.line("w")
    assert (line.attempts, line.refused, line.cut, line.answers) == (3, 1, 1, 1)
    assert (line.prompt_tokens, line.completion_tokens, line.unmeasured) == (7, 3, 0)
    assert line.cut_tokens > 20


@sides
def test_retries_and_fallbacks_go_by_langchains_own_exceptions(is_async: bool) -> None:
    first, second = (
        Scripted(says=[ModelRateLimitError("busy"), ConnectionError("gone")]),
        Scripted(says=["yes"]),
    )
    picky = retrying(first, retry_if_exception_type=(ModelRateLimitError,)).with_fallbacks(
        [second], exceptions_to_handle=(TimeoutError,)
    )
    ledger = Ledger()
    with pytest.raises(Exception, match="gone") as caught:
        asked_once(picky, ledger, is_async=is_async)
    assert any(isinstance(one, ConnectionError) for one in causes(caught.value))
    assert (len(first.asked), len(second.asked)) == (2, 0)
    assert ledger.line("w").attempts == 2


@sides
def test_what_the_budget_refuses_is_neither_retried_nor_asked_of_another_model(is_async: bool) -> None:
    first, second = Scripted(says=[TimeoutError("slow")]), Scripted(says=["yes"])
    model = retrying(first, stop_after_attempt=9).with_fallbacks([second])
    ledger, refused = Ledger(Budget(lm_calls=3)), []
    reserve = ledger.reserve

    def noted(*args: Any) -> Any:
        try:
            return reserve(*args)
        except BudgetExceededError as error:
            refused.append(error)
            raise

    ledger.reserve = noted  # type: ignore[method-assign]
    with pytest.raises(Exception, match="LM calls are spent") as caught:
        asked_once(model, ledger, is_async=is_async)
    assert any(isinstance(one, BudgetExceededError) for one in causes(caught.value))
    assert (len(first.asked), len(second.asked), ledger.line("w").attempts, len(refused)) == (3, 0, 3, 1)


@sides
def test_a_pause_that_one_model_asks_for_does_not_hold_up_the_one_behind_it(is_async: bool) -> None:
    class Busy(Exception):
        status_code = 429
        retry_after = 3600.0

    first, second = Scripted(says=[Busy("busy")]), Scripted(says=["yes"])
    assert asked_once(first.with_fallbacks([second]), Ledger(), is_async=is_async) == "yes"


@sides
def test_an_answer_that_is_no_models_is_no_attempt(is_async: bool) -> None:
    canned = RunnableLambda(lambda messages, **settings: AIMessage("sorry"))
    ledger = Ledger()
    model = Scripted(says=[TimeoutError("slow")]).with_fallbacks([canned])
    assert asked_once(model, ledger, is_async=is_async) == "sorry"
    assert ledger.line("w").attempts == 1


class Twice(Runnable[Any, Any]):
    """Asks its model two times, and nobody can tell."""

    def __init__(self, bound: Any) -> None:
        self.bound = bound

    def invoke(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
        self.bound.invoke(input, config, **kwargs)
        return self.bound.invoke(input, config, **kwargs)


@pytest.mark.parametrize("wrapped", [Twice, lambda model: model.with_fallbacks([Twice(model)])])
def test_a_combination_that_cannot_be_taken_apart_is_refused_where_calls_count(wrapped: Any) -> None:
    model = Copycat(asked=[])
    with pytest.raises(ConfigurationError, match=r"a Twice around a model.*with_retry and with_fallbacks"):
        optimize_chain(
            chain_of(wrapped(model)),
            metric=dspy_metric,
            trainset=DATA,
            budget=Budget(lm_calls=50),
            progress=False,
        )
    assert model.asked == []
    assert langchain_lm(wrapped(model))("hello there")


def test_a_cap_on_tokens_holds_for_every_attempt() -> None:
    model = Faulty(asked=[])
    worker = Worker("w", lm=langchain_lm(retrying(model), max_tokens=20, num_retries=0))
    kept: list[Any] = []
    optimize_chain(
        chain_of(Copycat(asked=[])),
        metric=dspy_metric,
        trainset=DATA,
        workers=[worker],
        budget=Budget(tokens=20_000),
        progress=False,
        on_done=lambda optimizer, program: kept.append(optimizer.result),
    )
    line = kept[0].spending["w"]
    assert line["attempts"] == len(model.asked) > 10
    assert line["cut"] > 5
    assert line["prompt_tokens"] + line["completion_tokens"] + line["cut_tokens"] <= 20_000


def test_a_dspy_lm_within_a_chains_model_is_counted_once_and_not_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept: list[Any] = []
    with Provider(lambda messages: "warm") as provider, caplog.at_level(logging.WARNING):
        lm = dspy.LM("openai/m", api_base=provider.url, api_key="k", cache=False)
        for budget in (Budget(metric_calls=50, lm_calls=500), Budget(metric_calls=50)):
            optimize_chain(
                chain_of(to_chat_model(lm)),
                metric=dspy_metric,
                trainset=DATA,
                budget=budget,
                progress=False,
                deterministic=True,
                on_done=lambda optimizer, program: kept.append(optimizer.result),
            )
            assert sum(one.lm_calls for one in kept[-1].workers) == len(provider.calls) > 30
            used = sum(one.prompt_tokens + one.completion_tokens for one in kept[-1].workers)
            assert used == sum(call.tokens for call in provider.calls)
            provider.calls.clear()
    assert [one.getMessage() for one in caplog.records if "do not count" in one.getMessage()] == []
