from __future__ import annotations

import importlib.util
from pathlib import Path

import dspy
import pytest
from quality_bench import cells, embeddings, measure, optimizers, tasks
from quality_bench.incumbents import Incumbent

NEEDS = {
    "gepa": "gepa",
    "mipro_v2": "optuna",
    "kate": embeddings.PACKAGE,
    "adaicl": embeddings.PACKAGE,
    "embedding_classifier": embeddings.PACKAGE,
}
REQUIRED = [
    "student",
    "labeled_few_shot",
    "bootstrap_rs",
    "mipro_v2",
    "simba",
    "gepa",
    "copro",
    "manual_prompt",
    "zero_shot_cot",
    "random_icl",
    "kate",
    "adaicl",
    "embedding_classifier",
    "bdpl",
    "asyndbt",
    "asyndbt_paper",
    "cendbt",
    "asyndbt_prompt_only",
    "asyndbt_demo_only",
]


def test_every_required_optimizer_has_its_key() -> None:
    assert sorted(optimizers.keys()) == sorted(REQUIRED)


def need(name: str) -> None:
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{name} needs the package {package}")


@pytest.mark.parametrize("name", REQUIRED)
def test_every_optimizer_returns_a_program_that_is_scored(name: str, data: Path) -> None:
    need(name)
    lms = measure.half_right_lms(tasks.TASKS["sst2"])
    [key] = cells.grid(["sst2"], [lms.name], [name], [60], [0])
    row = cells.run(key, lms, data)
    assert len(row["test_bits"]) == 10
    assert row["test"] == 100 * row["test_bits"].count("1") / 10
    assert bool(row["state"]) == (name not in ("kate", "adaicl", "embedding_classifier"))
    if optimizers.find(name).searches:
        assert 0 < row["task_lm_calls"] <= 150
    else:
        assert row["task_lm_calls"] == row["proposer_calls"] == 0
    if name in ("mipro_v2", "gepa", "copro"):
        assert row["proposer_calls"] > 0


@pytest.mark.parametrize("name", ["bootstrap_rs", "mipro_v2", "copro", "asyndbt", "zero_shot_cot"])
def test_programs_of_two_predictors_are_charged_per_lm_call(name: str, data: Path) -> None:
    need(name)
    task = tasks.TASKS["ag_news_two_step"]
    lms = measure.half_right_lms(task)
    [key] = cells.grid([task.name], [lms.name], [name], [80], [0])
    row = cells.run(key, lms, data)
    assert set(row["state"]) >= {"extract"}
    if name == "asyndbt":
        assert row["task_lm_calls"] <= 80


def test_our_budget_is_kept_and_incumbents_are_scored(data: Path) -> None:
    lms = measure.half_right_lms(tasks.TASKS["trec"])
    key = cells.Key("trec", lms.name, "asyndbt", 90, 0)
    row = cells.run(key, lms, data, incumbents=True)
    assert row["finalists"] and all(one["examples"] > 0 and one["error"] > 0 for one in row["finalists"])
    assert sum(one["won"] for one in row["finalists"]) <= 1
    assert row["task_lm_calls"] <= 90
    calls = [one["calls"] for one in row["incumbents"]]
    assert len(calls) >= 3
    assert calls == sorted(calls)
    assert calls[-1] <= 90


def test_an_incumbent_of_several_points_is_scored_once(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.TASKS["sst2"]
    one, other = task.build(), task.build()
    one.demos, other.demos = [dspy.Example(sentence="a", label="positive")], []
    along = [Incumbent(calls, program) for calls, program in ((5, one), (9, other), (20, one), (30, other))]
    outcome = optimizers.Outcome(other, incumbents=along)
    monkeypatch.setattr(optimizers, "find", lambda name: optimizers.Optimizer(lambda job: outcome))
    scored = []

    def correct(program: dspy.Module, examples: list[dspy.Example]) -> list[bool]:
        scored.append(program)
        return [program is one] * len(examples)

    monkeypatch.setattr(cells, "correct", correct)
    row = cells.run(cells.Key("sst2", "x", "spy", 30, 0), measure.half_right_lms(task), data)
    assert [point["test"] for point in row["incumbents"]] == [100.0, 0.0, 100.0, 0.0]
    assert scored == [
        other,
        other,
        one,
    ]  # valid and test of the result, then the one incumbent that is another


def test_a_run_repeats_itself(data: Path) -> None:
    lms = measure.half_right_lms(tasks.TASKS["trec"])
    key = cells.Key("trec", lms.name, "asyndbt", 60, 3)
    first, second = (cells.run(key, lms, data) for _ in range(2))
    for name in ("program", "test_bits", "task_lm_calls"):
        assert first[name] == second[name]


def test_a_variant_sets_arguments_and_constants() -> None:
    assert optimizers.find("asyndbt[race=False,draws=4,demo_slots=2]").ranked
    assert optimizers._split({"race": False, "demo_slots": 2, "active_workers": 2}) == (
        {"demo_slots": 2, "active_workers": 2},
        {"race": False},
    )
    # `loss` is a constant and an argument: the metric alone is the argument's.
    assert optimizers._split({"loss": "metric"}) == ({"loss": "metric"}, {})
    assert optimizers._split({"loss": "cross_entropy"}) == ({}, {"loss": "cross_entropy"})
    for odd in ("asyndbt[race]", "asyndbt[foo=1]", "asyndbt[race=]", "asyndbt[race=os]"):
        with pytest.raises(KeyError, match=r"name=value"):
            optimizers.find(odd)
    with pytest.raises(KeyError, match="only asyndbt"):
        optimizers.find("simba[steps=3]")
    with pytest.raises(KeyError, match="no optimizer"):
        optimizers.find("simbo")


def test_a_committed_program_is_rebuilt_from_its_row(data: Path) -> None:
    task = tasks.TASKS["trec"]
    lms = measure.half_right_lms(task)
    row = cells.run(cells.Key("trec", lms.name, "labeled_few_shot", 0, 0), lms, data)
    rebuilt = cells.with_state(cells.student_of(cells.Key.of(row)), row["state"])
    assert len(rebuilt.demos) == 16
    assert cells.fingerprint(cells.program_state(rebuilt)) == row["program"]
