"""Caps hold over all processes of a run together."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from crashes import Asked, compiled, entries, killed_after

from asyndbt_dspy import Budget


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_cap_on_lm_calls_holds_over_all_deaths_together(tmp_path: Path, deterministic: bool) -> None:
    moments = random.Random(5)
    for attempt in range(4):
        folder, asked, optimizer = tmp_path / str(attempt), Asked(kit.stairs(1)), None
        for line in (moments.randrange(20, 350), moments.randrange(20, 120), None, None):
            with killed_after(line):
                optimizer, _ = compiled(
                    folder, asked, deterministic=deterministic, budget=Budget(metric_calls=400, lm_calls=90)
                )
        assert optimizer is not None and optimizer.result is not None
        assert 60 < len(asked.prompts) <= 90
        spent = sum(line["attempts"] for line in optimizer.result.spending.values())
        assert len(asked.prompts) <= spent <= 90, "attempts that died with their process count as well"


def paid_for(folder: Path) -> int:
    """Completed rollouts of all processes, but for those that a worker took from another one."""
    return sum("score" in one and "shared" not in one for one in entries(folder, "rollout"))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("caps", [(60, 120), (100, 101, 120)])
def test_a_raised_cap_on_metric_calls_holds_over_all_that_was_ever_paid_for(
    tmp_path: Path, deterministic: bool, caps: tuple[int, ...]
) -> None:
    """The race of a smaller budget is not run again by a larger one, and was paid for all the same."""
    asked = Asked(kit.stairs(1))
    for cap in caps:
        for lines in (30, None, None):
            before = len(asked.prompts)
            with killed_after(lines):
                compiled(tmp_path, asked, deterministic=deterministic, budget=Budget(metric_calls=cap))
            assert paid_for(tmp_path) <= cap
        assert len(asked.prompts) == before, "the run was over"
    assert paid_for(tmp_path) > caps[0]


@pytest.mark.parametrize("deterministic", [True, False])
def test_without_its_cap_on_lm_calls_a_run_keeps_that_on_metric_calls(
    tmp_path: Path, deterministic: bool
) -> None:
    for lm_calls in (60, 100, None):
        budget = Budget(metric_calls=130, lm_calls=lm_calls)
        optimizer, _ = compiled(tmp_path, kit.stairs(1), deterministic=deterministic, budget=budget)
    assert optimizer.result.winner != "student"
    assert 100 < paid_for(tmp_path) <= 130


def test_a_raise_keeps_its_share_for_the_race_and_says_what_was_paid_for_in_vain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for cap in (100, 140):
        optimizer, _ = compiled(tmp_path, kit.stairs(1), deterministic=False, budget=Budget(metric_calls=cap))
        assert optimizer.result.winner != "student"
        raced = sum(one.examples for one in optimizer.result.candidates)
        assert raced > 30, "the race of the raised run is no shorter"
    assert re.search(r"the cap of 140 metric calls: \d+ that earlier processes paid for", caplog.text)
