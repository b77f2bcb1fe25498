"""What one can look at after a compile, and while it runs."""

from __future__ import annotations

import json
import math
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Result


@pytest.fixture(scope="module")
def compiled() -> tuple[AsynDBT, dspy.Module]:
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(workers=3, instructions=kit.texts_for(student, kit.MAGIC))
    with dspy.context(adapter=dspy.JSONAdapter(), lm=kit.make_lm(kit.two_levels)):
        return optimizer, optimizer.compile(student, trainset=kit.examples(72))


def test_it_is_strict_json(compiled: tuple[AsynDBT, dspy.Module]) -> None:
    result = compiled[0].result
    assert isinstance(result, Result)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text) == result.to_dict()
    assert json.loads(result.to_json()) == result.to_dict()


def test_candidates_have_scores_and_intervals(compiled: tuple[AsynDBT, dspy.Module]) -> None:
    optimizer, program = compiled
    result = optimizer.result
    student, *others = result.candidates
    assert student.name == "student"
    assert student.advantage is None
    assert len(others) >= 1
    for one in result.candidates:
        assert one.low <= one.score <= one.high
        assert one.examples > 0
    winner = next(one for one in result.candidates if one.won)
    assert winner.name == result.winner
    assert sum(one.won for one in result.candidates) == 1
    assert winner.advantage > 0
    assert winner.program["self"]["instructions"] == program.signature.instructions
    shown = [{name: value for name, value in demo.items() if name != "augmented"} for demo in program.demos]
    assert winner.program["self"]["demos"] == shown


def test_curves_say_what_happened(compiled: tuple[AsynDBT, dspy.Module]) -> None:
    curve = compiled[0].result.curve
    assert [one.version for one in curve] == list(range(1, len(curve) + 1))
    assert all(curve[n].calls <= curve[n + 1].calls for n in range(len(curve) - 1))
    assert all(0 <= one.loss <= 1 for one in curve)
    for one in curve:
        for distribution in one.z.values():
            assert math.isclose(sum(distribution), 1.0)
        assert len(one.active) == len(one.staleness)


def test_every_worker_has_calls_tokens_seconds_and_staleness(compiled: tuple[AsynDBT, dspy.Module]) -> None:
    result = compiled[0].result
    assert [one.name for one in result.workers] == ["worker-1", "worker-2", "worker-3"]
    assert sum(one.calls for one in result.workers) == result.metric_calls
    for one in result.workers:
        # The scripted LM reports one token each way; one predictor is one LM call per rollout.
        assert (one.lm_calls, one.prompt_tokens, one.completion_tokens) == (one.calls,) * 3
        assert one.busy_s > 0
        assert one.steps > 0
        assert 0 <= one.mean_staleness <= one.largest_staleness
    assert 0.3 < result.utilisation <= 1.0
    assert result.largest_staleness == max(one.largest_staleness for one in result.workers)
    assert 0 <= result.mean_staleness <= result.largest_staleness
    assert f"{result.utilisation:.0%} of the workers' time" in str(result)


def test_the_table_shows_winner_scores_and_workers(compiled: tuple[AsynDBT, dspy.Module]) -> None:
    result = compiled[0].result
    table = str(result)
    assert f"{result.winner} won after {result.metric_calls} metric calls" in table
    assert result.why in table
    for one in result.candidates:
        row = next(
            line
            for line in table.splitlines()
            if line.startswith(one.name) and "examples" not in line and "won after" not in line
        )
        assert f"{one.score:.3f}" in row
        assert f"{one.low:.3f} … {one.high:.3f}" in row
        assert row.endswith("won" if one.won else "eliminated" if one.eliminated else "lost")
    for worker in result.workers:
        assert any(
            line.startswith(worker.name) and f" {worker.calls} " in line for line in table.splitlines()
        )
    assert max(len(line) for line in table.splitlines()) <= 130


def test_a_candidate_that_is_ahead_by_too_little_is_named() -> None:
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(instructions=kit.texts_for(student, kit.MAGIC), config={"accept_z": 100.0})
    with dspy.context(lm=kit.color_lm()):
        program = optimizer.compile(student, trainset=kit.examples(48))
    result = optimizer.result
    best = max(result.candidates[1:], key=lambda one: one.advantage if not one.eliminated else -1.0)
    assert (result.winner, kit.state_of(program)) == ("student", kit.state_of(student)) and best.advantage > 0
    assert f"{best.name} was ahead of the student by {best.advantage:+.3f}" in result.why
    assert "standard errors, so the student is returned" in result.why


def test_a_run_without_a_race_says_why_it_won() -> None:
    optimizer = kit.optimizer(preset="paper", fragments=2)
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(48))
    assert "No race was run" in str(optimizer.result)
    assert optimizer.result.candidates[0].score is None
    json.dumps(optimizer.result.to_dict(), allow_nan=False)


def test_get_params_is_plain_data() -> None:
    optimizer = kit.optimizer(proposer=kit.color_lm("proposer"), engine=None)
    assert json.loads(json.dumps(optimizer.get_params()))["budget"]["metric_calls"] == 120


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_is_on_standard_error_and_can_be_turned_off(
    progress: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(progress=progress, instructions=kit.texts_for(student, kit.MAGIC))
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(student, trainset=kit.examples(48))
    written = capsys.readouterr()
    assert written.out == ""
    if not progress:
        assert written.err == ""
        return
    assert "AsynDBT" in written.err
    assert "/120" in written.err
    assert "best " in written.err
    total = optimizer.result.metric_calls
    assert f" {total}/120" in written.err, "the bar ends at what was spent"


def test_an_error_closes_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def metric(gold: Any, prediction: Any) -> Any:
        asked.append(gold)
        return None if len(asked) > 20 else 1.0

    from tqdm import tqdm

    before = len(getattr(tqdm, "_instances", ()))
    with dspy.context(lm=kit.color_lm()), pytest.raises(Exception, match="returned None"):
        kit.optimizer(progress=True, metric=metric).compile(dspy.Predict(kit.Sort), trainset=kit.examples(48))
    assert len(getattr(tqdm, "_instances", ())) == before
    assert "AsynDBT" in capsys.readouterr().err
