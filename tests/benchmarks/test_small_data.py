"""The summary of ``benchmarks/small_data.py``: means over the cells that all arms have."""

from __future__ import annotations

import small_data


def row(task: str, arm: str, test: float, seed: int = 0, count: int = 40, verdict: int = 0) -> small_data.Row:
    return {
        "task": task,
        "lm": "m",
        "examples": count,
        "arm": arm,
        "seed": seed,
        "is_student": verdict == 0,
        "test": test,
        "student": 30.0,
        "verdict": verdict,
    }


def test_cells_of_one_arm_alone_do_not_count() -> None:
    rows = [
        row("a", "quarter", 40.0),
        row("a", "shipped", 50.0, verdict=1),
        row("a", "shipped", 60.0, seed=1, verdict=1),
        row("b", "quarter", 20.0),
        row("b", "shipped", 10.0, verdict=-1),
        row("c", "shipped", 99.0),
    ]
    found = small_data.summary(rows)["40"]
    assert found["quarter"] == {
        "runs": 2,
        "test": 30.0,
        "student": 30.0,
        "returned_student": 2,
        "harmed": 0,
    }
    assert found["shipped"] == {
        "runs": 3,
        "test": 32.5,  # each cell counts alike
        "student": 30.0,
        "returned_student": 0,
        "harmed": 1,
    }


def test_numbers_of_examples_are_apart_and_may_lack_an_arm() -> None:
    found = small_data.summary([row("a", "quarter", 40.0), row("a", "quarter", 20.0, count=20)])
    assert found == {"benchmark": "small_data", "20": {}, "40": {}}
