"""What AsynDBT would return if it stopped at a point of its run; scored on the test set only after the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import dspy

POINTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Parts of the budget at which an incumbent is kept; the program that is returned is the last point."""


@dataclass(frozen=True)
class Incumbent:
    """A program, and the rollouts paid for until it was the best."""

    rollouts: int
    program: dspy.Module


class Watched:
    """An engine that keeps incumbents while another one runs."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.incumbents: list[Incumbent] = []

    async def run(self, server: Any, workers: Any, evaluator: Any, observers: Sequence[Any] = ()) -> None:
        left = server.calls_left or 0
        before = sum(use.calls for use in evaluator.uses.values())
        total = before + left + server.race_calls
        points = [point * total for point in POINTS]

        def watch(recorded: Any) -> None:
            spent = before + server.calls_spent
            if points and spent >= points[0]:
                while points and spent >= points[0]:
                    points.pop(0)
                candidate = self.best(server)
                self.incumbents.append(Incumbent(spent, evaluator.programs.build(candidate, fresh=True)))

        await self.engine.run(server, workers, evaluator, [*observers, watch])

    @staticmethod
    def best(server: Any) -> Any:
        """The leader of the race where it runs, else the search's first finalist; the student if there is none."""
        if server.race is not None:
            standings = [row for row in server.race.standings() if row.in_race and row.count]
            if standings:
                return max(standings, key=lambda row: row.mean).candidate
        if not server.version:
            return server.space.student
        return next(iter(server.finalists()), server.space.student)
