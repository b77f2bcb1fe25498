"""LMs behind one that differ: each is asked in its own way, a later one's refusal is no verdict, and caches stay apart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Literal

import dspy
import pytest
from dspy import lm15
from metering import PRICE, lm_on

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.lms.failures import FailureKind, classify
from asyndbt_dspy.lms.fallback import fallback
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.lms.scripted import scripted_lm
from asyndbt_dspy.programs.rollout import RolloutRunner
from asyndbt_dspy.testing.provider import Call, Fault, Provider

BUSY = lm15.RateLimitError("busy", status=429)
DEAD = lm15.AuthError("no such key", status=401)
REFUSED = lm15.InvalidRequestError("temperature=0 is not for this model", status=400)

both_ways = pytest.mark.parametrize("way", ["thread", "task"])


def ask(lm: dspy.LM, way: str, prompt: str = "question", **config: Any) -> str:
    answer = lm(prompt, **config) if way == "thread" else asyncio.run(lm.acall(prompt, **config))
    return str(answer[0])


def raising(error: Exception) -> Callable[[Any], str]:
    def script(messages: Any) -> str:
        raise error

    return script


# -- settings


def first_is_busy(call: Call) -> Fault:
    return Fault("status", status=429) if call.model == "gpt-4o-mini" else Fault()


def two_models(provider: Provider, ledger: Ledger) -> dspy.LM:
    """The second wants what DSPy demands of a reasoning model, and nothing of what the first has."""
    first = {"model": "openai/gpt-4o-mini", "temperature": 0.0, "max_tokens": 300, "seed": 3}
    second = {"model": "openai/gpt-5-mini", "temperature": 1.0, "max_tokens": 16_000}
    lms = [lm_on(provider, "auto", **settings) for settings in (first, second)]
    return fallback([metered(lm, ledger=ledger, worker="a", prices=PRICE) for lm in lms])


@both_ways
def test_each_lm_is_asked_with_settings_of_its_own(way: str) -> None:
    with Provider(fault=first_is_busy) as provider:
        assert ask(two_models(provider, Ledger(Budget(tokens=100_000))), way) == "ok"
        bodies: list[Mapping[str, Any]] = [call.body for call in provider.seen()]
    found = [
        (body["temperature"], body.get("max_tokens") or body.get("max_completion_tokens"), body.get("seed"))
        for body in bodies
    ]
    assert found == [(0.0, 300, 3), (1.0, 16_000, None)]


@both_ways
def test_what_a_call_asks_for_itself_goes_before_the_settings_of_all(way: str) -> None:
    with Provider(fault=first_is_busy) as provider:
        ask(two_models(provider, Ledger()), way, temperature=0.5)
        assert [call.body["temperature"] for call in provider.seen()] == [0.5, 0.5]


def test_a_copy_of_the_team_asks_all_for_what_it_was_copied_for() -> None:
    with Provider(fault=first_is_busy) as provider:
        two_models(provider, Ledger()).copy(temperature=0.7, rollout_id=2)("question")
        found = [(call.body["temperature"], call.body.get("seed")) for call in provider.seen()]
    assert found == [(0.7, 3), (0.7, None)]


# -- refusals


@both_ways
@pytest.mark.parametrize("error", [BUSY, DEAD], ids=["busy", "dead"])
def test_a_later_lms_refusal_is_no_verdict_on_the_program(way: str, error: Exception) -> None:
    """Neither right after the first LM has failed, nor while it is left out and only the second is asked."""
    asked: list[str] = []

    def second(messages: Any) -> str:
        asked.append("second")
        raise REFUSED

    lm = fallback([scripted_lm(raising(error)), scripted_lm(second)], clock=lambda: 0.0)
    for calls in (1, 2):
        with pytest.raises(dspy.LMError) as caught:
            ask(lm, way)
        assert classify(caught.value) is classify(error)
        assert len(asked) == calls


@both_ways
def test_the_first_lms_refusal_is_the_programs(way: str) -> None:
    asked: list[Any] = []
    second = scripted_lm(lambda messages: asked.append(messages) or "second")
    with pytest.raises(dspy.LMError) as caught:
        ask(fallback([scripted_lm(raising(REFUSED)), second]), way)
    assert classify(caught.value) is FailureKind.PROGRAM
    assert not asked


@both_ways
def test_after_a_refusal_the_next_lm_is_asked(way: str) -> None:
    third = scripted_lm(lambda messages: "third")
    lm = fallback([scripted_lm(raising(BUSY)), scripted_lm(raising(REFUSED)), third])
    assert ask(lm, way) == "third"


@both_ways
def test_a_refused_hedge_does_not_end_the_call(way: str) -> None:
    def fault(call: Call) -> Fault:
        return Fault("slow", seconds=0.3) if call.model == "slow" else Fault("status", status=400)

    with Provider(lambda messages: "late", fault=fault) as provider:
        lms = [lm_on(provider, "auto", model=f"openai/{name}") for name in ("slow", "other")]
        assert ask(fallback(lms, hedge_after_s=0.05), way) == "late"
        assert {call.model for call in provider.seen()} == {"slow", "other"}


def test_a_rollout_that_only_a_backup_refused_is_missing() -> None:
    class Sort(dspy.Signature):
        """Sort."""

        text: str = dspy.InputField()
        label: Literal["a", "b"] = dspy.OutputField()

    lm = fallback([scripted_lm(raising(BUSY)), scripted_lm(raising(REFUSED))])
    runner = RolloutRunner(lambda gold, pred: gold.label == pred.label)
    example = dspy.Example(text="hello", label="a").with_inputs("text")
    result = asyncio.run(runner.run(dspy.Predict(Sort), example, lm=lm))
    runner.close()
    assert result.score is None
    assert result.failure is FailureKind.TRANSIENT


# -- the cache


@both_ways
def test_an_answer_of_another_lm_is_not_cached_as_the_firsts(way: str) -> None:
    def cached(script: Callable[[Any], str], name: str) -> dspy.LM:
        return scripted_lm(script, name=name, cache=True)

    prompt = f"cached, {way}"
    backup = cached(lambda messages: "backup", "other")
    team = fallback([cached(raising(DEAD), "own"), backup])
    assert ask(team, way, prompt) == "backup"
    assert ask(cached(lambda messages: "own", "own"), way, prompt) == "own"
    # The team itself has its answer again, for nothing.
    again = fallback([cached(raising(DEAD), "own"), cached(raising(DEAD), "other")])
    assert ask(again, way, prompt) == "backup"
    alone = fallback([cached(raising(DEAD), "own")])
    assert ask(alone, way, prompt) == "own"
