"""The default engine: asyncio in this process. Whatever ends first is taken first."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from asyndbt_dspy.core.messages import ArmsJoined, Evaluate, Scored, StopSearch, WorkerLost
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.driver import Driver
from asyndbt_dspy.engines.protocols import Between, Clock, Evaluator, Observer, Recorded, WorkerFailedError
from asyndbt_dspy.errors import ConfigurationError, ProtocolError


class LocalEngine:
    """Workers as asyncio tasks of the running loop.

    Args:
        answer_timeout_s: Seconds after which a worker that has not answered a request is set aside.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        *,
        answer_timeout_s: float = math.inf,
        clock: Clock = time.monotonic,
    ) -> None:
        if not answer_timeout_s > 0:
            raise ConfigurationError(f"answer_timeout_s={answer_timeout_s!r} must be > 0 seconds")
        self.answer_timeout_s = answer_timeout_s
        self.clock = clock
        self._stop: StopSearch | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: asyncio.Future[None] | None = None
        self._earlier: Iterable[Recorded] = ()
        self._elapsed_s = 0.0
        self.between: Between | None = None

    def resume(self, earlier: Iterable[Recorded], elapsed_s: float = 0.0) -> None:
        """The next ``run`` first takes events that an earlier process took, in their order.

        Args:
            earlier: Events from outside (``Scored``, ``WorkerLost``, ``StopSearch``, ``ArmsJoined``); asked for one by one,
                each after everything that followed from the one before has happened again.
            elapsed_s: Seconds that the earlier process spent.
        """
        self._earlier, self._elapsed_s = earlier, elapsed_s

    def stop_search(self, stop: StopSearch) -> None:
        self._stop = stop
        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(self._wake_up)

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def run(
        self,
        server: ServerState,
        workers: Sequence[WorkerState],
        evaluator: Evaluator,
        observers: Sequence[Observer] = (),
    ) -> None:
        started = self.clock() - self._elapsed_s
        self._loop = asyncio.get_running_loop()
        driver = Driver(server, workers, observers, lambda: 0.0)  # a resumed run begins again when it began
        tasks: _Tasks = {}
        abandoned: list[asyncio.Task[Scored]] = []

        def begin(requests: list[Evaluate]) -> None:
            for request in requests:
                task = asyncio.ensure_future(evaluator.evaluate(request))
                tasks[task] = (request, self.clock() + self.answer_timeout_s)

        try:
            begin(driver.start())
            driver.clock = lambda: self.clock() - started
            await self._repeat(driver, tasks, begin)
            while not driver.finished:
                if self._stop is not None:
                    stop, self._stop = self._stop, None
                    begin(driver.stop_search(stop))
                    continue
                joined = None if self.between is None else await self.between()
                if joined is not None:
                    begin(driver.join_arms(joined))
                    continue
                done = await self._wait(tasks)
                # Ties of the clock break by worker index, so that equal timings give equal runs.
                for task in sorted(done, key=lambda one: driver.workers[tasks[one][0].worker].index):
                    begin(self._take(driver, tasks.pop(task)[0], task))
                for task in self._late(tasks):
                    abandoned.append(task)
                    begin(self._give_up(driver, tasks.pop(task)[0], task))
        finally:
            self._loop = self._wake = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, *abandoned, return_exceptions=True)

    async def _repeat(self, driver: Driver, tasks: _Tasks, begin: Callable[[list[Evaluate]], None]) -> None:
        """Take the events of an earlier process; evaluations answer what was paid for and leave the rest for later."""
        clock = driver.clock
        for one in self._earlier:
            driver.clock = lambda time_s=one.time_s: time_s
            event = one.event
            if isinstance(event, StopSearch):
                begin(driver.stop_search(event))
                continue
            if isinstance(event, ArmsJoined):
                begin(driver.join_arms(event))
                continue
            assert isinstance(event, (Scored, WorkerLost))
            task = next(
                (task for task, (request, _) in tasks.items() if request.worker == event.worker), None
            )
            if task is not None:
                del tasks[task]
                if isinstance(event, WorkerLost):
                    task.cancel()
                await asyncio.wait([task])
            begin(
                driver.complete(event)
                if isinstance(event, Scored)
                else driver.lose(event.worker, event.reason)
            )
        driver.clock = clock
        self._earlier, self._elapsed_s = (), 0.0

    async def _wait(self, tasks: _Tasks) -> list[asyncio.Task[Scored]]:
        """Tasks that are done once something is: an evaluation, a time limit, or ``stop_search``."""
        if not tasks:
            raise ProtocolError("no evaluation is under way and the run is not over; please report this")
        until = min(limit for _, limit in tasks.values())
        timeout = None if math.isinf(until) else max(0.0, until - self.clock())
        self._wake = asyncio.get_running_loop().create_future()
        if self._stop is None:  # stop_search may have been called since the last look
            waiting: set[asyncio.Future[Any]] = {*tasks, self._wake}
            await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self._wake.cancel()
        return [task for task in tasks if task.done()]

    def _take(self, driver: Driver, request: Evaluate, task: asyncio.Task[Scored]) -> list[Evaluate]:
        try:
            scored = task.result()
        except WorkerFailedError as error:
            return driver.lose(request.worker, str(error))
        return driver.complete(scored)

    def _late(self, tasks: _Tasks) -> list[asyncio.Task[Scored]]:
        now = self.clock()
        return [task for task, (_, limit) in tasks.items() if now >= limit and not task.done()]

    def _give_up(self, driver: Driver, request: Evaluate, task: asyncio.Task[Scored]) -> list[Evaluate]:
        task.cancel()
        return driver.lose(request.worker, f"no answer within {self.answer_timeout_s:g} s")


_Tasks = dict[asyncio.Task[Scored], tuple[Evaluate, float]]
"""Evaluations under way, with the time on the clock at which each is given up."""
