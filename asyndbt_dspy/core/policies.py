"""How a worker's distributions over arms learn, behind one Protocol, since the default changes by measurement.

``GradientPolicy`` draws candidates from ``p x q`` and estimates gradients by score functions (paper, BDPL);
``posterior.PosteriorPolicy`` keeps a Bayesian model of effects. The step itself (Euclidean or exponentiated) is the
worker's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from asyndbt_dspy.core import estimators
from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.lower_level import Surrogate
from asyndbt_dspy.core.simplex import FloatArray, IntArray, Layout
from asyndbt_dspy.core.space import Candidate, Space


@dataclass(frozen=True)
class WorkerSpace:
    """The part of the space that one worker may use.

    Attributes:
        space: All blocks.
        allowed: Per upper-level block the arm numbers this worker may draw; arm 0 is always among them.
    """

    space: Space
    allowed: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def lower(self) -> Layout:
        return Layout(tuple(len(block.arms) for block in self.space.lower))

    @functools.cached_property
    def upper(self) -> Layout:
        return Layout(tuple(len(arms) for arms in self.allowed))

    def candidate(self, lower_arms: Sequence[int], upper_places: Sequence[int]) -> Candidate:
        """Candidate of arm numbers ``lower_arms`` and of places ``upper_places`` within ``allowed``."""
        demos = tuple(arms[place] for arms, place in zip(self.allowed, upper_places, strict=True))
        return tuple(int(arm) for arm in lower_arms) + demos


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step scores.

    Attributes:
        candidates: The draws.
        examples: Per draw, numbers of examples of the worker's estimate set.
        lower_arms, upper_places: Shapes ``[draws, blocks]``; empty for policies that do not need them.
        lower_examples: Examples whose losses may inform the lower level (all of them unless levels are split).
        upper_examples: The same for the upper level.
    """

    candidates: tuple[Candidate, ...]
    examples: tuple[tuple[int, ...], ...]
    lower_arms: IntArray
    upper_places: IntArray
    lower_examples: frozenset[int]
    upper_examples: frozenset[int]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Gradient estimates at the present ``p [D]`` and ``q [Q]``, and the surrogate that the server may reuse."""

    lower: FloatArray
    upper: FloatArray
    surrogate: Surrogate


@dataclass(frozen=True, slots=True)
class Nomination:
    """A candidate that a worker proposes for the final race.

    Attributes:
        candidate: One arm per block.
        value: Estimated loss relative to the student's (lower is better).
        deviation: Standard deviation of ``value``.
        count: Rollouts behind it.
    """

    candidate: Candidate
    value: float
    deviation: float
    count: int


class Policy(Protocol):
    """How a worker's distributions learn: what to draw, what was learned, what is shared, how it merges."""

    def draw(self, p: FloatArray, q: FloatArray, rng: np.random.Generator, minibatch: int) -> Batch:
        """Candidates and for each of them ``minibatch`` examples, fewer where the shard has fewer."""
        ...

    def update(self, p: FloatArray, q: FloatArray, batch: Batch, losses: Sequence[FloatArray]) -> Estimate:
        """Learn from ``losses`` (per draw, shape ``[its examples]``, NaN where missing) and estimate both gradients."""
        ...

    def share(self) -> FloatArray:
        """Natural parameters ``[2, shared]`` of what this worker learned about shared arms."""
        ...

    def merge(self, outside: FloatArray) -> None:
        """Take over what the other workers learned; replaces what was merged before."""
        ...

    def nominate(self, p: FloatArray, q: FloatArray) -> tuple[Nomination, ...]: ...


class ExampleOrder:
    """Which examples a draw meets: one common order of the shard, or a random minibatch (``common_examples`` off).

    The common order is that of the numbers: whoever numbers the examples mixes them, and may balance every beginning
    over classes (a candidate that favours one class looks good or bad by which classes it meets first).
    """

    def __init__(self, count: int, config: AlgorithmConfig) -> None:
        self.order = list(range(count))
        half = max(1, count // 2) if config.split_levels else count
        self.lower = tuple(self.order[:half])
        self.upper = tuple(self.order[half:] or self.order) if config.split_levels else self.lower
        self._config = config
        self._cursor: dict[Candidate | None, int] = {}

    def next_for(self, key: Candidate | None, rng: np.random.Generator, size: int) -> tuple[int, ...]:
        """The next ``size`` examples of ``key`` (a candidate, or ``None`` for all draws of a step together)."""
        if not self._config.split_levels:
            return self._take(self.order, key, size, rng)
        first = self._take(self.lower, key, (size + 1) // 2, rng)
        second = self._take(self.upper, key, size // 2, rng)
        self._cursor[key] = self._cursor.get(key, 0) + (size + 1) // 2
        return first + second

    def _take(
        self, pool: Sequence[int], key: Candidate | None, size: int, rng: np.random.Generator
    ) -> tuple[int, ...]:
        size = min(size, len(pool))
        if not self._config.common_examples:
            return tuple(int(pool[place]) for place in rng.choice(len(pool), size=size, replace=False))
        start = self._cursor.get(key, 0)
        if not self._config.split_levels:
            self._cursor[key] = start + size
        return tuple(pool[(start + step) % len(pool)] for step in range(size))


class GradientPolicy:
    """Score functions on draws from ``p x q``, all on one minibatch (``algorithm.md`` 2)."""

    def __init__(self, spaces: WorkerSpace, config: AlgorithmConfig, examples: int) -> None:
        self.spaces = spaces
        self.config = config
        self.order = ExampleOrder(examples, config)
        self.totals: dict[int, tuple[float, int]] = {}
        self.seen: dict[Candidate, tuple[float, int]] = {}
        self.buffer: list[tuple[FloatArray, IntArray, FloatArray, float]] = []

    def draw(self, p: FloatArray, q: FloatArray, rng: np.random.Generator, minibatch: int) -> Batch:
        lower = estimators.draw_arms(rng, self.spaces.lower, p, self.config.draws)
        upper = estimators.draw_arms(rng, self.spaces.upper, q, self.config.draws)
        examples = self.order.next_for(None, rng, minibatch)
        candidates = tuple(self.spaces.candidate(low, up) for low, up in zip(lower, upper, strict=True))
        sets = frozenset(self.order.lower), frozenset(self.order.upper)
        return Batch(candidates, (examples,) * len(candidates), lower, upper, *sets)

    def update(self, p: FloatArray, q: FloatArray, batch: Batch, losses: Sequence[FloatArray]) -> Estimate:
        table = np.stack(list(losses))
        examples = batch.examples[0]
        baselines = self._baselines(examples)
        low_columns = [column for column, number in enumerate(examples) if number in batch.lower_examples]
        up_columns = [column for column, number in enumerate(examples) if number in batch.upper_examples]
        centred, divisor = self._centred(table, baselines, low_columns)
        up_centred, up_divisor = self._centred(table, baselines, up_columns)
        self._remember(batch, table, examples)
        lower = estimators.score_function_estimate(self.spaces.lower, p, batch.lower_arms, centred, divisor)
        upper = estimators.score_function_estimate(
            self.spaces.upper, q, batch.upper_places, up_centred, up_divisor
        )
        cross = None
        if self.config.hypergradient:
            cross = estimators.cross_estimate(
                self.spaces.lower,
                self.spaces.upper,
                p,
                q,
                batch.lower_arms,
                batch.upper_places,
                centred,
                divisor,
            )
        surrogate = Surrogate(self._buffered(p, batch.lower_arms, centred, divisor, lower), p, None, cross)
        return Estimate(self._scaled(lower), self._scaled(upper), surrogate)

    def _centred(
        self, table: FloatArray, baselines: FloatArray | None, columns: list[int]
    ) -> tuple[FloatArray, float]:
        part = None if baselines is None else baselines[columns]
        return estimators.advantages(table[:, columns], part)

    def _baselines(self, examples: Sequence[int]) -> FloatArray | None:
        if not self.config.example_baseline:
            return None
        known = [self.totals.get(number, (math.nan, 1)) for number in examples]
        return np.array([total / count for total, count in known])

    def _remember(self, batch: Batch, table: FloatArray, examples: Sequence[int]) -> None:
        centred, _ = estimators.advantages(table)
        for row, candidate in enumerate(batch.candidates):
            total, count = self.seen.get(candidate, (0.0, 0))
            answered = int(np.sum(np.isfinite(table[row])))
            self.seen[candidate] = (total + centred[row] * answered, count + answered)
        for column, number in enumerate(examples):
            present = table[np.isfinite(table[:, column]), column]
            total, count = self.totals.get(number, (0.0, 0))
            if count + len(present):
                self.totals[number] = (total + float(present.sum()), count + len(present))

    def _buffered(
        self, p: FloatArray, arms: IntArray, centred: FloatArray, divisor: float, now: FloatArray
    ) -> FloatArray:
        """Mean of this step's estimate and of earlier ones, weighted to the present p (``algorithm.md`` 7.9)."""
        if not self.config.importance_limit:
            return now
        old = [
            estimators.reweighted_estimate(self.spaces.lower, p, *entry, self.config.importance_limit)
            for entry in self.buffer
        ]
        self.buffer = [*self.buffer[-7:], (p, arms, centred, divisor)]
        return np.asarray(np.mean([*old, now], axis=0))

    def _scaled(self, estimate: FloatArray) -> FloatArray:
        if self.config.normalise and estimate.size:
            largest = float(np.max(np.abs(estimate)))
            estimate = estimate / largest if largest > 0 else estimate
        return estimators.clip_norm(estimate, self.config.gradient_clip)

    def share(self) -> FloatArray:
        return np.zeros((2, 0))

    def merge(self, outside: FloatArray) -> None:
        """Score functions exchange nothing beyond p."""

    def nominate(self, p: FloatArray, q: FloatArray) -> tuple[Nomination, ...]:
        decoded = self.spaces.candidate(self.spaces.lower.argmax(p), self.spaces.upper.argmax(q))
        rated = [(total / count, count, one) for one, (total, count) in self.seen.items() if count]
        values = {one: (value, count) for value, count, one in rated}
        best = [one for _, _, one in sorted(rated)[:2]]
        result = []
        for candidate in dict.fromkeys([decoded, *best]):
            value, count = values.get(candidate, (0.0, 0))
            result.append(Nomination(candidate, float(value), 1.0 / math.sqrt(count + 1.0), count))
        return tuple(result)
