"""How far the newest run of a ``run_dir`` is: read from its journals, without a lock, a program or an LM.

A compile may be writing them meanwhile: what it has written by now is what is told.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.recording.spending import SpentSoFar
from asyndbt_dspy.runs.journal import read_journal
from asyndbt_dspy.runs.run_directory import holder_of, read_manifest, this_host

LATEST = 20
"""Rollouts whose mean score says where the search is now."""
_ERROR_CHARACTERS = 200
_NAME_CHARACTERS = 48


@dataclass
class WorkerStatus:
    """What one worker's journal holds.

    Attributes:
        rollouts: With a score, each one once; those that an earlier run had paid for included.
        missing: Without one: the LM or the network failed.
        failed: Of ``rollouts``, those in which program or metric raised.
        lm_calls, tokens: Of its rollouts, as the LM reported them.
        attempts, in_flight, dollars: On the wire; 0 where calls are not metered.
        mean_score, latest_score: Of all its rollouts, and of the newest 20; ``None`` where there are none.
        last_error: Of the newest failure; of a private worker its kind alone.
        set_aside: Why it was set aside, empty if it was not.
    """

    name: str
    rollouts: int = 0
    missing: int = 0
    failed: int = 0
    lm_calls: int = 0
    tokens: int = 0
    attempts: int = 0
    in_flight: int = 0
    dollars: float = 0.0
    mean_score: float | None = None
    latest_score: float | None = None
    last_error: str = ""
    set_aside: str = ""


@dataclass
class FinalistStatus:
    """One program of the final race, by its arms, on the held-out examples that are in.

    Attributes:
        name: ``student``, or the arms as the journal has them.
        score: Mean over ``examples`` of them.
    """

    name: str
    score: float
    examples: int


@dataclass
class RunStatus:
    """See the module.

    Attributes:
        phase: ``setup``, ``search``, ``race`` or ``over``.
        reason: Why it is over; empty before.
        winner: As ``FinalistStatus.name``; empty before the end.
        error: Kind of the error that ended its last process, empty where none did.
        metric_calls: Rollouts with a score so far, of all workers.
        budget: Caps by name, those that are set.
        seconds: Of all processes of the run, up to the last entry.
        processes: How many there were.
        idle_s: Seconds since anything was written.
        process: The last one, in words.
        attempts, tokens, dollars: Of all calls on the wire, the proposer's included; 0 where calls are not metered.
        dollars_in_flight: The most that the calls in flight may cost; of a process that died they are charged in full.
    """

    run: int
    folder: str
    phase: str
    reason: str
    winner: str
    error: str
    metric_calls: int
    budget: dict[str, Any]
    seconds: float
    processes: int
    idle_s: float
    process: str
    attempts: int
    tokens: int
    dollars: float
    dollars_in_flight: float
    workers: list[WorkerStatus] = field(default_factory=list)
    finalists: list[FinalistStatus] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        caps = ", ".join(f"{_plain(value)} {name.replace('_', ' ')}" for name, value in self.budget.items())
        if self.phase == "over":
            head = f"over: {self.reason}; winner: {_short(self.winner)}"
        elif self.error:
            head = f"ended in its {self.phase} by {self.error}; resume=True goes on"
        else:
            head = f"in its {self.phase}; last entry {self.idle_s:,.0f} s ago, by {self.process}"
        lines = [
            f"run {self.run} in {self.folder}: {head}",
            f"{self.metric_calls:,} metric calls in {self.seconds:,.0f} s, {self.processes} process(es); budget: {caps or 'none'}",
        ]
        if self.attempts:
            lines.append(
                f"on the wire, the proposer's calls included: {self.attempts:,} attempts, {self.tokens:,} tokens, "
                f"{self.dollars:.4f} dollars, at most {self.dollars_in_flight:.4f} more in flight"
            )
        lines += [
            "",
            f"{'worker':<16}{'rollouts':>9}{'missing':>9}{'failed':>8}{'mean':>8}{'latest':>8}{'LM calls':>10}{'tokens':>11}"
            f"{'in flight':>11}{'dollars':>10}",
        ]
        for one in self.workers:
            lines.append(
                f"{one.name:<16}{one.rollouts:>9,}{one.missing:>9,}{one.failed:>8,}{_score(one.mean_score):>8}"
                f"{_score(one.latest_score):>8}{one.lm_calls:>10,}{one.tokens:>11,}{one.in_flight:>11,}{one.dollars:>10.4f}"
            )
        lines += [f"{one.name} is set aside: {one.set_aside}" for one in self.workers if one.set_aside]
        lines += [
            f"{one.name}: {one.last_error}" for one in self.workers if one.last_error and not one.set_aside
        ]
        if self.finalists:
            lines += ["", f"{'in the race':<{_NAME_CHARACTERS}}{'score':>8}{'examples':>10}"]
            lines += [
                f"{_short(one.name):<{_NAME_CHARACTERS}}{one.score:>8.3f}{one.examples:>10}"
                for one in self.finalists
            ]
        return "\n".join(map(_printable, lines))


def read_status(run_dir: Path, run: int | None = None) -> RunStatus:
    """The state of the newest run in ``run_dir``, or of run number ``run``.

    Raises:
        ConfigurationError: there is no such run.
        JournalError: a manifest or journal that cannot be read.
    """
    numbers = sorted(int(one.name) for one in run_dir.glob("runs/[0-9]*") if one.name.isdigit())
    if not numbers:
        raise ConfigurationError(f"{run_dir} holds no run; give the run_dir of a compile")
    number = numbers[-1] if run is None else run
    if number not in numbers:
        raise ConfigurationError(f"{run_dir} has no run {number}; there are {numbers}")
    folder = run_dir / "runs" / f"{number:04d}"
    manifest = read_manifest(folder / "manifest.json")
    spent = SpentSoFar()
    server = _Server()
    for entry in _entries(folder / "server.jsonl"):
        server.read(entry)
        spent.read("", entry)
    journals = [_Journal(_entries(path), spent) for path in sorted(folder.glob("workers/*.jsonl"))]
    own = {key for journal in journals for key in journal.own}
    workers = [journal.status(own) for journal in journals if journal.name]
    order = list(manifest["fingerprints"].get("workers", ()))
    workers.sort(key=lambda one: order.index(one.name) if one.name in order else len(order))
    for one in workers:
        one.set_aside = server.lost.get(one.name, "")
        line = spent.lines.get(one.name)
        if line is not None:
            one.attempts, one.in_flight, one.dollars = (
                line.attempts,
                line.in_flight,
                float(line.total_dollars),
            )
    written = [path.stat().st_mtime for path in folder.rglob("*.jsonl")]
    lines = spent.lines.values()
    return RunStatus(
        run=number,
        folder=str(run_dir),
        phase=server.phase,
        reason=server.reason,
        winner=server.winner,
        error=server.error,
        metric_calls=sum(one.rollouts for one in workers),
        budget={name: cap for name, cap in manifest["budget"].items() if cap is not None},
        seconds=max([server.seconds, *(one.seconds for one in journals)]),
        processes=server.processes,
        idle_s=max(0.0, time.time() - max(written, default=time.time())),
        process=_process(server.pid, run_dir),
        attempts=sum(line.attempts for line in lines),
        tokens=sum(line.tokens for line in lines),
        dollars=sum(float(line.total_dollars) for line in lines),
        dollars_in_flight=float(sum(one.dollars for one in spent.held)),
        workers=workers,
        finalists=server.finalists() if server.phase in ("race", "over") else [],
    )


class _Server:
    """What the server's journal says of phase, race and end."""

    def __init__(self) -> None:
        self.reason = ""
        self.winner = ""
        self.error = ""
        self.seconds = 0.0
        self.processes = 0
        self.pid = 0
        self._is_set_up = False
        self._events: list[Mapping[str, Any] | None] = []  # those of the race, and lost workers

    def read(self, entry: Mapping[str, Any]) -> None:
        kind = entry["kind"]
        self.seconds = max(self.seconds, entry.get("t", 0.0))
        if kind == "process":
            self.processes, self.pid, self.error = self.processes + 1, entry["pid"], ""
        elif kind == "ended":
            self.error = entry["error"]
        elif kind == "finished":
            self.reason, self.winner = entry["reason"], _name(entry["winner"])
        elif kind == "rewind":
            del self._events[entry["events"] :]
        elif kind == "event":
            event = entry["event"]
            is_told = event["type"] in ("RaceRequest", "RaceReply", "WorkerLost")
            self._events.append(event if is_told else None)
        self._is_set_up = self._is_set_up or kind in ("setup", "space", "event")
        if kind in ("event", "rewind", "raised"):  # it went on after that
            self.reason = self.winner = ""

    @property
    def phase(self) -> str:
        if self.reason:
            return "over"
        if not self._is_set_up:
            return "setup"
        return "race" if any(self._of("RaceRequest")) else "search"

    @property
    def lost(self) -> dict[str, str]:
        """Workers that were set aside, and why."""
        return {one["worker"]: one["reason"] for one in self._of("WorkerLost")}

    def finalists(self) -> list[FinalistStatus]:
        asked = {(one["worker"], one["unit"]): one["candidates"] for one in self._of("RaceRequest")}
        scores: dict[str, list[float]] = {}
        for one in self._of("RaceReply"):
            for candidate, row in zip(
                asked.get((one["worker"], one["unit"]), ()), one["scores"], strict=False
            ):
                scores.setdefault(_name(candidate), []).extend(score for score in row if score is not None)
        found = [FinalistStatus(name, sum(row) / len(row), len(row)) for name, row in scores.items() if row]
        return sorted(found, key=lambda one: -one.score)

    def _of(self, kind: str) -> Iterator[Mapping[str, Any]]:
        return (one for one in self._events if one is not None and one["type"] == kind)


class _Journal:
    """What one worker's journal holds.

    Attributes:
        name: Of the worker; empty in a journal that was made this moment.
        own: Keys of rollouts that were paid for in this run.
    """

    def __init__(self, entries: Iterator[Mapping[str, Any]], spent: SpentSoFar) -> None:
        heading = next(entries, {})
        self.name = str(heading.get("of", ""))
        self.is_private = bool(heading.get("private"))
        self.seconds = 0.0
        self.own: set[str] = set()
        self._rollouts: list[Mapping[str, Any]] = []
        for entry in entries:
            self.seconds = max(self.seconds, entry.get("t", 0.0))
            spent.read(self.name, entry)
            if entry["kind"] == "rollout":
                self._rollouts.append(entry)
                if not entry.get("shared"):
                    self.own.add(entry["key"])

    def status(self, own: set[str]) -> WorkerStatus:
        """``own``: of all workers; what one took over from another is the other's."""
        found = WorkerStatus(self.name)
        scores: list[float] = []
        for entry in self._rollouts:
            score, failure = entry.get("score"), entry.get("failure")
            if failure is not None:
                said = str(entry.get("error", failure))
                said = said.partition(":")[0] if self.is_private else said.partition("\n")[0]
                found.last_error = said[:_ERROR_CHARACTERS]
            if not entry.get("shared"):
                found.lm_calls += entry["usage"][0]
                found.tokens += entry["usage"][1] + entry["usage"][2]
            elif entry["key"] in own:
                continue
            if score is None:
                found.missing += 1
            else:
                scores.append(score)
                found.failed += failure is not None
        found.rollouts = len(scores)
        found.mean_score = _mean(scores)
        found.latest_score = _mean(scores[-LATEST:])
        return found


def _entries(path: Path) -> Iterator[Mapping[str, Any]]:
    """Of a journal that may not be there yet."""
    return read_journal(path) if path.exists() else iter(())


def _process(pid: int, run_dir: Path) -> str:
    """The last process of a run in words; whether it is there can be told on its own machine alone."""
    holder, host = holder_of(run_dir)
    if not pid or holder != pid:  # another run's
        return f"process {pid}" if pid else "no process yet"
    is_gone = host == this_host() and os.name == "posix" and not _is_alive(pid)
    return f"process {pid} on {host}" + (", which is gone: resume=True goes on" if is_gone else "")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # on Windows this would end it
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plain(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:,}"


def _short(name: str) -> str:
    return name if len(name) < _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 4]}..."


def _printable(line: str) -> str:
    """Errors and names are text of anybody: nothing of them moves the cursor or clears the screen."""
    return "".join(one if one.isprintable() else " " for one in line)


def _name(candidate: Sequence[int]) -> str:
    return "student" if not any(candidate) else "arms " + json.dumps(list(candidate), separators=(",", ":"))
