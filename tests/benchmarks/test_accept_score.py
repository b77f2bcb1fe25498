"""What runs would have come to with another bar of the metric alone, by hand."""

from __future__ import annotations

from typing import Any

import accept_score


def line(task: str, seed: int, test: float, z: float | None, harmed: bool = False) -> dict[str, Any]:
    advantage, error = (None, None) if z is None else (0.1 * z, 0.1)
    return {
        "task": task,
        "lm": "smollm2-135m",
        "optimizer": "asyndbt",
        "budget": 300,
        "seed": seed,
        "test": test,
        "student": 50.0,
        "harmed": harmed,
        "advantage": advantage,
        "error": error,
    }


def test_below_the_bar_the_student_comes_back() -> None:
    lines = [
        line("sst2", 0, 70.0, 1.2),
        line("sst2", 1, 50.0, None),  # returned anyway
        line("cola", 0, 40.0, 0.4, harmed=True),
    ]
    rows = [row.split("|")[1:-1] for row in accept_score.table(lines).splitlines()[2:]]
    found = {float(row[1]): [cell.strip() for cell in row[2:]] for row in rows}
    assert found[0.0] == ["0 of 3", "50.0", "60.0", "1"]
    assert found[0.5] == ["1 of 3", "55.0", "60.0", "0"]
    assert found[1.5] == ["2 of 3", "50.0", "50.0", "0"]
