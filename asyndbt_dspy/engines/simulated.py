"""A virtual clock: evaluations end in the order of seeded delays, not of real time.

``SimulatedEngine`` serves tests, benchmarks and planning, and is what makes ``deterministic=True`` deterministic: with
``eager=True`` evaluations run concurrently in real time, but their results are taken in the order of the virtual clock.
Ties break by worker index, then by the order in which they were handed out.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from asyndbt_dspy.core.messages import ArmsJoined, Evaluate, Scored, StopSearch
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.driver import Driver
from asyndbt_dspy.engines.protocols import Between, Evaluator, Observer, Recorded, WorkerFailedError
from asyndbt_dspy.errors import ConfigurationError, ProtocolError

Delays = Callable[[Evaluate], float]
"""Virtual seconds that an evaluation takes; ``inf`` never ends."""


def lognormal_delays(
    median_s: float,
    sigma: float,
    seed: int,
    factors: dict[str, float] | None = None,
    workers: Iterable[str] = (),
) -> Delays:
    """One independent log-normal delay per evaluation; ``factors`` slow single workers down (``algorithm.md`` 9).

    Args:
        workers: Those whose random numbers are prepared at once, so that nothing of it falls into the run.
    """

    def generator(worker: str) -> np.random.Generator:
        return np.random.default_rng([seed, *worker.encode()])

    generators = {worker: generator(worker) for worker in workers}

    def delay(request: Evaluate) -> float:
        if request.worker not in generators:
            generators[request.worker] = generator(request.worker)
        drawn = float(generators[request.worker].lognormal(math.log(median_s), sigma)) if sigma else median_s
        return drawn * (factors or {}).get(request.worker, 1.0)

    return delay


def work_delays(factors: dict[str, float] | None = None) -> Delays:
    """One virtual second per rollout, times the worker's factor: no random numbers."""

    def delay(request: Evaluate) -> float:
        rollouts = sum(len(row) for row in request.examples)
        return max(1, rollouts) * (factors or {}).get(request.worker, 1.0)

    return delay


class SimulatedEngine:
    """An engine on a virtual clock.

    Args:
        delays: Virtual seconds per evaluation.
        answer_timeout_s: Virtual seconds after which a worker that has not answered is set aside.
        eager: Start evaluations at once, concurrently, instead of when the virtual clock reaches them.

    Attributes:
        now_s: The virtual clock.
    """

    def __init__(self, delays: Delays, *, answer_timeout_s: float = math.inf, eager: bool = False) -> None:
        if not answer_timeout_s > 0:
            raise ConfigurationError(f"answer_timeout_s={answer_timeout_s!r} must be > 0 seconds")
        self.delays = delays
        self.answer_timeout_s = answer_timeout_s
        self.eager = eager
        self.now_s = 0.0
        self.busy_s: dict[str, float] = {}
        self._stop: StopSearch | None = None
        self._halted: asyncio.Future[None] | None = None
        self._earlier: Iterable[Recorded] = ()
        self.between: Between | None = None

    def resume(self, earlier: Iterable[Recorded], elapsed_s: float = 0.0) -> None:
        """As of ``ResumableEngine``. The virtual clock repeats the order of evaluations; the other events are taken over."""
        self._earlier = earlier

    def stop_search(self, stop: StopSearch) -> None:
        self._stop = stop
        # An end at once does not wait for the evaluation that is next.
        halted = self._halted
        if not stop.race and halted is not None:
            halted.get_loop().call_soon_threadsafe(_set, halted)

    async def run(
        self,
        server: ServerState,
        workers: Sequence[WorkerState],
        evaluator: Evaluator,
        observers: Sequence[Observer] = (),
    ) -> None:
        driver = Driver(server, workers, observers, lambda: self.now_s)
        schedule = _Schedule(evaluator, {worker.name: worker.index for worker in workers}, self.eager)
        self._halted = asyncio.get_running_loop().create_future()
        try:
            self._push(schedule, driver.start())
            for one in self._earlier:
                await self._repeat(schedule, driver, one.event)
            self._earlier = ()
            while not driver.finished:
                if self._stop is not None:
                    stop, self._stop = self._stop, None
                    if not stop.race:
                        self._take_done(schedule, driver)
                    self._push(schedule, driver.stop_search(stop))
                    continue
                joined = None if self.between is None else await self.between()
                if joined is not None:
                    self._push(schedule, driver.join_arms(joined))
                    continue
                self._push(schedule, await self._next(schedule, driver))
        finally:
            self._halted.cancel()
            self._halted = None
            await schedule.close()

    async def _repeat(self, schedule: _Schedule, driver: Driver, event: object) -> None:
        if isinstance(event, StopSearch):
            self._push(schedule, driver.stop_search(event))
            return
        if isinstance(event, ArmsJoined):
            self._push(schedule, driver.join_arms(event))
            return
        while schedule.next_worker() in driver.lost:
            await self._next(schedule, driver)
        self._push(schedule, await self._next(schedule, driver))

    def _push(self, schedule: _Schedule, requests: list[Evaluate]) -> None:
        for request in requests:
            delay = self.delays(request)
            spent = min(delay, self.answer_timeout_s)
            if math.isinf(spent):
                raise ConfigurationError(
                    f"worker {request.worker!r} never answers and answer_timeout_s is infinite; set a bound"
                )
            self.busy_s[request.worker] = self.busy_s.get(request.worker, 0.0) + spent
            schedule.push(self.now_s + spent, request, answers=delay <= self.answer_timeout_s)

    def _take_done(self, schedule: _Schedule, driver: Driver) -> None:
        """What is over already counts in a run that ends at once, wherever the virtual clock stands."""
        for time_s, request, task in schedule.pop_done():
            self.now_s = max(self.now_s, time_s)
            try:
                self._push(schedule, driver.complete(task.result()))
            except WorkerFailedError as error:
                self._push(schedule, driver.lose(request.worker, str(error)))

    async def _next(self, schedule: _Schedule, driver: Driver) -> list[Evaluate]:
        time_s, request, answers, work = schedule.pop()
        self.now_s = time_s
        if not answers:
            return driver.lose(request.worker, f"no answer within {self.answer_timeout_s:g} s")
        if request.worker in driver.lost:
            await schedule.discard(work)
            return []
        try:
            scored = await self._unless_halted(work or asyncio.ensure_future(schedule.evaluate(request)))
        except WorkerFailedError as error:
            return driver.lose(request.worker, str(error))
        return [] if scored is None else driver.complete(scored)

    async def _unless_halted(self, task: asyncio.Task[Scored]) -> Scored | None:
        """The result of an evaluation, ``None`` where the run is to end at once."""
        assert self._halted is not None  # only while a run is under way
        try:
            waiting: set[asyncio.Future[Any]] = {task, self._halted}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _set(halted: asyncio.Future[None]) -> None:
    if not halted.done():
        halted.set_result(None)


class _Schedule:
    """Evaluations in the order of their virtual ends."""

    def __init__(self, evaluator: Evaluator, indices: dict[str, int], eager: bool) -> None:
        self.evaluate = evaluator.evaluate
        self._indices = indices
        self._eager = eager
        self._heap: list[tuple[float, int, int, Evaluate, bool, asyncio.Task[Scored] | None]] = []
        self._count = 0

    def push(self, time_s: float, request: Evaluate, answers: bool) -> None:
        # Not eager: an evaluation does not exist before its turn. With thousands under way the collector would visit each.
        work = asyncio.ensure_future(self.evaluate(request)) if answers and self._eager else None
        self._count += 1
        entry = (time_s, self._indices[request.worker], self._count, request, answers, work)
        heapq.heappush(self._heap, entry)

    def pop(self) -> tuple[float, Evaluate, bool, asyncio.Task[Scored] | None]:
        """The next one, with its task where it was begun already."""
        if not self._heap:
            raise ProtocolError("no evaluation is under way and the run is not over; please report this")
        time_s, _, _, request, answers, work = heapq.heappop(self._heap)
        return time_s, request, answers, work

    def pop_done(self) -> list[tuple[float, Evaluate, asyncio.Task[Scored]]]:
        """Evaluations that were started and are over in real time, in the order of their virtual ends."""
        done: list[tuple[float, Evaluate, asyncio.Task[Scored]]] = []
        left: list[tuple[float, int, int, Evaluate, bool, asyncio.Task[Scored] | None]] = []
        for entry in sorted(self._heap):
            if entry[-1] is not None and entry[-1].done():
                done.append((entry[0], entry[3], entry[-1]))
            else:
                left.append(entry)
        self._heap = left  # sorted, hence a heap
        return done

    def next_worker(self) -> str | None:
        """Whose evaluation ends next."""
        return self._heap[0][3].worker if self._heap else None

    async def close(self) -> None:
        """Cancel what is left, so that no evaluation outlives the run."""
        for entry in self._heap:
            if entry[-1] is not None:
                entry[-1].cancel()
        for entry in self._heap:
            await self.discard(entry[-1])
        self._heap.clear()

    async def discard(self, work: asyncio.Task[Scored] | None) -> None:
        """End an evaluation whose result nobody wants."""
        if work is not None:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
