from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quality_bench import cells, lms, measure, tasks, verify


@pytest.fixture
def results(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    loaded = measure.half_right_lms(tasks.TASKS["trec"])
    monkeypatch.setattr(lms, "load", lambda name, precision: measure.half_right_lms(tasks.TASKS["trec"]))
    out = tmp_path / "results.jsonl"
    for name, budget in (("labeled_few_shot", 0), ("asyndbt", 45)):
        cells.append(out, cells.run(cells.Key("trec", loaded.name, name, budget, 0), loaded, data))
    return out


def test_an_honest_file_is_confirmed(results: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(results, data, 10) is None
    assert capsys.readouterr().out.count("match:") == 2


def test_a_doctored_row_is_found(results: Path, data: Path, tmp_path: Path) -> None:
    rows = cells.read(results)
    rows[0]["test_bits"] = "1" * len(rows[0]["test_bits"])
    doctored = tmp_path / "doctored.jsonl"
    for row in rows:
        cells.append(doctored, row)
    assert verify.main(doctored, data, 10) == "1 of 2 rows differ"


def test_an_empty_file_is_an_error(tmp_path: Path, data: Path) -> None:
    assert "no rows" in str(verify.main(tmp_path / "none.jsonl", data, 3))


def test_of_a_run_that_timing_decides_the_program_alone_is_checked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task, out = tasks.TASKS["trec"], tmp_path / "results.jsonl"
    monkeypatch.setattr(lms, "load", lambda name, precision: measure.half_right_lms(task))
    loaded = measure.half_right_lms(task)
    key = cells.Key("trec", loaded.name, "asyndbt[deterministic=False]", 45, 0)
    cells.append(out, row := cells.run(key, loaded, data))
    made = []
    monkeypatch.setattr(cells, "run", lambda *_, **__: made.append(1))
    assert verify.main(out, data, 1) is None
    assert "cannot be repeated" in capsys.readouterr().out
    cells.append(other := tmp_path / "doctored.jsonl", {**row, "test_bits": "1" * len(row["test_bits"])})
    assert verify.main(other, data, 1) == "1 of 1 rows differ"
    assert made == []


def test_a_row_is_made_again_with_its_own_constants(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks.TASKS["trec"]
    monkeypatch.setattr(lms, "load", lambda name, precision: measure.half_right_lms(task))
    loaded = measure.half_right_lms(task)
    row = cells.run(cells.Key("trec", loaded.name, "asyndbt", 45, 0), loaded, data)
    algorithm = row["settings"]["algorithm"]
    earlier = {name: value for name, value in algorithm.items() if name != "accept_score_z"}
    settings = {"algorithm": {**earlier, "race_fraction": 0.25}}
    cells.append(out := tmp_path / "results.jsonl", {**row, "settings": settings})
    again: list[dict[str, Any]] = []
    run = cells.run

    def noted(*arguments: Any, **options: Any) -> Any:
        again.append(run(*arguments, **options))
        return again[-1]

    monkeypatch.setattr(cells, "run", noted)
    verify.main(out, data, 1)
    changed = {"race_fraction": 0.25, "accept_score_z": 0.0}
    assert again[0]["settings"]["algorithm"] == {**algorithm, **changed}
