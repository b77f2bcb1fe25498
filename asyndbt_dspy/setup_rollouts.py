"""The rollouts of a compile's setup, probes and traces: made for all workers at once, before there is anything to search.

The search cannot begin before they are in, so nobody waits long for few of them: calls that hang are left behind, and of
workers that are far behind the others only what came in by then is used. What was in is journalled: a resumed run
has to come to the same instructions and demos, whatever is answered the second time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import dspy

from asyndbt_dspy.errors import WorkerFailedError
from asyndbt_dspy.programs.evaluator import ProgramEvaluator
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.programs.stragglers import cancelled


class Asked(NamedTuple):
    """One rollout to make; ``trace``: whether its trace is wanted."""

    worker: str
    program: dspy.Module
    example: dspy.Example
    trace: bool = False


class SetupBook(Protocol):
    """Remembers what the setup of a run came to."""

    def setup(self) -> Mapping[str, Any] | None:
        """``{"asked": {stage: count}, "in_time": {stage: numbers}, "calls": n}`` of an earlier process, else ``None``."""
        ...

    def keep_setup(self, found: Mapping[str, Any]) -> None: ...


class SetupRollouts:
    """Makes the setup's rollouts, stage by stage.

    Args:
        book: Knows which were in when an earlier process of the run went on. Then nothing is asked for again.
    """

    def __init__(self, evaluator: ProgramEvaluator, book: SetupBook) -> None:
        self.evaluator = evaluator
        self._book = book
        self._known = book.setup()
        self._asked: dict[str, int] = {}
        self._in_time: dict[str, list[int]] = {}

    def count(self, stage: str, most: int) -> int:
        """Rollouts that a stage makes: ``most``, but as many as in an earlier process, also where the budget was raised since."""
        if self._known is not None:
            return int(self._known["asked"].get(stage, 0))
        self._asked[stage] = most
        return most

    async def run(
        self, stage: str, asked: Sequence[Asked], may_begin: Callable[[], bool] = lambda: True
    ) -> list[Rollout | None]:
        """All rollouts of a stage; ``None`` for stragglers, and where a worker failed: the search sets those aside itself.

        Any other error (of the metric, say) ends the rest at once, before more is paid for.

        Args:
            may_begin: Asked when it is a rollout's turn; ``None`` stands for one that may not.
        """
        if self._known is None:
            found = await self._make(asked, may_begin)
            self._in_time[stage] = [number for number, one in enumerate(found) if one is not None]
            return found
        in_time = set(self._known["in_time"].get(stage, ()))
        # What came in too late counts as well.
        known = [self.evaluator.recall(*one[:3], trace=one.trace) for one in asked]
        # What no journal can hold (a trace with values that JSON does not carry) is made again.
        lost = [number for number, one in enumerate(known) if one is None and number in in_time]
        again = dict(zip(lost, await self._make([asked[one] for one in lost], waits=True), strict=True))
        return [again.get(number, one) if number in in_time else None for number, one in enumerate(known)]

    async def _make(
        self, asked: Sequence[Asked], may_begin: Callable[[], bool] = lambda: True, *, waits: bool = False
    ) -> list[Rollout | None]:
        """``waits``: for every one of them, however late."""
        # As many at a time as the evaluator makes, so that each is asked about when its turn has come.
        turns = {name: asyncio.Semaphore(part.max_concurrency) for name, part in self.evaluator.parts.items()}
        tasks = [asyncio.ensure_future(self._tolerant(one, turns[one.worker], may_begin)) for one in asked]
        left: set[asyncio.Task[Any]] = set()
        try:
            if waits:
                await asyncio.gather(*tasks)
            else:
                owners: dict[asyncio.Task[Any], str] = {
                    task: one.worker for task, one in zip(tasks, asked, strict=True)
                }
                left = await self.evaluator.stragglers.settle_workers(owners)
        except BaseException:
            await cancelled(tasks)
            raise
        for late in left:
            if self.evaluator.stragglers.has_begun(late):
                self.evaluator.leave_behind(late)
            else:
                late.cancel()
        return [None if task in left else task.result() for task in tasks]

    @property
    def calls(self) -> int:
        """Rollouts paid for so far; what was left behind may still complete."""
        return sum(use.calls for use in self.evaluator.uses.values()) + self.evaluator.left_behind

    def close(self) -> int:
        """The setup is over; returns the calls that it counts for, in every process of the run alike."""
        if self._known is not None:
            return int(self._known["calls"])
        calls = self.calls
        self._book.keep_setup({"asked": self._asked, "in_time": self._in_time, "calls": calls})
        return calls

    async def _tolerant(
        self, asked: Asked, turn: asyncio.Semaphore, may_begin: Callable[[], bool]
    ) -> Rollout | None:
        worker, program, example, trace = asked
        async with turn:
            if not may_begin():
                return None
            try:
                return await self.evaluator.rollout(worker, program, example, trace=trace)
            except WorkerFailedError:
                return None
