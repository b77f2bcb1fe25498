"""Calls that take far longer than their like: a unit of work goes on without them.

One call in fifty that hangs until its time limit would otherwise hold up every other unit, as a unit waits for its slowest
call. Such a call is left behind: its unit counts it as missing and as paid for, it goes on, and its answer is there the next
time it is asked for. If it takes a few times longer still, it is given up, as it holds a place among the calls in flight.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping

from asyndbt_dspy.core.call_times import GIVEN_UP, MEMORY, SHARE, limit_s, may_leave
from asyndbt_dspy.programs.time_limit import was_still

_LOOK_S = 5.0
"""How often is looked whether the process stood still: calls have done nothing wrong meanwhile (see ``time_limit``)."""

Task = asyncio.Task


class Stragglers:
    """How long calls take, and which of those under way take too long.

    Args:
        factor: > 1. How many times the median of its worker's newest calls one may take; ``None``: all are waited for.
        clock: Seconds that only go forward.
    """

    def __init__(self, factor: float | None, clock: Callable[[], float]) -> None:
        self.factor = factor
        self._clock = clock
        self._stood_s = 0.0
        self._counted_to = -math.inf
        self._durations: dict[str, deque[float]] = {}
        self._begun: dict[Task[object], float] = {}

    def begin(self, like: Task[object] | None = None) -> None:
        """The current task makes its call now, or waits for that of another task (``like``)."""
        task = asyncio.current_task()
        if self.factor is not None and task is not None:
            self._begun[task] = self._begun.get(like, self._now()) if like is not None else self._now()
            task.add_done_callback(self._forget)

    def _forget(self, task: Task[object]) -> None:
        self._begun.pop(task, None)

    def note(self, worker: str, seconds: float) -> None:
        """A call of this worker took so long."""
        if self.factor is not None:
            for name in (worker, ""):
                self._durations.setdefault(name, deque(maxlen=MEMORY)).append(seconds)

    async def settle(self, worker: str, tasks: Collection[Task[object]]) -> set[Task[object]]:
        """Wait for a worker's ``tasks``, and return those that are left behind. The first error is raised at once."""
        return await self._settle(tasks, lambda pending: self._patience(worker, pending))

    async def settle_workers(self, owners: Mapping[Task[object], str]) -> set[Task[object]]:
        """``settle`` for the calls of several workers, by their names.

        Once half of the workers are done, the others get as much time again, or what one call may take, also for what they
        have not begun.
        """
        begun, workers, until = self._now(), len(set(owners.values())), math.inf

        def patience(pending: Collection[Task[object]]) -> float:
            nonlocal until
            now = self._now()
            if math.isinf(until) and 2 * len({owners[task] for task in pending}) <= workers:
                until = now + max(now - begun, self._limit(""))
            return min(until - now, self._patience("", pending))

        return await self._settle(owners, patience, share=2)

    async def _settle(
        self,
        tasks: Collection[Task[object]],
        patience: Callable[[Collection[Task[object]]], float],
        share: int = SHARE,
    ) -> set[Task[object]]:
        """``patience``: how many seconds the last few calls (one in ``share`` at most) may still take."""
        pending, most = set(tasks), may_leave(len(tasks), share)
        while pending:
            timeout = patience(pending) if len(pending) <= most else math.inf
            if timeout <= 0:
                return pending
            timeout = min(timeout, _LOOK_S)
            due = self._clock() + timeout
            done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self._note_pause(due, timeout)
            for task in done:
                task.result()
        return pending

    def _note_pause(self, due: float, timeout: float) -> None:
        """A wait that ended far too late does not count, as nobody knows when it stood still; for all waiting units once."""
        now = self._clock()
        if was_still(now - due, timeout):
            self._stood_s += now - max(due - timeout, self._counted_to)
            self._counted_to = now

    def _now(self) -> float:
        """Seconds in which the process ran."""
        return self._clock() - self._stood_s

    def _patience(self, worker: str, pending: Collection[Task[object]]) -> float:
        """Seconds until all of these have taken too long; infinite while one has not begun."""
        if not all(task in self._begun for task in pending):
            return math.inf
        return max(self._begun[task] for task in pending) + self._limit(worker) - self._now()

    def _limit(self, worker: str) -> float:
        """Seconds that one call of this worker may take; infinite where that is not known."""
        return limit_s(self.factor, self._durations.get(worker, ()))

    def longest_s(self, worker: str) -> float:
        """Seconds that one call of this worker may take, or of any where nothing is known of it; infinite without either."""
        own_s = self._limit(worker)
        return own_s if math.isfinite(own_s) else self._limit("")

    def has_begun(self, task: Task[object]) -> bool:
        """Whether a task that is not over has made its call."""
        return task in self._begun

    def give_up_later(self, worker: str, task: Task[object]) -> None:
        """End a call that was left behind, once it has gone on for too long."""
        later = asyncio.get_running_loop().call_later(GIVEN_UP * self._limit(worker), task.cancel)
        task.add_done_callback(lambda _: later.cancel())


async def cancelled(tasks: Collection[Task[object]]) -> None:
    """End all of these, and wait until they have."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
