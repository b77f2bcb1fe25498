"""From the machines of a finished run to its ``Result``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from asyndbt_dspy.core.messages import WorkerLost
from asyndbt_dspy.core.racing import Standing, bar
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.meter import RunMeter
from asyndbt_dspy.engines.protocols import Recorded
from asyndbt_dspy.programs.evaluator import ProgramEvaluator
from asyndbt_dspy.programs.slots import ProgramSpace
from asyndbt_dspy.runs.observers import CurveRecorder
from asyndbt_dspy.runs.result import CandidateResult, Result, WorkerResult


def make_result(
    programs: ProgramSpace,
    server: ServerState,
    workers: Sequence[WorkerState],
    evaluator: ProgramEvaluator,
    curve: CurveRecorder,
    meter: RunMeter,
    recorded: Sequence[Recorded],
    *,
    seconds: float,
    settings: dict[str, Any],
    spending: dict[str, dict[str, Any]],
) -> Result:
    """Plain data about a run; texts of private workers are not among it."""
    standings = server.race.standings() if server.race is not None else ()
    candidates = _candidates(programs, server, standings)
    winner = next((one.name for one in candidates if one.won), "student")
    accept_z = server.config.accept_z
    return Result(
        winner=winner,
        why=explain(winner, candidates, accept_z),
        stopped=server.finish_reason,
        candidates=candidates,
        curve=tuple(curve.records),
        workers=_workers(workers, evaluator, curve, recorded),
        metric_calls=sum(use.calls for use in evaluator.uses.values()),
        seconds=seconds,
        utilisation=meter.utilisation,
        largest_staleness=meter.largest_staleness,
        mean_staleness=meter.mean_staleness,
        settings=settings,
        spending=spending,
    )


def why_set_aside(recorded: Sequence[Recorded]) -> str:
    """What ended each worker, as the engine said it."""
    workers: dict[str, list[str]] = {}  # of one endpoint that is down all say the same
    for name, reason in _lost(recorded).items():
        workers.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in workers.items())


def _lost(recorded: Sequence[Recorded]) -> dict[str, str]:
    """Why which workers were set aside."""
    return {one.event.worker: one.event.reason for one in recorded if isinstance(one.event, WorkerLost)}


def _candidates(
    programs: ProgramSpace, server: ServerState, standings: Sequence[Standing]
) -> tuple[CandidateResult, ...]:
    rows = [
        CandidateResult(
            name="student" if not number else f"candidate {number}",
            arms=row.candidate,
            program=programs.describe(row.candidate),
            score=_finite(row.mean),
            low=_finite(row.low),
            high=_finite(row.high),
            examples=row.count,
            advantage=_finite(row.advantage) if number else None,
            advantage_error=_finite(row.error) if number else None,
            eliminated=not row.in_race,
            won=row.candidate == server.winner,
        )
        for number, row in enumerate(standings)
    ]
    if not rows:
        entrants = dict.fromkeys([server.space.student, server.winner])
        rows = [
            CandidateResult(
                name="student" if one == server.space.student else f"candidate {number}",
                arms=one,
                program=programs.describe(one),
                score=None,
                low=None,
                high=None,
                examples=0,
                advantage=None,
                advantage_error=None,
                eliminated=False,
                won=one == server.winner,
            )
            for number, one in enumerate(entrants)
        ]
    return tuple(rows)


def explain(winner: str, candidates: Sequence[CandidateResult], accept_z: float) -> str:
    """One sentence on why the program that was returned was."""
    chosen = next(one for one in candidates if one.won)
    if chosen.score is None and winner == "student":
        return "No race was run, and the search settled on the student, so it is returned as it was."
    if chosen.score is None:
        return "No race was run: the most probable arms were taken as they are."
    if winner == "student":
        ahead = [one for one in candidates if not one.eliminated and (one.advantage or 0.0) > 0.0]
        best = max(ahead, key=lambda one: one.advantage or 0.0, default=None)
        if best is None:
            return f"Nothing beat the student on {chosen.examples} held-out examples, so it is returned as it was."
        ahead_by = f"{best.advantage:+.3f} ± {best.advantage_error or 0:.3f}"
        needed = bar(accept_z, best.examples) if accept_z else 0.0
        reason = f"not by more than {needed:.3g} standard errors"
        if (best.advantage or 0.0) > needed * (best.advantage_error or 0.0):
            reason = "but mostly in how sure the LM was, hardly in the metric"
        return (
            f"{best.name} was ahead of the student by {ahead_by} on {best.examples} held-out examples: {reason}, so the "
            "student is returned as it was."
        )
    return (
        f"{winner} was ahead of the student by {chosen.advantage:+.3f} ± {chosen.advantage_error or 0:.3f} "
        f"on {chosen.examples} held-out examples."
    )


def _workers(
    workers: Sequence[WorkerState],
    evaluator: ProgramEvaluator,
    curve: CurveRecorder,
    recorded: Sequence[Recorded],
) -> tuple[WorkerResult, ...]:
    lost = _lost(recorded)
    rows = []
    for worker in workers:
        use, late = evaluator.use(worker.name), curve.lateness[worker.name]
        rows.append(
            WorkerResult(
                name=worker.name,
                calls=use.calls,
                missing=use.missing,
                failed=use.failed,
                reused=use.reused,
                busy_s=use.busy_s,
                steps=worker.step,
                largest_staleness=max(late, default=0),
                mean_staleness=sum(late) / len(late) if late else 0.0,
                lm_calls=use.lm_calls,
                prompt_tokens=use.prompt_tokens,
                completion_tokens=use.completion_tokens,
                set_aside=lost.get(worker.name, ""),
            )
        )
    return tuple(rows)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
