"""The result of a run: plain data, JSON, and a table that a person reads."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CandidateResult:
    """One candidate of the final race.

    Attributes:
        name: ``"student"`` or ``"candidate 1"`` ….
        arms: One arm per block.
        program: Per predictor its instructions and demos.
        score: Mean score on held-out data in the metric's unit, ``None`` if it was not raced.
        low, high: 95 % interval of ``score``.
        examples: Held-out examples scored.
        advantage: Mean paired difference to the student, with its standard error ``advantage_error``.
        eliminated: Whether it left the race before the end.
        won: Whether it is the program that was returned.
    """

    name: str
    arms: tuple[int, ...]
    program: dict[str, Any]
    score: float | None
    low: float | None
    high: float | None
    examples: int
    advantage: float | None
    advantage_error: float | None
    eliminated: bool
    won: bool


@dataclass(frozen=True)
class IterationRecord:
    """One update of z.

    Attributes:
        version: Its number, from 1.
        time_s: Seconds since the start of the search.
        active: Workers whose answers it used.
        staleness: Their lateness in iterations, in the same order.
        loss: Mean training loss of those answers, ``None`` if all rollouts were missing.
        calls: Rollouts paid for so far.
        active_cuts: Cutting planes in force; ``multipliers`` is the sum of their lambdas.
        z: Consensus distribution per lower-level block.
    """

    version: int
    time_s: float
    active: tuple[str, ...]
    staleness: tuple[int, ...]
    loss: float | None
    calls: int
    active_cuts: int
    multipliers: float
    z: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class WorkerResult:
    """What one worker did: rollouts, failures, seconds, lateness (in iterations), LM calls and tokens.

    Attributes:
        lm_calls, prompt_tokens, completion_tokens: Of rollouts that are over, as the worker's LM reported them (no tokens where it
            reports none); answers from a cache are free. ``Result.spending`` has all attempts.
        set_aside: Why it was set aside, empty if it was not.
    """

    name: str
    calls: int
    missing: int
    failed: int
    reused: int
    busy_s: float
    steps: int
    largest_staleness: int
    mean_staleness: float
    lm_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    set_aside: str = ""


@dataclass(frozen=True)
class Result:
    """Everything about one run that is worth keeping; ``to_dict`` is JSON, ``print`` is a table.

    Attributes:
        winner: Name of the candidate that was returned.
        why: Why it won, in words.
        stopped: Which rule ended the search.
        candidates: The student first.
        curve: One record per iteration.
        workers: In the order given.
        metric_calls: Completed rollouts, all phases together. Where the budget of a recorded run was raised, what was paid for
            before and not asked for again is not among them; it counts against the cap.
        seconds: From start to return.
        settings: Preset, seed, budget and what else is needed to repeat the run.
        utilisation: Share of the workers' time, from the first request to the end of the race, that they spent
            evaluating, in [0, 1]; of a deterministic run on its virtual clock.
        largest_staleness, mean_staleness: Of all steps, in updates of z.
        spending: Attempts on the wire, answers, tokens, dollars (exact, as text), cache hits and seconds held back by
            rate limits, by worker (and ``proposer``); see ``LedgerLine``.
    """

    winner: str
    why: str
    stopped: str
    candidates: tuple[CandidateResult, ...]
    curve: tuple[IterationRecord, ...]
    workers: tuple[WorkerResult, ...]
    metric_calls: int
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    spending: dict[str, dict[str, Any]] = field(default_factory=dict)
    utilisation: float = 0.0
    largest_staleness: int = 0
    mean_staleness: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def __str__(self) -> str:
        lines = [
            f"AsynDBT: {self.winner} won after {self.metric_calls} metric calls in {self.seconds:.1f} s "
            f"({len(self.curve)} iterations; {self.stopped})",
            self.why,
            "",
            f"{'candidate':<14}{'score':>9}{'95 % interval':>20}{'vs student':>20}{'examples':>10}  outcome",
        ]
        for one in self.candidates:
            interval = "" if one.low is None else f"{one.low:.3f} … {one.high:.3f}"
            versus = "" if one.advantage is None else f"{one.advantage:+.3f} ± {one.advantage_error or 0:.3f}"
            outcome = "won" if one.won else "eliminated" if one.eliminated else "lost"
            score = "-" if one.score is None else f"{one.score:.3f}"
            lines.append(f"{one.name:<14}{score:>9}{interval:>20}{versus:>20}{one.examples:>10}  {outcome}")
        counts = ("calls", "failed", "missing", "cached")
        head = "".join(f"{one:>9}" for one in counts)
        lines += ["", f"{'worker':<14}{head}{'tokens':>10}{'steps':>7}{'staleness':>16}{'busy s':>9}"]
        for worker in self.workers:
            late = f"max {worker.largest_staleness}, mean {worker.mean_staleness:.1f}"
            tokens = worker.prompt_tokens + worker.completion_tokens
            numbers = (worker.calls, worker.failed, worker.missing, worker.reused)
            row = f"{worker.name:<14}{''.join(f'{one:>9}' for one in numbers)}{tokens:>10}{worker.steps:>7}"
            lines.append(f"{row}{late:>16}{worker.busy_s:>9.1f}  {worker.set_aside}".rstrip())
        lines.append(
            f"{self.utilisation:.0%} of the workers' time spent evaluating; staleness at most "
            f"{self.largest_staleness}, {self.mean_staleness:.1f} on average"
        )
        return "\n".join([*lines, *self._spending_lines()])

    def _spending_lines(self) -> list[str]:
        if not self.spending:
            return []
        lines = [
            "",
            f"{'spent by':<14}{'attempts':>9}{'answers':>9}{'refused':>9}{'cut':>9}{'tokens':>10}{'dollars':>12}",
        ]
        unmeasured = 0
        for name, one in self.spending.items():
            about = "~" if one.get("unmeasured") else ""
            unmeasured += one.get("unmeasured", 0)
            tokens = f"{about}{one['prompt_tokens'] + one['completion_tokens'] + one['cut_tokens']}"
            dollars = float(one["dollars"]) + float(one["cut_dollars"])
            money = "unknown" if one["unpriced"] else f"{about}{dollars:.6f}"
            lines.append(
                f"{name:<14}{one['attempts']:>9}{one['answers']:>9}{one['refused']:>9}{one['cut']:>9}{tokens:>10}{money:>12}"
            )
        if unmeasured:
            lines.append(
                f"~ {unmeasured} answers came without a count of their tokens: estimated, and taken at their most where tokens "
                "or dollars are capped"
            )
        return lines


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become ``null``."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
