"""The event log and the account of attempts, entry by entry; and journals of older formats."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from pydantic import BaseModel

from asyndbt_dspy.core.budget import Charge
from asyndbt_dspy.core.messages import Outcome, RaceRequest, Scored, StopSearch, WorkerLost
from asyndbt_dspy.engines.protocols import Recorded
from asyndbt_dspy.errors import JournalError
from asyndbt_dspy.lms.failures import FailureKind, Fate
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.recording.events import EventLog
from asyndbt_dspy.recording.rollout_codec import (
    UnrecordableError,
    decode_rollout,
    decode_trace,
    encode_rollout,
)
from asyndbt_dspy.recording.spending import SpentSoFar, record_spending
from asyndbt_dspy.runs.journal import read_journal

FIXTURES = Path(__file__).parent / "fixtures"


def happened(*events: tuple[str, Any]) -> list[Recorded]:
    return [Recorded(machine, event, float(number)) for number, (machine, event) in enumerate(events)]


REQUEST = ("eu", RaceRequest("eu", 1, ((0, 0),), (3,)))
SCORED = ("eu", Scored("eu", 1, ((Outcome(1.0),),), 1))
LOST = ("server", WorkerLost("us", "gone"))
STOP = ("server", StopSearch("spent"))


def logged(*events: tuple[str, Any], **options: Any) -> tuple[EventLog, list[dict[str, Any]]]:
    """An event log that has read these events, and what it writes."""
    entries: list[dict[str, Any]] = []
    first = EventLog(entries.append)
    for one in happened(*events):
        first(one)
    written: list[dict[str, Any]] = []
    log = EventLog(written.append, **options)
    for entry in entries:
        log.read(entry)
    return log, written


def test_events_that_happen_again_are_not_written_again() -> None:
    log, written = logged(REQUEST, SCORED)
    told: list[int] = []
    log.on_live = lambda: told.append(1)
    asked = log.outside()
    first, second, third = happened(REQUEST, SCORED, LOST)
    log(first)
    assert next(asked) == second and not told
    log(second)
    assert list(asked) == [] and told == [1]
    log(third)
    assert [entry["event"]["type"] for entry in written] == ["WorkerLost"]


def test_an_event_that_happens_otherwise_is_refused() -> None:
    log, _ = logged(REQUEST, SCORED)
    other = Recorded("eu", RaceRequest("eu", 1, ((0, 1),), (3,)), 0.0)
    with pytest.raises(
        JournalError, match="event 1 of the recorded run does not happen again: 'eu' got a RaceRequest"
    ):
        log(other)


def test_with_a_raised_budget_the_run_goes_another_way_from_there_on() -> None:
    log, written = logged(REQUEST, SCORED, STOP, LOST, may_diverge=True)
    asked = log.outside()
    log(happened(REQUEST)[0])
    log(next(asked))
    assert list(asked) == [], "the search that a smaller budget ended goes on"
    assert written == [{"kind": "rewind", "events": 2}]
    again = EventLog(written.append)
    for entry in logged_entries(REQUEST, SCORED, STOP, LOST) + written:
        again.read(entry)
    assert again.known == 2


def logged_entries(*events: tuple[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    log = EventLog(entries.append)
    for one in happened(*events):
        log(one)
    return entries


def test_what_follows_an_interrupt_is_no_part_of_the_run() -> None:
    log, written = logged()
    log(happened(REQUEST)[0])
    log.close()
    log(happened(STOP)[0])
    assert len(written) == 1


def test_attempts_are_added_up_and_what_was_in_flight_is_charged_in_full() -> None:
    entries: list[tuple[str, dict[str, Any]]] = []
    ledger = Ledger()
    record_spending(ledger, lambda worker, entry: entries.append((worker, dict(entry))))
    worst = Charge(100, 50, Decimal("0.01"))
    answered, unreported, refused, cut, unsent, lost = (
        ledger.reserve(name, worst, lambda: None) for name in ("eu", "eu", "eu", "us", "us", "us")
    )
    assert answered and unreported and refused and cut and unsent and lost
    ledger.settle(answered, "m", None, Charge(10, 5, Decimal("0.001")), waited_s=1.5)
    ledger.settle(unreported, "m", None, None, is_priced=False)
    ledger.settle(refused, "m", Fate.REFUSED)
    ledger.settle(cut, "m", Fate.CUT, is_priced=False)
    ledger.settle(unsent, "m", Fate.UNSENT)
    found = SpentSoFar()
    for worker, entry in entries:
        found.read(worker, entry)
    saved = found.saved()
    assert saved is not None
    ledger.settle(lost, "m", Fate.CUT)  # what the next process says of it
    again = Ledger()
    again.restore(saved)
    assert again.lines() == ledger.lines()
    assert [(line.unpriced, line.unmeasured) for line in again.lines().values()] == [(1, 1), (1, 0)]
    before, after = ledger.spent, again.spent
    assert (before.lm_calls, before.tokens, before.dollars) == (after.lm_calls, after.tokens, after.dollars)
    assert SpentSoFar().saved() is None


def test_attempts_in_the_servers_journal_are_told_apart_by_their_names() -> None:
    found = SpentSoFar()
    for number, name in enumerate(("proposer", "judge", None)):  # older versions write no name
        named = {} if name is None else {"worker": name}
        found.read("", {"kind": "reserved", "number": number, "worst": [10, 5, "0.1"], **named})
    attempt = {"model": "m", "fate": None, "charge": [1, 1, "0.01"], "priced": True, "waited_s": 0.0}
    found.read("", {"kind": "attempt", "number": 0, "worker": "proposer", **attempt})
    found.read("", {"kind": "process"})  # cuts whatever of the server's journal was in flight
    saved = found.saved()
    assert saved is not None
    lines = {name: (line["answers"], line["cut"]) for name, line in saved["lines"].items()}
    assert lines == {"proposer": (1, 0), "judge": (0, 1), "": (0, 1)}


def test_a_reservation_is_recorded_before_its_attempt_can_go_out() -> None:
    entries: list[str] = []
    ledger = Ledger()
    record_spending(ledger, lambda worker, entry: entries.append(entry["kind"]))
    held = ledger.reserve("eu", Charge(1, 1), lambda: None)
    assert entries == ["reserved"] and held is not None
    ledger.withdraw(held)
    assert entries == ["reserved", "withdrawn"]


class Point(BaseModel):
    x: int
    y: float


class Typed(dspy.Signature):
    """Typed."""

    point: Point = dspy.InputField()
    ratio: float = dspy.InputField()
    names: list[str] = dspy.OutputField()


def test_rollouts_and_traces_come_back_equal() -> None:
    program = dspy.Predict(Typed)
    inputs = {"point": Point(x=1, y=0.1), "ratio": 3}
    said = dspy.Prediction(names=["a", "ß\n"])
    rollout = Rollout(
        0.1 + 0.2, 1.5, failure=FailureKind.PROGRAM, error="e", feedback="f", seconds=0.25, prediction=said
    )
    traced = Rollout(1.0, trace=[(program, inputs, said), (object(), {}, said)], prediction=said)
    for one in (rollout, traced):
        entry = {"key": "00" * 32, "usage": [1, 2, 3], **encode_rollout(one, program)}
        again = decode_rollout(entry)
        assert again.rollout.score == one.score and again.rollout.failure is one.failure
        assert (again.rollout.error, again.rollout.feedback) == (one.error, one.feedback)
        assert again.usage == (1, 2, 3)
    calls = decode_trace(again.trace, program)
    assert calls[0][0] is program and calls[0][1] == inputs and type(calls[0][1]["ratio"]) is int
    assert calls[0][2].names == said.names
    assert calls[1] == (None, {}, None), "a call of a predictor without a name keeps its place"


def test_a_value_that_json_cannot_give_back_is_not_recorded() -> None:
    program = dspy.Predict(Typed)
    trace = [(program, {"point": object(), "ratio": 1.0}, dspy.Prediction(names=[]))]
    with pytest.raises(UnrecordableError, match="a object"):
        encode_rollout(Rollout(1.0, trace=trace), program)


@pytest.mark.parametrize("folder", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_journals_of_every_format_so_far_stay_readable(folder: Path) -> None:
    log, spent, paid = EventLog(lambda entry: None), SpentSoFar(), []
    for path in (folder / "server.jsonl", folder / "worker.jsonl"):
        for entry in read_journal(path):
            if entry["kind"] == "rollout":
                paid.append(decode_rollout(entry))
            else:
                log.read(entry)
                spent.read("eu", entry)
    assert [one.rollout.score for one in paid] == [1.0, None, 0.5]
    assert paid[1].rollout.failure is FailureKind.TRANSIENT
    (call,) = decode_trace(paid[2].trace, dspy.Predict(kit.Sort))
    assert call[1] == {"message": "item 1"} and call[2].label == "green"
    assert [one.event for one in log.outside_events()] == [SCORED[1], LOST[1], STOP[1]]
    saved = spent.saved()
    assert saved is not None and saved["lines"]["eu"]["attempts"] == 3 and saved["lines"]["eu"]["cut"] == 1
