"""How far the newest run of a ``run_dir`` is: read from its journals, without a lock, a program or an LM.

A compile may be writing them meanwhile: what it has written by now is what is told.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.recording.spending import SpentSoFar
from asyndbt_dspy.runs.journal import read_journal
from asyndbt_dspy.runs.run_directory import holder_of, read_manifest

LATEST = 20
"""Rollouts whose mean score says where the search is now."""


@dataclass
class WorkerStatus:
    """What one worker's journal holds.

    Attributes:
        rollouts: With a score; those that an earlier run had paid for included.
        missing: Without one: the LM or the network failed.
        failed: Of ``rollouts``, those in which program or metric raised.
        lm_calls, tokens: Of its rollouts, as the LM reported them.
        attempts, in_flight, dollars: On the wire; 0 where calls are not metered.
        mean_score, latest_score: Of all its rollouts, and of the newest 20; ``None`` where there are none.
        last_error: Of the newest failure; of a private worker its kind alone.
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
        reason: Why it ended; empty before.
        winner: As ``FinalistStatus.name``; empty before the end.
        metric_calls: Rollouts with a score so far, of all workers.
        budget: Caps by name, those that are set.
        seconds: Of all processes of the run, up to the last entry.
        processes: How many there were.
        idle_s: Seconds since anything was written.
        holder: Who ran it last, in words.
        dollars: Of all calls, the proposer's included.
    """

    run: int
    folder: str
    phase: str
    reason: str
    winner: str
    metric_calls: int
    budget: dict[str, Any]
    seconds: float
    processes: int
    idle_s: float
    holder: str
    dollars: float
    workers: list[WorkerStatus] = field(default_factory=list)
    finalists: list[FinalistStatus] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        caps = ", ".join(f"{value:,g} {name.replace('_', ' ')}" for name, value in self.budget.items())
        if self.phase == "over":
            head = f"over: {self.reason}; winner: {self.winner}"
        else:
            head = f"in its {self.phase}; last entry {self.idle_s:,.0f} s ago, by {self.holder}"
        lines = [
            f"run {self.run} in {self.folder}: {head}",
            f"{self.metric_calls:,} metric calls in {self.seconds:,.0f} s, {self.processes} process(es); budget: {caps or 'none'}",
            "",
            f"{'worker':<16}{'rollouts':>9}{'missing':>9}{'failed':>8}{'mean':>8}{'latest':>8}{'LM calls':>10}{'tokens':>11}"
            f"{'in flight':>11}{'dollars':>10}",
        ]
        for one in self.workers:
            lines.append(
                f"{one.name:<16}{one.rollouts:>9,}{one.missing:>9,}{one.failed:>8,}{_score(one.mean_score):>8}"
                f"{_score(one.latest_score):>8}{one.lm_calls:>10,}{one.tokens:>11,}{one.in_flight:>11,}{one.dollars:>10.4f}"
            )
        lines += [f"{one.name}: {one.last_error}" for one in self.workers if one.last_error]
        if self.finalists:
            lines += ["", f"{'in the race':<40}{'score':>8}{'examples':>10}"]
            lines += [f"{one.name:<40}{one.score:>8.3f}{one.examples:>10}" for one in self.finalists]
        return "\n".join(lines)


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
    workers = [
        worker
        for path in sorted(folder.glob("workers/*.jsonl"))
        if (worker := _worker(_entries(path), spent)) is not None
    ]
    order = list(manifest["fingerprints"].get("workers", ()))
    workers.sort(key=lambda one: order.index(one.name) if one.name in order else len(order))
    for one in workers:
        line = spent.lines.get(one.name)
        if line is not None:
            one.attempts, one.in_flight, one.dollars = (
                line.attempts,
                line.in_flight,
                float(line.total_dollars),
            )
    written = [path.stat().st_mtime for path in folder.rglob("*.jsonl")]
    return RunStatus(
        run=number,
        folder=str(run_dir),
        phase=server.phase,
        reason=server.reason,
        winner=server.winner,
        metric_calls=sum(one.rollouts for one in workers),
        budget={name: cap for name, cap in manifest["budget"].items() if cap is not None},
        seconds=server.seconds,
        processes=server.processes,
        idle_s=max(0.0, time.time() - max(written, default=time.time())),
        holder=holder_of(run_dir),
        dollars=sum(float(line.total_dollars) for line in spent.lines.values()),
        workers=workers,
        finalists=server.finalists() if server.phase in ("race", "over") else [],
    )


class _Server:
    """What the server's journal says of phase, race and end."""

    def __init__(self) -> None:
        self.reason = ""
        self.winner = ""
        self.seconds = 0.0
        self.processes = 0
        self._is_set_up = False
        self._race: list[Mapping[str, Any] | None] = []  # one per event; those of the race

    def read(self, entry: Mapping[str, Any]) -> None:
        kind = entry["kind"]
        self.seconds = max(self.seconds, entry.get("t", 0.0))
        self.processes += kind == "process"
        self._is_set_up = self._is_set_up or kind == "setup"
        if kind == "finished":
            self.reason, self.winner = entry["reason"], _name(entry["winner"])
        elif kind == "rewind":
            del self._race[entry["events"] :]
        elif kind == "event":
            event = entry["event"]
            self._race.append(event if event["type"] in ("RaceRequest", "RaceReply") else None)
        if kind in ("event", "rewind", "raised"):  # it went on after that
            self.reason = self.winner = ""

    @property
    def phase(self) -> str:
        if self.reason:
            return "over"
        if not self._is_set_up:
            return "setup"
        return "race" if any(one is not None for one in self._race) else "search"

    def finalists(self) -> list[FinalistStatus]:
        asked: dict[tuple[str, int], Sequence[Sequence[int]]] = {}
        scores: dict[str, list[float]] = {}
        for one in self._race:
            if one is None:
                continue
            unit = one["worker"], one["unit"]
            if one["type"] == "RaceRequest":
                asked[unit] = one["candidates"]
                continue
            for candidate, row in zip(asked.get(unit, ()), one["scores"], strict=False):
                scores.setdefault(_name(candidate), []).extend(score for score in row if score is not None)
        found = [FinalistStatus(name, sum(row) / len(row), len(row)) for name, row in scores.items() if row]
        return sorted(found, key=lambda one: -one.score)


def _worker(entries: Iterator[Mapping[str, Any]], spent: SpentSoFar) -> WorkerStatus | None:
    heading = next(entries, None)
    if heading is None:  # made this moment
        return None
    found = WorkerStatus(str(heading["of"]))
    scores: list[float] = []
    for entry in entries:
        spent.read(found.name, entry)
        if entry["kind"] != "rollout":
            continue
        score, failure = entry.get("score"), entry.get("failure")
        if score is None:
            found.missing += 1
        else:
            scores.append(score)
            found.failed += failure is not None
        if failure is not None:
            said = str(entry.get("error", failure))
            found.last_error = (
                said.partition(":")[0] if heading.get("private") else said.partition("\n")[0][:200]
            )
        if not entry.get("shared"):
            found.lm_calls += entry["usage"][0]
            found.tokens += entry["usage"][1] + entry["usage"][2]
    found.rollouts = len(scores)
    found.mean_score = _mean(scores)
    found.latest_score = _mean(scores[-LATEST:])
    return found


def _entries(path: Path) -> Iterator[Mapping[str, Any]]:
    """Of a journal that may not be there yet."""
    return read_journal(path) if path.exists() else iter(())


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _name(candidate: Sequence[int]) -> str:
    return "student" if not any(candidate) else "arms " + json.dumps(list(candidate), separators=(",", ":"))
