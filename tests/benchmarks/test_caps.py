"""The summary of ``benchmarks/caps.py``: means per version and cap."""

from __future__ import annotations

from typing import Any

import caps
import pytest


def row(arm: str, seed: int, test: float, label: str = "shipped", **changes: Any) -> dict[str, Any]:
    known = {"task": "sst2", "lm": "m", "calls": 100, "metric_calls": 90, "student": 40.0, "raced_on": 10}
    known |= {"is_student": False, "verdict": 0, **changes}
    return {"label": label, "arm": arm, "seed": seed, "test": test, **known}


def test_means_are_per_version_and_cap() -> None:
    rows = [
        row("metric_calls", 0, 50.0),
        row("metric_calls", 1, 30.0, verdict=-1, metric_calls=100, raced_on=20),
        row("lm_calls", 0, 60.0),
        row("lm_calls", 0, 40.0, label="before", is_student=True),
    ]
    found = caps.summary(rows)
    assert set(found) == {"benchmark", "metric_calls, shipped", "lm_calls, shipped", "lm_calls, before"}
    assert found["metric_calls, shipped"] == {
        "runs": 2, "metric_calls": 95.0, "test": 40.0, "student": 40.0, "raced_on": 15.0,
        "returned_student": 0, "harmed": 1,
    }  # fmt: skip
    assert found["lm_calls, before"]["returned_student"] == 1


def test_a_run_is_known_by_version_cap_cell_and_seed() -> None:
    first = row("lm_calls", 0, 50.0)
    assert caps.key_of(first) == caps.key_of(row("lm_calls", 0, 10.0))
    for changed in ({"label": "before"}, {"arm": "tokens"}, {"task": "trec"}, {"seed": 1}, {"calls": 300}):
        assert caps.key_of({**first, **changed}) != caps.key_of(first)


def test_the_committed_rows_are_those_of_the_figures() -> None:
    found = caps.summary(caps.cells.read(caps.OUT))
    assert {name: one["runs"] for name, one in found.items() if name != "benchmark"} == {
        "metric_calls, shipped": 6, "lm_calls, shipped": 6, "seconds, shipped": 6, "lm_calls, before": 6,
    }  # fmt: skip
    assert found["lm_calls, shipped"]["test"] == pytest.approx(35.2, abs=0.05)
    assert found["lm_calls, before"]["test"] == pytest.approx(28.5, abs=0.05)
