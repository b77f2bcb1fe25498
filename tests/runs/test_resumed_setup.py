"""A setup that went on without a straggler is the same setup when the run goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from crashes import compiled, entries, killed_after, steady

from asyndbt_dspy import Budget
from asyndbt_dspy.lms.scripted import AsyncScriptedEngine, ScriptedEngine
from asyndbt_dspy.programs import stragglers

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
        patch.setattr(stragglers, "_LEAST_S", 0.0)
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
    lm = dspy.LM(
        "scripted/m",
        engine=ScriptedEngine(kit.stairs(1), True),
        async_engine=engine,
        cache=False,
        num_retries=0,
        temperature=0.0,
    )
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
