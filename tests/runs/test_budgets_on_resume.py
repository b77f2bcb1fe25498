"""Caps hold over all processes of a run together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from crashes import Asked, compiled, killed_after

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
