"""Scripted evaluators, delays and stops for the suite that any engine must pass (``conformance``)."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable
from typing import Any

from asyndbt_dspy.core.messages import Evaluate, Scored, StopSearch
from asyndbt_dspy.engines.protocols import SERVER, Engine, Evaluator, Recorded, WorkerFailedError
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score

Delays = Callable[[Evaluate], float]
"""Virtual seconds that an evaluation takes; ``inf`` never ends."""

SLOW_WORKER = {"w0": 0.001, "w1": 0.0015, "w2": 0.0061}


def scripted_delays(request: Evaluate) -> float:
    """Fixed unequal speeds, with a ripple per task, so that workers overtake each other."""
    return SLOW_WORKER[request.worker] * (1.0 + 0.37 * (request.task * 7 % 5))


class VirtualTime:
    """An evaluator whose answers come in the order of virtual delays, for engines that run on real time.

    Answers wait until every evaluation that can start has started; then the earliest one is let go and ``now_s`` moves
    to its time. An evaluation that never ends holds the queue at its time limit until the engine cancels it.

    Args:
        evaluator: What scores.
        delays: Virtual seconds per evaluation.
        answer_timeout_s: The engine's own limit.
    """

    def __init__(self, evaluator: Evaluator, delays: Delays, answer_timeout_s: float = math.inf) -> None:
        self._evaluator = evaluator
        self._delays = delays
        self._answer_timeout_s = answer_timeout_s
        self._queue: list[tuple[float, str, int, asyncio.Future[None], bool]] = []
        self._count = 0
        self._pumping = False
        self.now_s = 0.0

    def clock(self) -> float:
        """To be given to the engine."""
        return self.now_s

    async def evaluate(self, request: Evaluate) -> Scored:
        delay = self._delays(request)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ends = delay <= self._answer_timeout_s
        time_s = self.now_s + (delay if ends else self._answer_timeout_s)
        self._count += 1
        heapq.heappush(self._queue, (time_s, request.worker, self._count, turn, ends))
        if not self._pumping:
            self._pumping = True
            self._soon(self._release)
        await turn
        return await self._evaluator.evaluate(request)

    def _soon(self, action: Callable[[], None], turns: int = 25) -> None:
        """After so many turns of the loop: everything that could react to the last answer has."""
        later = action if turns == 0 else lambda: self._soon(action, turns - 1)
        asyncio.get_running_loop().call_soon(later)

    def _release(self) -> None:
        self._queue = [entry for entry in self._queue if not entry[3].done()]
        heapq.heapify(self._queue)
        if not self._queue:
            self._pumping = False
            return
        time_s, _, _, turn, ends = self._queue[0]
        self.now_s = max(self.now_s, time_s)
        if ends:
            turn.set_result(None)
            self._soon(self._release)
        else:
            turn.add_done_callback(lambda _: self._soon(self._release))


class Failing:
    """A worker (``""``: each) whose evaluations fail after some successes."""

    def __init__(self, worker: str, after: int, error: Exception | None = None) -> None:
        self._table = TableEvaluator(additive_score)
        self._worker = worker
        self._left: dict[str, int] = {}
        self._after = after
        self._error = error or WorkerFailedError("the LM fails again and again")

    async def evaluate(self, request: Evaluate) -> Scored:
        if self._worker in ("", request.worker):
            self._left[request.worker] = self._left.get(request.worker, self._after) - 1
            if self._left[request.worker] < 0:
                raise self._error
        return await self._table.evaluate(request)


class Gate:
    """Answers some evaluations and never the others; ``reached`` is set when the first of those comes in."""

    def __init__(self, after: int) -> None:
        self.reached = asyncio.Event()
        self._left = after
        self._table = TableEvaluator(additive_score)

    async def evaluate(self, request: Evaluate) -> Scored:
        self._left -= 1
        if self._left < 0:
            self.reached.set()
            await asyncio.get_running_loop().create_future()
        return await self._table.evaluate(request)


class Stopping:
    """Asks for the end at once in the same breath as it ends an evaluation, the ``count``-th.

    Attributes:
        over: The results of all evaluations that were over by then, this one included.
    """

    def __init__(self, engine: Engine, evaluator: Evaluator, count: int) -> None:
        self.over: list[Scored] = []
        self._engine = engine
        self._evaluator = evaluator
        self._count = count

    async def evaluate(self, request: Evaluate) -> Scored:
        scored = await self._evaluator.evaluate(request)
        if len(self.over) < self._count:
            self.over.append(scored)
            if len(self.over) == self._count:
                self._engine.stop_search(StopSearch("enough", race=False))
        return scored


class Late:
    """Answers all the same when it is cancelled."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.answers: list[Scored] = []
        self._table = TableEvaluator(additive_score)
        self._evaluator = evaluator

    async def evaluate(self, request: Evaluate) -> Scored:
        try:
            return await self._evaluator.evaluate(request)
        except asyncio.CancelledError:
            self.answers.append(await self._table.evaluate(request))
            return self.answers[-1]


def hang(worker: str, after: int) -> Delays:
    """The scripted delays, but this worker stops answering after some tasks."""
    return lambda one: math.inf if one.worker == worker and one.task > after else scripted_delays(one)


def stop_after(events: int, **stop: Any) -> Callable[[Recorded, Engine], None]:
    """Ask the engine to stop once the server has taken so many events."""
    seen = 0

    def watch(recorded: Recorded, engine: Engine) -> None:
        nonlocal seen
        seen += recorded.machine == SERVER
        if seen == events and recorded.machine == SERVER:
            engine.stop_search(StopSearch("enough", **stop))

    return watch
