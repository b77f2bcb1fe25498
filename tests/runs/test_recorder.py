"""Who gets a rollout that was paid for before."""

from __future__ import annotations

from pathlib import Path

import dspy
import kit

from asyndbt_dspy.core.messages import StopSearch
from asyndbt_dspy.engines.protocols import SERVER, Recorded
from asyndbt_dspy.programs.paid_rollouts import PaidRollout, RolloutKey
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.recording.recorder import RunRecorder
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
