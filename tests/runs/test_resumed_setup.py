"""A setup that went on without a straggler is the same setup when the run goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import dspy
import kit
import pytest
from crashes import compiled, entries, killed_after, steady

from asyndbt_dspy import Budget, Worker
from asyndbt_dspy.core import call_times
from asyndbt_dspy.lms.scripted import AsyncScriptedEngine

_TRACES = 18
"""Calls of the setup for traces: 12 % of 150."""


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


@contextlib.contextmanager
def impatience() -> Iterator[None]:
    """Eight times as long as the others is long, however short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(call_times, "_LEAST_S", 0.0)
        yield


class Engine(AsyncScriptedEngine):
    """Answers by ``kit.stairs``, but to one item never; notes the items in the order in which they are asked."""

    def __init__(self, silent_on: int | None = None) -> None:
        super().__init__(kit.stairs(1), supports_schema=True)
        self.silent_on = silent_on
        self.asked: list[int] = []

    async def complete(self, request: Any) -> Any:
        number = kit.number_in([{"content": str(request.messages[-1].parts[-1].text)}])
        self.asked.append(number)
        if number == self.silent_on:
            await asyncio.Event().wait()
        return await super().complete(request)


def run(folder: Path, engine: Engine, **options: Any) -> tuple[Any, Any]:
    lm = kit.lm_over(kit.stairs(1), engine)
    options = {"deterministic": False, "bootstrap": True, "budget": Budget(metric_calls=150)} | options
    return compiled(folder, None, lm=lm, **options)


def a_good_trace(folder: Path) -> int:
    """An item that the setup takes a trace from: the student, which knows nothing, says red, and is right."""
    run(folder, engine := Engine())
    traced = engine.asked[2 : 2 + _TRACES]
    return next(number for number in traced if kit.right_label(number) == "red")


def test_what_the_setup_went_on_without_is_left_out_when_the_run_goes_on(tmp_path: Path) -> None:
    silent_on = a_good_trace(tmp_path / "plain")
    folder = tmp_path / "run"
    with killed_after(60), impatience():
        run(folder, Engine(silent_on))
    (space,) = entries(folder, "space")
    before = [entry["key"] for entry in entries(folder, "rollout")]
    optimizer, program = run(folder, again := Engine())
    assert program is not None
    assert entries(folder, "space") == [space]
    keys = [entry["key"] for entry in entries(folder, "rollout")]
    assert set(before) <= set(keys) and len(keys) == len(set(keys)), "what is recorded is not paid for again"
    assert len(again.asked) == len(keys) - len(before)
    assert optimizer.result.metric_calls <= 150
    once_more, same = run(folder, quiet := Engine())
    assert quiet.asked == []
    assert steady(once_more.result) == steady(optimizer.result) and kit.state_of(same) == kit.state_of(
        program
    )


def test_a_setup_that_was_not_over_is_made_anew_from_what_is_recorded(tmp_path: Path) -> None:
    silent_on = a_good_trace(tmp_path / "plain")
    folder = tmp_path / "run"
    with killed_after(12), impatience():
        run(folder, Engine(silent_on))
    assert entries(folder, "space") == []
    before = len(entries(folder, "rollout"))
    optimizer, program = run(folder, again := Engine())
    assert before > 0 and program is not None
    assert silent_on in again.asked
    assert len(again.asked) == optimizer.result.metric_calls - before


def test_a_raised_budget_takes_no_more_traces(tmp_path: Path) -> None:
    first, _ = run(tmp_path, Engine())
    (space,) = entries(tmp_path, "space")
    before = [entry["key"] for entry in entries(tmp_path, "rollout")]
    more, program = run(tmp_path, again := Engine(), budget=Budget(metric_calls=250))
    assert program is not None
    assert entries(tmp_path, "space") == [space]
    assert first.result.metric_calls <= 150 < more.result.metric_calls <= 250
    keys = [entry["key"] for entry in entries(tmp_path, "rollout")]
    # What one worker was paid for and another one takes is recorded once more, and asked of nobody.
    assert set(before) <= set(keys) and 0 < len(again.asked) <= len(keys) - len(before)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_setup_of_unequal_shards_is_the_same_when_the_run_goes_on(
    tmp_path: Path, deterministic: bool
) -> None:
    """The traces' calls are dealt out to pools of which one is used up before its share is."""
    workers = [Worker("small", kit.examples(20)), Worker("large", kit.examples(80, start=1000))]
    options = {"workers": workers, "budget": Budget(metric_calls=400), "deterministic": deterministic}
    run(tmp_path, Engine(), **options)
    (setup,) = entries(tmp_path, "setup")
    made = len(setup["in_time"]["traces"])
    assert made < setup["asked"]["traces"] == 48, "12 % of 400"
    _, program = run(tmp_path, again := Engine(), **options)
    assert program is not None and again.asked == []


def test_a_trace_that_no_journal_can_hold_is_made_again(tmp_path: Path) -> None:
    class Choose(dspy.Signature):
        """Choose by the facts."""

        facts: list[str] = dspy.InputField()
        label: Literal["red", "green", "blue"] = dspy.OutputField()

    class Tuples(dspy.Module):
        """Passes a tuple where a list is declared."""

        def __init__(self) -> None:
            super().__init__()
            self.topic = dspy.Predict(kit.Topic)
            self.choose = dspy.Predict(Choose)

        def forward(self, message: str) -> dspy.Prediction:
            return self.choose(facts=(self.topic(message=message).topic, message))

    asked: list[str] = []

    def script(messages: list[dict[str, str]]) -> str:
        asked.append(messages[-1]["content"])
        return kit.answer(messages, topic="t", label="red")

    options: dict[str, Any] = {"budget": Budget(metric_calls=150)}
    first, program = compiled(tmp_path, script, Tuples(), **options)
    (setup,) = entries(tmp_path, "setup")
    before = len(asked)
    again, same = compiled(tmp_path, script, Tuples(), **options)
    assert kit.state_of(same) == kit.state_of(program)
    assert steady(again.result) == steady(first.result)
    assert len(asked) - before == 2 * len(setup["in_time"]["traces"]), "two predictors each"


def test_a_worker_that_failed_in_the_setup_is_not_asked_for_the_same_again(tmp_path: Path) -> None:
    class Broken(Engine):
        async def complete(self, request: Any) -> Any:
            self.asked.append(0)
            raise ConnectionError("nobody there")

    def workers(broken: Engine) -> list[Worker]:
        lm = kit.lm_over(kit.stairs(1), broken, "broken")
        return [Worker("good", kit.examples(40)), Worker("bad", kit.examples(40, start=1000), lm=lm)]

    options: dict[str, Any] = {"deterministic": True, "max_failures": 3}
    first, program = run(tmp_path, Engine(), workers=workers(Broken()), **options)
    assert first.result.workers[1].set_aside
    again, same = run(tmp_path, quiet := Engine(), workers=workers(broken := Broken()), **options)
    assert (quiet.asked, broken.asked) == ([], [])
    assert steady(again.result) == steady(first.result) and kit.state_of(same) == kit.state_of(program)
