"""`Result` as plain data and as a table; curves and the progress bar from recorded events alone."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.engines.local import LocalEngine
from asyndbt_dspy.engines.protocols import SERVER, Recorded
from asyndbt_dspy.reporting import explain
from asyndbt_dspy.runs.observers import CurveRecorder, ProgressBar
from asyndbt_dspy.runs.result import CandidateResult, Result, WorkerResult


def candidate(name: str, **changes: Any) -> CandidateResult:
    fields: dict[str, Any] = {
        "name": name, "arms": (0, 1), "program": {"self": {"instructions": "Hm.", "demos": []}},
        "score": 0.5, "low": 0.4, "high": 0.6, "examples": 12, "advantage": 0.1, "advantage_error": 0.05,
        "eliminated": False, "won": False,
    }  # fmt: skip
    return CandidateResult(**{**fields, **changes})


def worker(name: str, **changes: Any) -> WorkerResult:
    fields: dict[str, Any] = {
        "name": name, "calls": 10, "missing": 1, "failed": 0, "reused": 2, "busy_s": 1.5, "steps": 3,
        "largest_staleness": 2, "mean_staleness": 0.5,
    }  # fmt: skip
    return WorkerResult(**{**fields, **changes})


def result(*candidates: CandidateResult, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "winner": "student", "why": "Because.", "stopped": "done", "candidates": candidates, "curve": (),
        "workers": (worker("eu"), worker("us", set_aside="its LM failed")), "metric_calls": 20, "seconds": 3.0,
    }  # fmt: skip
    return Result(**{**fields, **changes})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_becomes_null(value: float) -> None:
    plain = result(candidate("student", score=value), settings={"clip": [value, 1.0]}).to_dict()
    json.dumps(plain, allow_nan=False)
    assert plain["candidates"][0]["score"] is None
    assert plain["settings"]["clip"] == [None, 1.0]


def test_the_table_tells_won_lost_and_eliminated_apart() -> None:
    table = str(
        result(
            candidate("student", advantage=None),
            candidate("candidate 1", won=True),
            candidate("candidate 2", eliminated=True),
            candidate("candidate 3", score=None, low=None, high=None, advantage=None),
        )
    )
    rows = {line.split("  ")[0]: line for line in table.splitlines() if line}
    assert rows["student"].endswith("lost")
    assert rows["candidate 1"].endswith("won")
    assert rows["candidate 2"].endswith("eliminated")
    assert "-" in rows["candidate 3"]
    assert "None" not in table
    assert "nan" not in table
    assert rows["us"].endswith("its LM failed")


def test_every_field_of_the_result_is_described() -> None:
    for kind in (Result, CandidateResult, WorkerResult):
        for field in dataclasses.fields(kind):
            assert field.name in (kind.__doc__ or "") or field.name in _SELF_EXPLAINING, (kind, field.name)


_SELF_EXPLAINING = {
    "calls",
    "missing",
    "failed",
    "reused",
    "busy_s",
    "steps",
    "largest_staleness",
    "mean_staleness",
    "name",
}


class Score:
    """An evaluator of a toy: arm 0 is worse than the others."""

    async def evaluate(self, request: Any) -> Any:
        from asyndbt_dspy.core.messages import Outcome, Scored

        rows = tuple(
            tuple(Outcome(float(one[0] > 0)) for _ in examples)
            for one, examples in zip(request.candidates, request.examples, strict=True)
        )
        return Scored(request.worker, request.task, rows, sum(map(len, rows)))


def machines() -> tuple[Any, Any]:
    from asyndbt_dspy.core.policies import WorkerSpace
    from asyndbt_dspy.core.server import Member, ServerState
    from asyndbt_dspy.core.space import Arm, Block, Space
    from asyndbt_dspy.core.worker import WorkerState

    arms = (Arm(""), Arm("i:self:1"), Arm("i:self:2"))
    space = Space((Block("self/instructions", "self", "instructions", arms),))
    config = AlgorithmConfig(active_workers=2)
    members = [Member(name, (), held_out=10) for name in ("eu", "us")]
    server = ServerState(space, members, config, 200)
    workers = [
        WorkerState(member.name, number, WorkerSpace(space, ()), config, examples=30)
        for number, member in enumerate(members)
    ]
    return server, workers


def observed(*observers: Any, server: Any, workers: Any) -> list[Recorded]:
    import asyncio

    recorded: list[Recorded] = []
    asyncio.run(LocalEngine().run(server, workers, Score(), [recorded.append, *observers]))
    return recorded


def test_the_curve_has_one_record_per_update_of_z() -> None:
    server, workers = machines()
    curve = CurveRecorder(server)
    observed(curve, server=server, workers=workers)
    assert [one.version for one in curve.records] == list(range(1, server.version + 1))
    assert np.allclose(curve.records[-1].z["self/instructions"], server.z)
    assert curve.records[-1].z["self/instructions"] != curve.records[0].z["self/instructions"]
    assert sorted(curve.records[0].active) == ["eu", "us"]
    assert sum(map(len, curve.lateness.values())) == sum(len(one.active) for one in curve.records)


def test_the_curve_does_not_change_the_run() -> None:
    server, workers = machines()
    plain = observed(server=server, workers=workers)
    server, workers = machines()
    watched = observed(CurveRecorder(server), server=server, workers=workers)
    assert [one.machine for one in plain] == [one.machine for one in watched]


def test_the_bar_counts_every_call_once(capsys: pytest.CaptureFixture[str]) -> None:
    server, workers = machines()
    bar = ProgressBar(server, 200, spent=7)
    recorded = observed(bar, server=server, workers=workers)
    replies = [one.event for one in recorded if one.machine == SERVER and hasattr(one.event, "calls")]
    assert bar.bar.n == 7 + sum(one.calls for one in replies) == 7 + server.calls_spent
    bar.close()
    shown = capsys.readouterr().err
    assert "best 1.000" in shown
    assert "/200" in shown


@pytest.mark.parametrize(
    ("advantage", "reason"),
    [
        (0.05, "not by more than 1.05 standard errors"),
        (0.3, "mostly in how sure the LM was, hardly in the metric"),
    ],
)
def test_the_reason_says_why_a_program_that_was_ahead_is_not_returned(advantage: float, reason: str) -> None:
    student = candidate("student", advantage=None, won=True)
    other = candidate("candidate 1", advantage=advantage, advantage_error=0.1, won=False, eliminated=False)
    said = explain("student", [student, other], 1.0)
    assert reason in said
    assert "so the student is returned as it was" in said
