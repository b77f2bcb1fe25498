"""Latencies, stragglers and rate limits of a simulated provider, on a virtual clock."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from asyndbt_dspy.core.call_times import GIVEN_UP, MEMORY, limit_s, may_leave
from asyndbt_dspy.core.messages import Evaluate
from asyndbt_dspy.errors import ConfigurationError


@dataclass(frozen=True)
class Latency:
    """Seconds of one LM call: log-normal, or drawn from what was measured.

    Attributes:
        median_s: > 0.
        sigma: >= 0, of the logarithm; 0: always the median.
        measured_s: Where given, latencies are drawn from these with replacement instead.
    """

    median_s: float
    sigma: float = 0.0
    measured_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.median_s < math.inf or not 0 <= self.sigma < math.inf:
            raise ConfigurationError(
                f"latency with median {self.median_s!r} s and sigma {self.sigma!r}: the median must be > 0, sigma >= 0"
            )

    def draw(self, rng: np.random.Generator, count: int) -> list[float]:
        if self.measured_s:
            return [float(value) for value in rng.choice(np.array(self.measured_s), count)]
        if not self.sigma:
            return [self.median_s] * count
        return [float(value) for value in rng.lognormal(math.log(self.median_s), self.sigma, count)]


class SimulatedProvider:
    """Virtual seconds of an evaluation: its rollouts share the worker's slots and everybody shares the rate limit.

    Args:
        latency: Of one call.
        concurrency: Calls that one worker has in flight at a time, >= 1.
        factors: Worker -> how many times slower it is; default 1.
        requests_per_minute: Of all workers together, ``inf`` for no limit.
        calls_per_rollout: LM calls in a row of one run of the program, >= 1.
        hanging: Share of calls that never come back; they end at ``timeout_s``.
        straggler_factor: As of ``AsynDBT``: a rollout that takes far longer than its like is left behind, and holds its slot
            until it is over or given up.

    Attributes:
        clock: Virtual seconds now; set it to the engine's before the run.
        calls: LM calls made.
    """

    def __init__(
        self,
        latency: Latency,
        *,
        concurrency: int,
        factors: dict[str, float],
        requests_per_minute: float,
        calls_per_rollout: int,
        seed: int,
        hanging: float = 0.0,
        timeout_s: float = 120.0,
        straggler_factor: float | None = None,
    ) -> None:
        self.latency = latency
        self.concurrency = concurrency
        self.factors = factors
        self.interval_s = 60.0 / requests_per_minute
        self.calls_per_rollout = calls_per_rollout
        self.hanging = hanging
        self.timeout_s = timeout_s
        self.straggler_factor = straggler_factor
        self.clock: Callable[[], float] = lambda: 0.0
        self.calls = 0
        self._rng = np.random.default_rng([seed, 11])
        self._next_free_s = 0.0  # when the rate limit lets the next call go
        self._left_s: dict[str, list[float]] = {}  # worker -> ends of what was left behind
        self._durations: dict[str, deque[float]] = {}

    def __call__(self, request: Evaluate) -> float:
        rollouts = sum(len(row) for row in request.examples)
        now, factor = self.clock(), self.factors.get(request.worker, 1.0)
        slots = [one for one in self._left_s.get(request.worker, ()) if one > now]
        slots = sorted(slots + [now] * (self.concurrency - len(slots)))
        count = rollouts * self.calls_per_rollout
        seconds = iter(self.latency.draw(self._rng, count))
        hangs = iter((self._rng.random(count) < self.hanging).tolist() if self.hanging else [False] * count)
        self.calls += count
        taken: list[tuple[float, float]] = []
        for _ in range(rollouts):
            begun = time_s = heapq.heappop(slots)
            for _ in range(self.calls_per_rollout):
                time_s = max(time_s, self._granted(now))
                time_s += self.timeout_s if next(hangs) else min(self.timeout_s, next(seconds) * factor)
            taken.append((time_s, begun))
            heapq.heappush(slots, time_s)
        return self._settled(request.worker, now, sorted(taken)) - now

    def _settled(self, worker: str, now: float, calls: list[tuple[float, float]]) -> float:
        """When a unit is over, of rollouts as (end, begin) in the order of their ends; notes what it leaves behind.

        See ``programs.stragglers.Stragglers``.
        """
        durations = self._durations.setdefault(worker, deque(maxlen=MEMORY))
        left = [one for one in self._left_s.get(worker, ()) if one > now]
        over = now
        for number, (end, begun) in enumerate(calls):
            pending = calls[number:]
            if len(pending) <= may_leave(len(calls)):
                limit = limit_s(self.straggler_factor, durations)
                patience = max(over, max(one for _, one in pending) + limit)
                if patience < end:
                    left += [min(one, patience + GIVEN_UP * limit) for one, _ in pending]
                    over = patience
                    break
            durations.append(end - begun)
            over = end
        self._left_s[worker] = left
        return over

    def _granted(self, now: float) -> float:
        """When the rate limit lets one more call go; what nobody used is gone."""
        if not self.interval_s:
            return now
        granted = max(self._next_free_s, now)
        self._next_free_s = granted + self.interval_s
        return granted
