"""Who gets a rollout that was paid for before."""

from __future__ import annotations

from pathlib import Path

import dspy
import kit
import pytest
from crashes import entries

from asyndbt_dspy.core.messages import StopSearch, WorkerLost
from asyndbt_dspy.engines.protocols import SERVER, Recorded
from asyndbt_dspy.errors import JournalError
from asyndbt_dspy.programs.paid_rollouts import PaidRollout, RolloutKey
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.recording.recorder import RunRecorder
from asyndbt_dspy.runs.journal import JournalWriter
from asyndbt_dspy.runs.run_directory import RunDirectory

STUDENT = dspy.Predict(kit.Sort)
NAMES = ("asked", "idle", "clinic")


def process(path: Path, budget: int) -> RunRecorder:
    manifest = {"package": "0", "fingerprints": {}, "budget": {"metric_calls": budget}}
    directory = RunDirectory(path, resume=True, manifest=manifest)
    return RunRecorder(directory, NAMES, frozenset({"clinic"}), "scope")


def key(number: int) -> RolloutKey:
    return RolloutKey(bytes([number]) * 32, is_repeatable=False)


def test_after_a_turn_a_worker_takes_what_another_was_paid_for_and_no_longer_asks(tmp_path: Path) -> None:
    paid = PaidRollout(Rollout(0.5, seconds=1.0), (1, 20, 3))
    first = process(tmp_path, 10)
    first.keep("asked", key(1), STUDENT, paid)
    first.keep("clinic", key(2), STUDENT, paid)
    first.events(Recorded(SERVER, StopSearch("budget", race=True), 0.0))
    first.close()

    second = process(tmp_path, 20)
    assert second.take("idle", key(1), STUDENT, False) is None, "what happens again is each worker's own"
    second.events(Recorded(SERVER, StopSearch("patience", race=True), 0.0))  # not what happened then
    assert second.take("clinic", key(1), STUDENT, False) is None, "a private worker takes its own alone"
    assert second.take("idle", key(2), STUDENT, False) is None, "what a private worker paid for stays there"
    taken = second.take("idle", key(1), STUDENT, False)
    assert taken is not None and (taken.rollout.score, taken.usage) == (0.5, (1, 20, 3))
    assert taken.is_shared and not taken.is_recorded
    assert second.take("idle", key(1), STUDENT, False) is second.take("asked", key(1), STUDENT, False) is None
    second.keep("idle", key(1), STUDENT, taken)
    assert second.take("clinic", key(2), STUDENT, False) is not None
    second.close()

    third = process(tmp_path, 20)
    again = third.take("idle", key(1), STUDENT, False)
    assert again is not None and again.is_shared and again.usage == (1, 20, 3)
    third.close()


def test_a_journal_that_cannot_be_opened_closes_those_that_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process(tmp_path, 10).close()
    folder = tmp_path / "runs" / "0001" / "workers"
    (folder / "clinic.jsonl").unlink()
    (folder / "clinic.jsonl").symlink_to(tmp_path / "nowhere" / "file")  # the last one of all
    opened: list[JournalWriter] = []

    def append(journal: JournalWriter, entry: object) -> None:
        opened.append(journal)

    with monkeypatch.context() as patched:
        patched.setattr(JournalWriter, "append", append)
        with pytest.raises(JournalError, match=r"cannot write .*clinic"):
            process(tmp_path, 10)
    assert [one.path.stem for one in opened] == ["server", "asked", "idle"]
    for journal in opened:
        with pytest.raises(JournalError, match="it is closed"):
            journal.append({"kind": "late"})


SPENT = Recorded(SERVER, StopSearch("budget", race=True), 0.0)
PATIENCE = Recorded(SERVER, StopSearch("patience", race=True), 0.0)
LOST = Recorded(SERVER, WorkerLost("asked", "down"), 0.0)


def test_failures_that_a_turn_forgot_are_forgotten_by_the_next_process_too(tmp_path: Path) -> None:
    paid = PaidRollout(Rollout(0.5, seconds=1.0), (1, 20, 3))
    first = process(tmp_path, 10)
    first.keep("asked", key(1), STUDENT, paid)
    first.keep_failure("asked", 3, "down")
    first.events(SPENT)
    first.close()
    of_before = JournalWriter(tmp_path / "runs" / "0001" / "workers" / "clinic.jsonl")
    of_before.append(
        {"kind": "worker_failed", "task": 2, "reason": "down", "t": 0.0}
    )  # as older versions write it
    of_before.close()

    second = process(tmp_path, 20)
    assert second.failure("asked", 3) == second.failure("clinic", 2) == "down"
    second.events(PATIENCE)
    assert second.failure("asked", 3) is None
    second.keep_failure("idle", 1, "gone")
    second.close()

    third = process(tmp_path, 20)
    assert third.failure("asked", 3) is third.failure("clinic", 2) is None, "it is another task now"
    assert third.failure("idle", 1) == "gone"
    assert third.take("idle", key(1), STUDENT, False) is not None, "it still goes another way than the first"
    third.close()


def test_who_was_lost_before_a_turn_is_not_asked_for_the_same_again(tmp_path: Path) -> None:
    first = process(tmp_path, 10)
    first.keep_failure("asked", 3, "down")
    first.events(LOST)
    first.events(SPENT)
    first.close()
    second = process(tmp_path, 20)
    second.events(LOST)
    second.events(PATIENCE)
    second.close()
    third = process(tmp_path, 20)
    assert third.failure("asked", 3) == "down"
    third.close()


def test_a_raised_budget_lets_the_run_turn_until_it_has_turned(tmp_path: Path) -> None:
    first = process(tmp_path, 10)
    first.events(SPENT)
    first.finish("budget", (0,))
    first.close()
    process(tmp_path, 20).close()  # dies before anything happens
    third = process(tmp_path, 20)
    assert third.events.may_diverge
    third.events(PATIENCE)
    third.close()
    fourth = process(tmp_path, 20)
    assert not fourth.events.may_diverge, "what is recorded now is of the larger budget"
    fourth.events(PATIENCE)
    fourth.finish("patience", (1,))
    fourth.close()
    assert [one["reason"] for one in entries(tmp_path, "finished")] == ["budget", "patience"]
    process(tmp_path, 20).close()


def test_a_raised_budget_that_comes_to_the_same_is_over_once(tmp_path: Path) -> None:
    first = process(tmp_path, 10)
    first.events(PATIENCE)
    first.finish("patience", (0,))
    first.close()
    for budget, lines in ((20, 2), (20, 2), (30, 3)):
        again = process(tmp_path, budget)
        again.events(PATIENCE)
        again.finish("patience", (0,))
        again.close()
        assert len(entries(tmp_path, "finished")) == lines
    again = process(tmp_path, 30)
    assert not again.events.may_diverge
    again.close()
