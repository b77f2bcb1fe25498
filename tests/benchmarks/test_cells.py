from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import quality
from quality_bench import cells, lms, measure, tasks
from result_rows import made_row


def run_quality(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    monkeypatch.setattr(lms, "load", lambda name, precision: measure.half_right_lms(tasks.TASKS["sst2"]))
    quality.main()


def test_cells_that_a_file_holds_are_skipped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["--data", str(data), "--tasks", "sst2", "--lms", "a", "--budgets", "30", "--out", str(out)]
    run_quality(monkeypatch, *arguments, "--optimizers", "student,labeled_few_shot", "--seeds", "0")
    assert "2 cells, 2 to run" in capsys.readouterr().err
    with out.open("a", encoding="utf-8") as file:
        file.write('{"task": "sst2", "cut of')  # killed while it wrote
    run_quality(monkeypatch, *arguments, "--optimizers", "student,labeled_few_shot,asyndbt", "--seeds", "0,1")
    assert "5 cells, 3 to run" in capsys.readouterr().err
    rows = cells.read(out)
    assert [(row["optimizer"], row["seed"]) for row in rows] == [
        ("student", 0),
        ("labeled_few_shot", 0),
        ("asyndbt", 0),
        ("labeled_few_shot", 1),
        ("asyndbt", 1),
    ]
    run_quality(monkeypatch, *arguments, "--optimizers", "student,labeled_few_shot,asyndbt", "--seeds", "0,1")
    assert "5 cells, 0 to run" in capsys.readouterr().err


def test_the_json_line_holds_every_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    for row in (made_row("student", "1100"), made_row("asyndbt", "1110"), made_row("kate", "1111", budget=0)):
        cells.append(out, row)
    monkeypatch.setattr(sys, "argv", ["quality.py", "--report", str(out), "--json"])
    with pytest.raises(SystemExit) as ended:
        quality.main()
    assert ended.value.code is None
    [line] = capsys.readouterr().out.splitlines()
    budgets = json.loads(line)["budgets"]
    assert set(budgets) == {"300"}
    assert budgets["300"]["asyndbt"] == {"mean_test": 75.0, "rank": 1.0, "harm": 0.0}
    assert budgets["300"]["kate"]["rank"] is None


def test_rows_of_a_smoke_run_do_not_stand_for_cells(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["--data", str(data), "--tasks", "sst2", "--lms", "a", "--optimizers", "student"]
    arguments += ["--out", str(out)]
    run_quality(monkeypatch, *arguments, "--test-limit", "2")
    run_quality(monkeypatch, *arguments, "--test-limit", "2")
    assert [line for line in capsys.readouterr().err.splitlines() if "to run" in line] == [
        "1 cells, 1 to run",
        "1 cells, 0 to run",
    ]
    run_quality(monkeypatch, *arguments)
    short, whole = cells.read(out)
    assert short["test_limit"] == len(short["test_bits"]) == 2 < len(whole["test_bits"])
    monkeypatch.setattr(sys, "argv", ["quality.py", "--report", str(out), "--json"])
    with pytest.raises(SystemExit, match="mixes rows of different --test-limit"):
        quality.main()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json"], "--json goes with --report"),
        (["--write-docs", "x.md"], "--write-docs goes with --report"),
        (["--verify", "-1"], "--verify -1 must be at least 0"),
        (["--test-limit", "5"], "give them a file of their own"),
        (["--optimizers", "bogus"], "no optimizer 'bogus'"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str],
    said: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_quality(monkeypatch, "--data", str(data), *arguments)
    assert said in capsys.readouterr().err + str(ended.value.code)


def test_options_of_a_variant_are_not_split_at_their_commas() -> None:
    assert quality._listed("student,asyndbt[race=False,draws=4],copro") == [
        "student",
        "asyndbt[race=False,draws=4]",
        "copro",
    ]


def test_the_test_part_is_not_for_optimizers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quality_bench import optimizers

    seen = []

    def spy(job: optimizers.Job) -> optimizers.Outcome:
        seen.append(job.examples)
        return optimizers.Outcome(job.task.build())

    monkeypatch.setattr(optimizers, "find", lambda name: optimizers.Optimizer(spy))
    task = tasks.TASKS["sst2"]
    cells.run(cells.Key("sst2", "x", "spy", 30, 0), measure.half_right_lms(task), data)
    [given] = seen
    assert (len(given.train), len(given.valid), given.test) == (48, 12, [])


def test_a_balanced_sample_is_even_and_repeats() -> None:
    examples = measure.made_examples(tasks.TASKS["trec"], 60, 0).train
    drawn = tasks.balanced(examples, 12, 1)
    labels = [one.label for one in drawn]
    assert all(labels.count(label) == 2 for label in tasks.TASKS["trec"].labels)
    assert drawn == tasks.balanced(examples, 12, 1) != tasks.balanced(examples, 12, 2)
    assert len(tasks.balanced(examples, 100, 1)) == 60
