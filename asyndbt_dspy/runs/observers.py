"""Observers of a run's events: curves for the result, and the progress bar. No state of the run depends on them."""

from __future__ import annotations

import math
from typing import Any

from asyndbt_dspy.core.messages import RaceReply, RoundReply, StepReply
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.engines.protocols import SERVER, Recorded
from asyndbt_dspy.runs.result import IterationRecord


class CurveRecorder:
    """Builds one ``IterationRecord`` per update of z."""

    def __init__(self, server: ServerState) -> None:
        self.server = server
        self.records: list[IterationRecord] = []
        self.lateness: dict[str, list[int]] = {member.name: [] for member in server.members}
        self._waiting: list[StepReply] = []
        self._version = 0

    def __call__(self, recorded: Recorded) -> None:
        event = recorded.event
        if recorded.machine != SERVER or not isinstance(event, StepReply):
            return
        self._waiting.append(event)
        if self.server.version > self._version:
            self._close(recorded.time_s)

    def _close(self, time_s: float) -> None:
        server = self.server
        late = [self._version - reply.version for reply in self._waiting]
        for reply, amount in zip(self._waiting, late, strict=True):
            self.lateness[reply.worker].append(amount)
        losses = [reply.loss for reply in self._waiting if math.isfinite(reply.loss)]
        self._version = server.version
        self.records.append(
            IterationRecord(
                version=server.version,
                time_s=time_s,
                active=tuple(reply.worker for reply in self._waiting),
                staleness=tuple(late),
                loss=sum(losses) / len(losses) if losses else None,
                calls=server.calls_spent,
                active_cuts=len(server.planes),
                multipliers=float(sum(plane.multiplier for plane in server.planes)),
                z={
                    block.name: tuple(server.z[part].tolist())
                    for block, part in zip(server.space.lower, server.layout.slices, strict=True)
                },
            )
        )
        self._waiting = []


class ProgressBar:
    """A ``tqdm`` bar: calls, calls left, best score so far, time left.

    Args:
        total: Rollouts of the whole budget, ``None`` if unbounded.
    """

    def __init__(self, server: ServerState, total: int | None, spent: int) -> None:
        from tqdm.auto import tqdm

        self.server = server
        self.spent = spent
        self.bar: Any = tqdm(total=total, initial=spent, unit="call", desc="AsynDBT", dynamic_ncols=True)

    def __call__(self, recorded: Recorded) -> None:
        if recorded.machine == SERVER and isinstance(recorded.event, (StepReply, RoundReply, RaceReply)):
            self.bar.update(recorded.event.calls)
            self.bar.set_postfix_str(self._best(), refresh=False)

    def _best(self) -> str:
        if self.server.race is None:
            return f"searching, iteration {self.server.version}"
        scores = [row.mean for row in self.server.race.standings() if math.isfinite(row.mean)]
        return f"racing, best {max(scores):.3f}" if scores else "racing"

    def close(self) -> None:
        self.bar.close()
