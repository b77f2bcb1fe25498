"""What a run's journals say of it while it goes on, after a crash, and at its end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from crashes import entries, killed_after, killed_before

from asyndbt_dspy import Budget, Price, Worker
from asyndbt_dspy.cli import main
from asyndbt_dspy.errors import ConfigurationError, JournalError, MetricError
from asyndbt_dspy.recording.status import RunStatus, read_status
from asyndbt_dspy.runs.journal import decode_line, encode_line
from asyndbt_dspy.runs.run_directory import this_host


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter()):
        yield


def run(folder: Path, **options: Any) -> Any:
    """One compile, or what it came to before it was killed."""
    optimizer = kit.optimizer(run_dir=folder, resume=True, **options)
    workers = options.get("workers")
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(
            dspy.Predict(kit.Sort), trainset=None if isinstance(workers, list) else kit.examples(60)
        )
    return optimizer.result


def is_race(entry: Any) -> bool:
    return bool(entry["kind"] == "event" and entry["event"]["type"] == "RaceReply")


def test_a_finished_run_is_told_as_its_result_tells_it(tmp_path: Path) -> None:
    result = run(tmp_path, prices={"scripted/colors": Price(1.0, 2.0)})
    found = read_status(tmp_path)
    assert (found.run, found.phase, found.reason) == (1, "over", result.stopped)
    assert found.metric_calls == result.metric_calls
    assert found.budget == {"metric_calls": 120}
    assert found.processes == 1
    for one, known in zip(found.workers, result.workers, strict=True):
        assert (one.name, one.rollouts, one.missing, one.failed) == (known.name, known.calls, 0, 0)
        line = result.spending[one.name]
        assert (one.attempts, one.in_flight, one.tokens) == (
            line["attempts"],
            0,
            known.prompt_tokens + known.completion_tokens,
        )
        assert one.dollars == pytest.approx(float(line["dollars"]))
    assert found.dollars == pytest.approx(sum(one.dollars for one in found.workers))
    assert found.dollars > 0
    raced = sorted((round(one.score, 9), one.examples) for one in result.candidates if one.examples)
    assert sorted((round(one.score, 9), one.examples) for one in found.finalists) == raced
    assert found.winner in [one.name for one in found.finalists]
    assert (found.winner == "student") == (result.winner == "student")


def test_scores_are_of_all_rollouts_and_of_the_newest(tmp_path: Path) -> None:
    count = iter(range(10**6))
    run(tmp_path, workers=1, metric=lambda gold, prediction: next(count) >= 100)
    [worker] = read_status(tmp_path).workers
    assert worker.mean_score == pytest.approx((worker.rollouts - 100) / worker.rollouts)
    assert worker.latest_score == 1.0


@pytest.mark.parametrize(
    ("killed", "phase"),
    [
        (lambda: killed_after(12), "setup"),
        (lambda: killed_after(70), "search"),
        (lambda: killed_before(is_race), "race"),
    ],
)
def test_a_run_that_died_is_told_of_as_it_stood_and_then_as_it_goes_on(
    tmp_path: Path, killed: Any, phase: str
) -> None:
    with killed():
        run(tmp_path, bootstrap=True)
    dead = read_status(tmp_path)
    assert (dead.phase, dead.reason, dead.winner, dead.processes) == (phase, "", "", 1)
    assert 0 < dead.metric_calls < 120
    assert f"in its {phase}" in str(dead)
    result = run(tmp_path, bootstrap=True)
    over = read_status(tmp_path)
    assert (over.phase, over.processes) == ("over", 2)
    assert over.metric_calls == result.metric_calls <= 120
    run(tmp_path, bootstrap=True, budget=Budget(metric_calls=240))
    raised = read_status(tmp_path)
    assert (raised.phase, raised.budget, raised.processes) == ("over", {"metric_calls": 240}, 3)
    assert over.metric_calls < raised.metric_calls <= 240


def test_no_rollout_counts_twice_where_another_worker_took_it_over(tmp_path: Path) -> None:
    for calls in (120, 240, 480):
        run(tmp_path, budget=Budget(metric_calls=calls), deterministic=False)
        found = read_status(tmp_path)
        assert found.metric_calls <= calls
    own = [entry for entry in entries(tmp_path, "rollout") if not entry.get("shared")]
    assert found.metric_calls == sum(entry.get("score") is not None for entry in own)


def test_what_ended_it_is_told_until_it_goes_on(tmp_path: Path) -> None:
    mended = tmp_path / "mended"

    def late(gold: Any, prediction: Any) -> Any:
        return True if mended.exists() or len(entries(tmp_path, "rollout")) < 20 else None

    with pytest.raises(MetricError):
        run(tmp_path, metric=late)
    found = read_status(tmp_path)
    assert (found.phase, found.error) == ("search", "MetricError")
    assert "ended in its search by MetricError" in str(found)
    assert found.seconds > 0
    mended.touch()
    with killed_after(20):
        run(tmp_path, metric=late)
    assert (read_status(tmp_path).phase, read_status(tmp_path).error) == ("search", "")


def test_what_is_in_flight_is_told_and_charged_once_the_process_is_gone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"prices": {"scripted/colors": Price(1.0, 2.0)}, "bootstrap": True}
    with killed_before(lambda entry: entry["kind"] == "attempt" and entry["number"] > 20):
        run(tmp_path, **options)
    dead = read_status(tmp_path)
    in_flight = sum(one.in_flight for one in dead.workers)
    assert in_flight > 0
    assert dead.dollars_in_flight > 0
    result = run(tmp_path, **options)
    over = read_status(tmp_path)
    assert over.dollars_in_flight == 0
    assert over.dollars >= dead.dollars + dead.dollars_in_flight
    assert over.attempts == sum(line["attempts"] for line in result.spending.values())
    assert f"{over.attempts:,} attempts" in str(over)


def test_a_worker_that_was_set_aside_is_told_of(tmp_path: Path) -> None:
    def dead(messages: Any) -> str:
        raise dspy.lm15.ServerError("down\x1b[2J")

    workers = [Worker("good", kit.examples(40)), Worker("bad", kit.examples(40), lm=kit.make_lm(dead))]
    run(tmp_path, workers=workers, max_failures=3)
    good, bad = read_status(tmp_path).workers
    assert good.set_aside == ""
    assert "times in a row" in bad.set_aside
    assert bad.mean_score is None
    told = str(read_status(tmp_path))
    assert "bad is set aside: " in told
    assert "\x1b" not in told


def test_the_process_is_that_of_the_run(tmp_path: Path) -> None:
    with killed_after(60):
        run(tmp_path)
    assert f"by process {os.getpid()} on {this_host()}" in str(read_status(tmp_path))
    journal, gone = tmp_path / "runs/0001/server.jsonl", 2**22 + 1
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[1] = encode_line(1, decode_line(1, lines[1][:-1]) | {"pid": gone})
    journal.write_bytes(b"".join(lines))
    assert str(read_status(tmp_path)).splitlines()[0].endswith(f"by process {gone}")  # the lock is another's
    (tmp_path / "holder.json").write_text(json.dumps({"pid": gone, "host": this_host()}))
    assert "which is gone" in str(read_status(tmp_path))


def test_journals_of_an_older_format_are_read(tmp_path: Path) -> None:
    old, folder = Path(__file__).parent / "fixtures" / "format-1", tmp_path / "runs" / "0001"
    (folder / "workers").mkdir(parents=True)
    shutil.copy(old / "server.jsonl", folder)
    shutil.copy(old / "worker.jsonl", folder / "workers")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "fingerprints": {}, "budget": {}}))
    found = read_status(tmp_path)
    assert found.phase == "over"
    assert found.metric_calls > 0
    journal = folder / "server.jsonl"
    whole = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(line for line in whole if b'"finished"' not in line))
    assert read_status(tmp_path).phase == "race"


def test_a_raised_budget_opens_what_was_over(tmp_path: Path) -> None:
    run(tmp_path)
    with killed_before(lambda entry: entry["kind"] == "rewind"):
        run(tmp_path, budget=Budget(metric_calls=240))
    assert read_status(tmp_path).phase != "over"


def test_it_can_be_read_while_the_run_is_going_on(tmp_path: Path) -> None:
    seen: list[RunStatus] = []

    def metric(gold: Any, prediction: Any) -> bool:
        seen.append(read_status(tmp_path))
        return kit.metric(gold, prediction)

    run(tmp_path, metric=metric, bootstrap=True)
    phases = [one.phase for one in seen]
    assert list(dict.fromkeys(phases)) == ["setup", "search", "race"]
    assert max(one.metric_calls for one in seen) > 100
    assert "by process" in str(seen[-1])


def test_of_a_private_worker_the_kind_of_an_error_is_told_alone(tmp_path: Path) -> None:
    def quoting(gold: Any, prediction: Any) -> bool:
        if kit.number_in([{"content": gold.message}]) % 2:
            raise KeyError(gold.message)
        return True

    workers = [Worker("own", kit.examples(36), share_demos=False), Worker("open", kit.examples(36, start=40))]
    run(tmp_path, metric=quoting, workers=workers)
    own, other = read_status(tmp_path).workers
    assert (own.name, other.name) == ("own", "open")
    assert own.failed > 0
    assert "KeyError" in own.last_error
    assert "item" not in own.last_error
    assert "item" in other.last_error


def test_the_newest_run_and_any_other_by_number(tmp_path: Path) -> None:
    for seed in (0, 1):
        kit_run = kit.optimizer(run_dir=tmp_path, seed=seed)
        with dspy.context(lm=kit.color_lm()):
            kit_run.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    assert read_status(tmp_path).run == 2
    assert read_status(tmp_path, 1).run == 1
    with pytest.raises(ConfigurationError, match=r"no run 3; there are \[1, 2\]"):
        read_status(tmp_path, 3)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    assert main(["status", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "over: " in told
    assert " metric calls in " in told
    assert "worker-2" in told
    assert "student" in told
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(read_status(tmp_path).to_dict())) | {
        "idle_s": pytest.approx(0.0, abs=1e6)
    }
    assert main(["status", str(tmp_path / "nowhere")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "runs/0001/manifest.json").write_text("{")
    with pytest.raises(JournalError, match=r"manifest\.json"):
        read_status(tmp_path)
