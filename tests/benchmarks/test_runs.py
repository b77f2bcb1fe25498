from __future__ import annotations

import ctypes
import multiprocessing
from pathlib import Path

import pytest
from quality_bench import cells, lms, measure, runs, tasks

KEYS = [cells.Key("sst2", "a", "labeled_few_shot", 0, seed) for seed in range(4)]


def test_processes_take_every_cell_once() -> None:
    place = multiprocessing.get_context("spawn").Value(ctypes.c_int, 0)
    first, second = runs.claimed(KEYS, place), runs.claimed(KEYS, place)
    taken = [next(first), next(second), next(second), *first, *second]
    assert taken == KEYS


@pytest.mark.parametrize("told", [True, False])
def test_a_cell_that_fails_stops_only_a_run_that_nobody_else_goes_on_with(
    told: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lms, "load", lambda name, precision: measure.half_right_lms(tasks.TASKS["sst2"]))
    options = runs.Options(tmp_path / "rows.jsonl", data)
    keys = [KEYS[0], cells.Key("sst2", "a", "no such optimizer", 0, 0), KEYS[1]]
    failed: list[cells.Key] = []
    if told:
        runs.run_all(iter(keys), options, failed=failed.append)
        assert failed == [keys[1]]
    else:
        with pytest.raises(KeyError, match="no such optimizer"):
            runs.run_all(iter(keys), options)
    done = [cells.Key.of(row) for row in cells.read(options.out)]
    assert done == ([KEYS[0], KEYS[1]] if told else [KEYS[0]])


def test_two_processes_write_one_file(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    keys = [cells.Key(name, "smollm2-135m", "student", 0, 0) for name in ("sst2", "trec")]
    keys.append(cells.Key("sst2", "smollm2-135m", "no such optimizer", 0, 0))
    options = runs.Options(tmp_path / "rows.jsonl", data, test_limit=2)
    assert runs.run(keys, options, processes=2) == 1
    rows = cells.read(options.out)
    assert sorted(cells.Key.of(row) for row in rows) == sorted(keys[:2])
    assert all(len(row["test_bits"]) == 2 and row["device"] == cells.device() for row in rows)
    assert "no such optimizer" in capfd.readouterr().err
