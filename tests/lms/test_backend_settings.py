"""Settings that only an LM's own backend understands: metered, they reach it as they do without."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Literal

import dspy
import pytest
from metering import PRICE, lm_on

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError
from asyndbt_dspy.lms.failures import causes
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.testing.provider import Fault, Provider

both_engines = pytest.mark.parametrize("engine", ["auto", "litellm"])
QWEN = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}


class Sort(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField()
    label: Literal["yes", "no"] = dspy.OutputField()


def sort_twice(lm: dspy.LM, **config: Any) -> None:
    """In this thread and in a task."""
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        sort = dspy.Predict(Sort, **config)
        assert sort(message="hello").label == "yes"
        assert asyncio.run(sort.acall(message="hello")).label == "yes"


@both_engines
@pytest.mark.parametrize(
    ("settings", "is_sent"),
    [
        (QWEN, lambda body: body["chat_template_kwargs"] == {"enable_thinking": False}),
        ({"extra_body": {"top_k": 5}, "extra_headers": {"x-a": "1"}}, lambda body: body["top_k"] == 5),
        ({"headers": {"x-a": "1"}}, lambda body: body["max_tokens"] == 50 and "n" not in body),
        ({"drop_params": True, "top_p": 0.5, "seed": 3}, lambda body: body["seed"] == 3),
        ({"min_p": 0.1, "stop": ["x"]}, lambda body: (body["min_p"], body["stop"]) == (0.1, ["x"])),
    ],
)
def test_settings_of_a_backend_reach_it_as_without_metering(
    engine: str, settings: dict[str, Any], is_sent: Any
) -> None:
    """Also shows that the private names of DSPy in ``attempts`` are there and mean what they did."""
    with Provider(lambda messages: '{"label": "yes"}') as provider:
        plain = lm_on(provider, engine, temperature=0.3, **settings)
        ledger = Ledger(Budget(tokens=100_000))
        sort_twice(plain)
        sort_twice(metered(plain, ledger=ledger, worker="a", prices=PRICE))
        bodies = [call.body for call in provider.seen()]
    assert len(bodies) == 4
    assert is_sent(bodies[0])
    assert bodies[1:] == [bodies[0]] * 3
    line = ledger.line("a")
    assert (line.attempts, line.answers) == (2, 2)
    assert ledger.spent.tokens == provider.tokens / 2


@both_engines
def test_a_predictors_own_settings_go_before_the_lms(engine: str) -> None:
    with Provider(lambda messages: '{"label": "yes"}') as provider:
        lm = metered(lm_on(provider, engine, temperature=0.3, top_p=0.5, **QWEN), ledger=Ledger(), worker="a")
        sort_twice(lm, temperature=0.9, top_p=None, max_tokens=20)
        bodies: list[Mapping[str, Any]] = [call.body for call in provider.seen()]
    for body in bodies:
        assert (body["temperature"], body.get("top_p"), body["max_tokens"]) == (0.9, None, 20)


@both_engines
def test_attempts_that_carry_settings_are_capped_retried_and_told_apart(engine: str) -> None:
    def fault(call: Any) -> Fault:
        return Fault("status", status=500, retry_after_s=0.01) if call.number == 0 else Fault()

    with Provider(fault=fault) as provider:
        ledger = Ledger(Budget(lm_calls=2))
        lm = metered(lm_on(provider, engine, num_retries=1, **QWEN), ledger=ledger, worker="a")
        assert lm("question") == ["ok"]
        with pytest.raises(dspy.LMError) as caught:
            lm("question")
    assert any(isinstance(one, BudgetExceededError) for one in causes(caught.value))
    line = ledger.line("a")
    assert (provider.attempts, line.attempts, line.refused, line.answers) == (2, 2, 1, 1)


def test_why_an_answer_ended_is_still_known() -> None:
    ends: list[str] = []
    with Provider(lambda messages: "yes " * 500) as provider:
        lm = metered(lm_on(provider, "auto", **QWEN), ledger=Ledger(), worker="a")
        engine = lm.engine
        complete = engine.complete

        def watched(request: Any) -> Any:
            response = complete(request)
            ends.append(response.finish_reason)
            return response

        engine.complete = watched
        lm("question")
    assert ends == ["length"]


def test_lms_that_differ_in_such_a_setting_do_not_share_cached_answers() -> None:
    with Provider(lambda messages: "ok") as provider:
        for is_on, calls in ((True, 1), (False, 2), (True, 2)):
            extra = {"chat_template_kwargs": {"enable_thinking": is_on}}
            lm = lm_on(provider, "auto", model="openai/settings", cache=True, extra_body=extra)
            assert metered(lm, ledger=Ledger(), worker="a")("question") == ["ok"]
            assert provider.attempts == calls


def test_an_lm_that_overrides_forward_keeps_its_settings() -> None:
    seen: list[dict[str, Any]] = []

    class Own(dspy.LM):
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            seen.append({**self.kwargs, **kwargs})
            return super().forward(prompt, messages, **kwargs)

    with Provider() as provider:
        plain = Own("openai/m", api_base=provider.url, api_key="k", cache=False, max_tokens=50, **QWEN)
        assert metered(plain, ledger=Ledger(), worker="a")("question") == ["ok"]
        assert provider.calls[0].body["chat_template_kwargs"] == {"enable_thinking": False}
    assert seen[0]["max_tokens"] == 50


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fallbacks": ["openai/other"]}, r"fallbacks=\['openai/other'\].*give the worker a list of LMs"),
        ({"max_retries": 2}, r"max_retries=2.*num_retries"),
    ],
)
def test_calls_that_nobody_would_count_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        metered(dspy.LM("openai/m", max_tokens=50, **settings), ledger=Ledger(), worker="a")
