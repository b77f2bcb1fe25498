"""The recorder of one run: everything that was paid for goes to the journals, and comes back from them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dspy

from asyndbt_dspy.core.messages import Outcome, WorkerLost
from asyndbt_dspy.errors import JournalError
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.programs.paid_rollouts import PaidRollout, RolloutKey
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.recording.events import EventLog
from asyndbt_dspy.recording.rollout_codec import (
    RecordedRollout,
    UnrecordableError,
    decode_rollout,
    decode_trace,
    encode_rollout,
)
from asyndbt_dspy.recording.rollout_keys import RolloutKeys
from asyndbt_dspy.recording.spending import SpentSoFar, record_spending
from asyndbt_dspy.runs.journal import JournalWriter, read_journal
from asyndbt_dspy.runs.run_directory import RunDirectory

logger = logging.getLogger(__name__)

_SERVER = ""
"""Name of the server's journal where workers' journals are meant by name."""
_Paid = dict[bytes, list[RecordedRollout]]


class KeysOnly:
    """The ``RolloutBook`` of a run that is not recorded.

    Attributes:
        run_id: Of this run in all its processes.
    """

    def __init__(self, scope: Any, noisy: bool = False, run_id: str = "") -> None:
        self._keys = RolloutKeys(scope, noisy)
        self.run_id = run_id or uuid.uuid4().hex

    def key(self, lm: Any, program: dspy.Module, example: dspy.Example) -> RolloutKey:
        return self._keys.key(lm, program, example)

    def take(self, worker: str, key: RolloutKey, program: dspy.Module, trace: bool) -> PaidRollout | None:
        return None

    def keep(self, worker: str, key: RolloutKey, program: dspy.Module, paid: PaidRollout) -> None:
        pass

    def outcomes(self, worker: str, task: int) -> tuple[tuple[Outcome, ...], ...] | None:
        return None

    def failure(self, worker: str, task: int) -> str | None:
        return None

    def keep_failure(self, worker: str, task: int, reason: str) -> None:
        pass

    def recorded(self) -> Iterator[tuple[str, Rollout]]:
        """What earlier processes of this run recorded, by worker."""
        return iter(())

    def ended(self, error: Exception) -> None:
        """The process goes no further because of ``error``; its kind is kept, and no text of it."""

    def texts(self, predictor: str) -> list[str] | None:
        """Instructions that were proposed for ``predictor`` by an earlier process."""
        return None

    def keep_texts(self, predictor: str, texts: Sequence[str]) -> None:
        pass

    def setup(self) -> Mapping[str, Any] | None:
        """What the setup came to in an earlier process (see ``SetupRollouts``)."""
        return None

    def keep_setup(self, found: Mapping[str, Any]) -> None:
        pass

    def join_ledger(self, ledger: Ledger) -> None:
        """The run's ledger goes on from what earlier processes spent, and its attempts are recorded."""

    @property
    def elapsed_s(self) -> float:
        """Seconds that earlier processes spent on this run."""
        return 0.0

    def close(self) -> None:
        """The run is over, or could not begin."""


@dataclass
class _Read:
    """What the journals of earlier processes of this run hold."""

    paid: dict[str, _Paid] = field(default_factory=dict)
    rollouts: int = 0
    answered: int = 0
    """Completed rollouts, but for those that others had paid for."""
    raised_at: int | None = None
    failures: dict[tuple[str, int], str] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    setup: Mapping[str, Any] | None = None
    space: str | None = None
    spent: SpentSoFar = field(default_factory=SpentSoFar)
    elapsed_s: float = 0.0
    search_began_s: float | None = None
    finished: bool = False
    raised: bool = False
    """The budget was raised, and the events are still those of the smaller one."""
    rewinds: int = 0


class RunRecorder(KeysOnly):
    """The ``RolloutBook`` of a run with a ``run_dir``, and the keeper of its other journal entries.

    Args:
        directory: Locked; closed by ``close``.
        workers: Names, in order.
        private: Those whose rollouts no other worker may use.
        scope, noisy: See ``RolloutKeys``.
        fsync: See ``JournalWriter``.

    Attributes:
        events: Observer of the engine.
        paid: Completed rollouts that all processes of the run paid for so far.

    Raises:
        JournalError: a journal that cannot be read or written.
    """

    def __init__(
        self,
        directory: RunDirectory,
        workers: Sequence[str],
        private: frozenset[str],
        scope: Any,
        *,
        fsync: bool = False,
        noisy: bool = False,
    ) -> None:
        super().__init__(scope, noisy, directory.run_id)
        self.directory = directory
        self.events = EventLog(self._write_server)
        self._workers = tuple(workers)
        self._private = private
        self._lock = threading.Lock()
        self._read = _Read()
        self._shared: dict[str, _Paid] = {}
        self._warned = False
        self._has_skipped = False
        self._goes_another_way = False
        self._journals: dict[str, JournalWriter] = {}
        self._load()
        self.paid = self._read.answered
        self._goes_another_way = self._read.rewinds > 0
        self.events.may_diverge = self._read.raised or bool(directory.raised)
        self._outcomes = {(one.worker, one.task): one.outcomes for one in self.events.scored()}
        self.events.on_rewind = self._forget_tasks
        self._began_s = time.monotonic() - self.elapsed_s
        try:
            self._open_journals(fsync)
        except BaseException:
            self._close_journals()
            raise

    def _open_journals(self, fsync: bool) -> None:
        for name in (_SERVER, *self._workers):
            heading = {"run": self.directory.number, "of": name or "server", "private": name in self._private}
            journal = JournalWriter(self._path(name), fsync=fsync, heading=heading)
            self._journals[name] = journal
            journal.append({"kind": "process", "pid": os.getpid(), "t": self._now()})
        if self.directory.raised:
            # First in the journal: with the manifest alone, the next process would not know that its events are of less.
            self._read.raised_at = self.paid
            self._write_server({"kind": "raised", "caps": list(self.directory.raised), "paid": self.paid})
            self._read.finished = False
            self.directory.keep_budget()

    def _close_journals(self) -> None:
        for journal in self._journals.values():
            journal.close()

    # -- what was read

    @property
    def elapsed_s(self) -> float:
        return self._read.elapsed_s

    @property
    def is_resumed(self) -> bool:
        return self.directory.is_resumed

    @property
    def rollouts(self) -> int:
        """Rollouts that earlier processes recorded."""
        return self._read.rollouts

    @property
    def raised_at(self) -> int | None:
        """``paid`` when the budget was last raised; ``None``: it never was."""
        return self._read.raised_at

    @property
    def unasked(self) -> int:
        """Rollouts that earlier processes recorded and that were not asked for again (yet)."""
        return sum(len(waiting) for known in self._read.paid.values() for waiting in known.values())

    @property
    def search_elapsed_s(self) -> float:
        """Seconds that earlier processes spent in the search."""
        began = self._read.search_began_s
        return 0.0 if began is None else max(0.0, self.elapsed_s - began)

    def join_ledger(self, ledger: Ledger) -> None:
        saved = self._read.spent.saved()
        if saved is not None:
            ledger.restore(saved)
        record_spending(ledger, self._write)

    def recorded(self) -> Iterator[tuple[str, Rollout]]:
        for worker, known in self._read.paid.items():
            for waiting in known.values():
                for one in waiting:
                    yield worker, one.rollout

    def ended(self, error: Exception) -> None:
        with contextlib.suppress(JournalError):  # it may be what ended the run
            self._write_server({"kind": "ended", "error": type(error).__name__})

    def outcomes(self, worker: str, task: int) -> tuple[tuple[Outcome, ...], ...] | None:
        return self._outcomes.get((worker, task))

    def failure(self, worker: str, task: int) -> str | None:
        return self._read.failures.get((worker, task))

    def setup(self) -> Mapping[str, Any] | None:
        return self._read.setup

    def texts(self, predictor: str) -> list[str] | None:
        return self._read.texts.get(predictor)

    def take(self, worker: str, key: RolloutKey, program: dspy.Module, trace: bool) -> PaidRollout | None:
        name = _name(key.digest, trace)
        waiting = self._read.paid.get(worker, {}).get(name)
        if waiting:
            found = waiting.pop(0)
            return PaidRollout(_with_trace(found, program), found.usage, found.is_shared)
        left = self._left_over(worker, name)
        if left is not None:
            return PaidRollout(_with_trace(left, program), left.usage, is_shared=True, is_recorded=False)
        shared = self._shared.get(worker if worker in self._private else _SERVER, {}).get(name)
        # Within a run an answer that was asked for twice is another answer, unless the LM repeats itself.
        if not shared or not key.is_repeatable:
            return None
        return PaidRollout(_with_trace(shared[0], program), is_shared=True, is_recorded=False)

    def _left_over(self, worker: str, name: bytes) -> RecordedRollout | None:
        """Where the run goes another way than before, another worker may be asked what one was asked then."""
        if not self._goes_another_way or worker in self._private:
            return None
        lists = (known.get(name) for one, known in self._read.paid.items() if one not in self._private)
        return next((waiting.pop(0) for waiting in lists if waiting), None)

    # -- what is written

    def keep(self, worker: str, key: RolloutKey, program: dspy.Module, paid: PaidRollout) -> None:
        self.paid += paid.rollout.score is not None and not paid.is_shared
        try:
            content = encode_rollout(paid.rollout, program)
        except UnrecordableError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "a traced run cannot be recorded and would be paid for again on resume (%s); this is said once",
                    str(error).split(":", 1)[0],
                )
            return
        entry = {"kind": "rollout", "key": key.digest.hex(), "t": self._now(), "usage": list(paid.usage)}
        entry |= {"repeatable": True} if key.is_repeatable else {}
        entry |= {"shared": True} if paid.is_shared else {}
        entry |= content
        self._journals[worker].append(entry)

    def keep_failure(self, worker: str, task: int, reason: str) -> None:
        entry = {"kind": "worker_failed", "task": task, "reason": reason, "rewinds": self._read.rewinds}
        self._write(worker, entry)

    def keep_texts(self, predictor: str, texts: Sequence[str]) -> None:
        self._write_server({"kind": "instructions", "predictor": predictor, "texts": list(texts)})

    def keep_setup(self, found: Mapping[str, Any]) -> None:
        self._write_server({"kind": "setup", **found})

    def begin_search(self, space: str, blocks: Sequence[Sequence[Any]]) -> None:
        """The prepared space: a hash of its contents, and per block its name and number of arms.

        Raises:
            JournalError: an earlier process of this run prepared another one.
        """
        if self._read.space is not None:
            if self._read.space != space:
                raise JournalError(
                    f"the setup of run {self.directory.number} came to other instructions or demos than before; the "
                    "program or the metric is not what it was. Start a new run without resume=True"
                )
            return
        self._write_server({"kind": "space", "sha256": space, "blocks": [list(one) for one in blocks]})

    def finish(self, reason: str, winner: Sequence[int]) -> None:
        """The run is over; resuming it returns its result."""
        if not self._read.finished:
            self._write_server({"kind": "finished", "reason": reason, "winner": [int(arm) for arm in winner]})

    def close(self) -> None:
        """Close the journals and let others into the ``run_dir``."""
        self._close_journals()
        self.directory.close()

    # -- parts

    def _forget_tasks(self) -> None:
        """From here on a task's number means another task than in the earlier process."""
        self._goes_another_way = True
        self._read.rewinds += 1
        self._outcomes.clear()
        self._read.failures.clear()

    def _load(self) -> None:
        if self.directory.is_resumed:
            for name in (_SERVER, *self._workers):
                if self._path(name).exists():
                    for entry in read_journal(self._path(name)):
                        self._take_entry(name, entry)
        for number in self.directory.numbers():
            if number < self.directory.number:
                self._load_shared(number)

    def _take_entry(self, name: str, entry: Mapping[str, Any]) -> None:
        read, kind = self._read, entry["kind"]
        read.elapsed_s = max(read.elapsed_s, entry.get("t", 0.0))
        if kind == "rollout":
            recorded = decode_rollout(entry)
            key = _name(recorded.key, recorded.trace is not None)
            read.paid.setdefault(name, {}).setdefault(key, []).append(recorded)
            read.rollouts += 1
            read.answered += recorded.rollout.score is not None and not recorded.is_shared
        elif kind == "worker_failed":
            if self._holds(name, entry):
                read.failures[name, entry["task"]] = entry["reason"]
        elif kind == "instructions":
            read.texts[entry["predictor"]] = entry["texts"]
        elif kind == "setup":
            read.setup = entry
        elif kind == "space":
            read.space, read.search_began_s = entry["sha256"], entry["t"]
        elif kind == "finished":
            read.finished, read.raised = True, False
        elif kind == "raised":
            read.finished, read.raised = False, True
            read.raised_at = entry.get("paid")  # journals of before it have none
        else:
            if kind == "rewind":
                read.rewinds += 1
            if kind in ("rewind", "event"):
                # A new event is written once all that were known have happened again, or never will.
                read.finished, read.raised = False, False
            read.spent.read(name, entry)
            self.events.read(entry)

    def _holds(self, worker: str, failure: Mapping[str, Any]) -> bool:
        """Whether a task of this number is still the one that failed; the server's journal has been read."""
        if failure.get("rewinds", 0) == self._read.rewinds:
            return True
        # Before the turn all is as it was; and who was lost there is asked nothing after it.
        lost = (one.event for one in self.events.outside_events())
        return any(isinstance(event, WorkerLost) and event.worker == worker for event in lost)

    def _load_shared(self, number: int) -> None:
        """Answers of earlier runs; those of a private worker are its own."""
        folder = self.directory.folder_of(number) / "workers"
        owners = {self._path(name, number): name for name in self._workers}
        for path in sorted(folder.glob("*.jsonl")):
            owner = owners.get(path)
            try:
                is_private = owner in self._private or _is_private(path)
                if owner is None and is_private:
                    continue
                found = _repeatable(path)
            except JournalError as error:  # what happened to another run is no reason to refuse this one
                self._skip(error)
                continue
            known = self._shared.setdefault(str(owner) if is_private else _SERVER, {})
            for recorded in found:
                known.setdefault(_name(recorded.key, recorded.trace is not None), [recorded])

    def _skip(self, error: JournalError) -> None:
        if not self._has_skipped:
            self._has_skipped = True
            logger.warning(
                "the rollouts of an earlier run in this run_dir are not used: %s; this is said once", error
            )

    def _path(self, name: str, number: int | None = None) -> Any:
        return self.directory.worker_journal(name, number) if name else self.directory.server_journal

    def _write_server(self, entry: Mapping[str, Any]) -> None:
        self._write(_SERVER, entry)

    def _write(self, name: str, entry: Mapping[str, Any]) -> None:
        journal = self._journals.get(name)
        if journal is None:  # attempts that belong to no worker of the run (a proposer's) are the server's
            journal, entry = self._journals[_SERVER], {**entry, "worker": name}
        journal.append({**entry, "t": self._now()})

    def _now(self) -> float:
        return round(time.monotonic() - self._began_s, 3)


def _is_private(path: Any) -> bool:
    heading = next(read_journal(path), {})
    return bool(heading.get("private"))


def _repeatable(path: Any) -> list[RecordedRollout]:
    """Answers in a journal that any run may use."""
    entries = (one for one in read_journal(path) if one["kind"] == "rollout" and one.get("repeatable"))
    return [recorded for recorded in map(decode_rollout, entries) if recorded.is_answer]


def _name(digest: bytes, trace: bool) -> bytes:
    return digest + b"t" if trace else digest


def _with_trace(found: RecordedRollout, program: dspy.Module) -> Rollout:
    if found.trace is None:
        return found.rollout
    return replace(found.rollout, trace=decode_trace(found.trace, program))
