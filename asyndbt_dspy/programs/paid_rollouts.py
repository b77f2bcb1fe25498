"""What an evaluator asks of whoever remembers rollouts, and the gate that rollouts pass on their way out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import dspy

from asyndbt_dspy.core.messages import Outcome
from asyndbt_dspy.programs.rollout import Rollout


@dataclass(frozen=True)
class RolloutKey:
    """What a rollout's result depends on.

    Attributes:
        digest: SHA-256 of program, example, LM, sampling, metric and prompt format.
        is_repeatable: The LM answers alike every time, so that one result may stand for another.
    """

    digest: bytes
    is_repeatable: bool


@dataclass(frozen=True)
class PaidRollout:
    """A rollout whose LM calls were paid for before.

    Attributes:
        usage: LM calls, prompt tokens and completion tokens that this run paid for it.
        is_shared: Paid for by an earlier run, or in this one by another worker in whose place this one is asked now.
        is_recorded: Whether the journal of this run has it.
    """

    rollout: Rollout
    usage: tuple[int, int, int] = (0, 0, 0)
    is_shared: bool = False
    is_recorded: bool = True


class RolloutBook(Protocol):
    """Remembers rollouts. Of a run without a ``run_dir`` it only knows their keys."""

    def key(self, lm: Any, program: dspy.Module, example: dspy.Example) -> RolloutKey: ...

    def take(self, worker: str, key: RolloutKey, program: dspy.Module, trace: bool) -> PaidRollout | None:
        """A rollout that was paid for by an earlier process or run; each is taken once."""
        ...

    def keep(self, worker: str, key: RolloutKey, program: dspy.Module, paid: PaidRollout) -> None:
        """Record a rollout before anybody hears of it."""
        ...

    def outcomes(self, worker: str, task: int) -> tuple[tuple[Outcome, ...], ...] | None:
        """What a task came to in an earlier process of this run, where it was over."""
        ...

    def failure(self, worker: str, task: int) -> str | None:
        """Why the worker failed at a task in an earlier process of this run."""
        ...

    def keep_failure(self, worker: str, task: int, reason: str) -> None: ...


STOP = "stop"
"""Holds a gate where a stop was asked for."""
_LOOK_S = 0.05
"""How often a gate that is to stop looks at what is still under way."""


class WithdrawnError(Exception):
    """A rollout that had to wait was taken back, as the run is to stop: it is to begin again, should the run go on."""


class RolloutGate:
    """Lets rollouts begin, holds them back, or turns them away. Of one event loop.

    Entered with ``async with gate as may_begin``.

    Attributes:
        in_flight: Rollouts that have begun and are not over.
        admits: Asked of each that comes to begin whether it may.
        over_since_s: When the run's time was over, by the loop's clock; ``None`` before.
        is_search_over: Whether rollouts of the search are turned away: what they would show is no use any more.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self.admits: Callable[[], bool] = lambda: True
        self.over_since_s: float | None = None
        self.is_search_over = False
        self._holders: set[str] = set()
        self._is_closed = False
        self._opened = asyncio.Event()
        self._drained = asyncio.Event()
        self._opened.set()
        self._drained.set()
        self._under_way: dict[asyncio.Task[Any], tuple[Callable[[float | None], bool], bool]] = {}
        self._withdrawn: set[asyncio.Task[Any]] = set()
        self._next_look: asyncio.TimerHandle | None = None

    def hold(self, holder: str) -> None:
        """No rollout begins until ``holder``, and every other one, has released the gate.

        Held by ``STOP``, it also takes back those that only wait for their turn.
        """
        is_new = holder not in self._holders
        self._holders.add(holder)
        self._opened.clear()
        if holder == STOP and is_new:
            self._withdraw()

    def release(self, holder: str) -> None:
        self._holders.discard(holder)
        if not self._holders:
            self._opened.set()

    def end_search(self) -> None:
        """Takes back rollouts of the search that only wait for their turn, or come to wait for it."""
        if not self.is_search_over:
            self.is_search_over = True
            self._withdraw()

    @property
    def working(self) -> int:
        """Rollouts in flight that do more than wait for their turn."""
        return self.in_flight - sum(only_waits(None) for only_waits, _ in self._under_way.values())

    @property
    def is_stopping(self) -> bool:
        """Whether no rollout is to begin any more, by a request to stop or at the end."""
        return self._is_closed or STOP in self._holders

    def close(self) -> None:
        """No rollout may begin any more, those that wait included."""
        self._is_closed = True
        self._opened.set()

    async def __aenter__(self) -> bool:
        while self._holders and not self._is_closed:
            await self._opened.wait()
        may_begin = not self._is_closed and self.admits()
        self.in_flight += 1
        self._drained.clear()
        return may_begin

    async def __aexit__(self, *_: object) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._drained.set()

    async def drained(self) -> None:
        """Wait until nothing is in flight."""
        await self._drained.wait()

    @contextlib.contextmanager
    def withdrawable(
        self,
        rollout: asyncio.Task[Any],
        may_withdraw: Callable[[float | None], bool],
        *,
        is_search: bool = False,
    ) -> Iterator[None]:
        """While the context lasts, ``rollout`` is cancelled where it only waits once the run is to stop; see ``has_withdrawn``.

        Args:
            may_withdraw: Whether it only waits, asked from time to time, with the seconds since the run's time was over.
            is_search: Whether it is one of the search, which may be over before the run is.
        """
        self._under_way[rollout] = may_withdraw, is_search
        try:
            yield
        finally:
            del self._under_way[rollout]
            self._withdrawn.discard(rollout)

    def has_withdrawn(self, rollout: asyncio.Task[Any]) -> bool:
        """Whether the gate cancelled it."""
        return rollout in self._withdrawn

    def _withdraw(self) -> None:
        is_stopping = STOP in self._holders
        if not (is_stopping or self.is_search_over):
            return
        if self._next_look is not None:  # that of the search's end, say, as the run is to stop too
            self._next_look.cancel()
        loop = asyncio.get_running_loop()
        over_for_s = None if self.over_since_s is None else loop.time() - self.over_since_s
        for task, (may_withdraw, is_search) in self._under_way.items():
            if (is_stopping or is_search) and task not in self._withdrawn and may_withdraw(over_for_s):
                self._withdrawn.add(task)
                task.cancel()
        if self.in_flight if is_stopping else any(is_search for _, is_search in self._under_way.values()):
            self._next_look = loop.call_later(_LOOK_S, self._withdraw)
