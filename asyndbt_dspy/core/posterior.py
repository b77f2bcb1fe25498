"""``PosteriorPolicy``: Thompson sampling on a Bayesian model of effects (``algorithm.md`` 7.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from asyndbt_dspy.core import estimators
from asyndbt_dspy.core.candidate_search import CandidateSearch
from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.effects import EffectKeys, EffectModel
from asyndbt_dspy.core.lower_level import Surrogate
from asyndbt_dspy.core.policies import (
    Batch,
    Estimate,
    ExampleOrder,
    GradientPolicy,
    Nomination,
    WorkerSpace,
)
from asyndbt_dspy.core.simplex import FloatArray, Layout
from asyndbt_dspy.core.space import Candidate

_NOMINATED = 3


class PosteriorPolicy:
    """Draws demos by Thompson sampling and reads the gradient off the posterior, for every arm at once.

    The model is additive, so the mixed derivative of its lower-level loss by q is zero: planes have no q-part
    (``hypergradient`` is refused).
    """

    def __init__(self, spaces: WorkerSpace, config: AlgorithmConfig, examples: int) -> None:
        self.spaces = spaces
        self.config = config
        self.order = ExampleOrder(examples, config)
        self.keys = EffectKeys.of(spaces.space, config.share_credit)
        self.upper_model = EffectModel(self.keys)
        self.lower_model = EffectModel(self.keys) if config.split_levels else self.upper_model
        self.search = CandidateSearch(spaces.space, spaces.allowed, self.upper_model)
        self.late = [
            (block, arm)
            for block, one in enumerate(spaces.space.lower)
            for arm in range(len(one.arms) - one.late, len(one.arms))
        ]
        """Arms that join during the run and that this worker has not given its first trial."""
        self.seen: dict[Candidate, int] = {}
        self.observed: set[tuple[Candidate, int]] = set()

    def draw(self, p: FloatArray, q: FloatArray, rng: np.random.Generator, minibatch: int) -> Batch:
        lower = estimators.draw_arms(rng, self.spaces.lower, p, self.config.draws)
        enough = math.inf if self.config.repeats else len(self.order.order)
        repeatable = [one for one, count in self.seen.items() if count < enough]
        candidates: list[Candidate] = []
        for row in lower:
            known, late = repeatable, self._take_untried(p)
            if late is not None:
                row[late[0]] = late[1]
            arms = tuple(int(arm) for arm in row)
            if late is not None:
                # Candidates without the arm might keep winning until the budget is spent.
                known = [arms + one[len(arms) :] for one in repeatable]
            candidates.append(self.search.thompson(arms, known, rng, self.config.exploration, candidates))
        examples = tuple(self.order.next_for(candidate, rng, minibatch) for candidate in candidates)
        empty = np.zeros((0, 0), dtype=np.int64)
        sets = frozenset(self.order.lower), frozenset(self.order.upper)
        return Batch(tuple(candidates), examples, lower, empty, *sets)

    def _take_untried(self, p: FloatArray) -> tuple[int, int] | None:
        """Block and number of an arm that has joined and that no worker is known to have tried; it counts as tried from now on."""
        for block, arm in tuple(self.late):
            if p[self.spaces.lower.slices[block]][arm] > 0.0:
                self.late.remove((block, arm))
                if all(name not in self.upper_model.names for name in self.keys.arms[block][arm]):
                    return block, arm
        return None

    def update(self, p: FloatArray, q: FloatArray, batch: Batch, losses: Sequence[FloatArray]) -> Estimate:
        for candidate, examples, row in zip(batch.candidates, batch.examples, losses, strict=True):
            self.seen.setdefault(candidate, 0)
            for example, loss in zip(examples, row, strict=True):
                if math.isfinite(loss):
                    self._observe(candidate, example, float(loss), batch)
        sweeps = 2 if self.upper_model.count < 150 else 1
        self.upper_model.fit(sweeps)
        if self.lower_model is not self.upper_model:
            self.lower_model.fit(sweeps)
        lower, upper = self._lower_advantages(p), self._upper_advantages(q)
        return Estimate(lower, upper, Surrogate(lower, p))

    def _observe(self, candidate: Candidate, example: int, loss: float, batch: Batch) -> None:
        # A candidate that has met the whole shard meets it again: a cached loss is no new evidence, another toss is.
        if (candidate, example) in self.observed and not self.config.repeats:
            return
        self.observed.add((candidate, example))
        self.seen[candidate] += 1
        if self.lower_model is self.upper_model or example in batch.upper_examples:
            self.upper_model.observe(candidate, example, loss)
        if self.lower_model is not self.upper_model and example in batch.lower_examples:
            self.lower_model.observe(candidate, example, loss)

    def _lower_advantages(self, p: FloatArray) -> FloatArray:
        values = [
            self._standardized(self.lower_model, names)
            for block in range(len(self.spaces.space.lower))
            for names in self.keys.arms[block]
        ]
        return self._scaled(self.spaces.lower, np.array(values, dtype=np.float64), p)

    def _upper_advantages(self, q: FloatArray) -> FloatArray:
        start = len(self.spaces.space.lower)
        values = [
            self._standardized(self.upper_model, self.keys.arms[start + slot][arm])
            for slot, arms in enumerate(self.spaces.allowed)
            for arm in arms
        ]
        return self._scaled(self.spaces.upper, np.array(values, dtype=np.float64), q)

    def _standardized(self, model: EffectModel, names: Sequence[str]) -> float:
        """An arm's effect; with ``normalise`` in units of its own uncertainty, so that noise moves nothing."""
        pairs = [model.effect(name) for name in names]
        mean = sum(pair[0] for pair in pairs)
        if not self.config.normalise or not pairs:
            return mean
        return mean / math.sqrt(sum(pair[1] ** 2 for pair in pairs))

    def _scaled(self, layout: Layout, values: FloatArray, probabilities: FloatArray) -> FloatArray:
        centred = estimators.centre_blocks(layout, values, probabilities)
        if self.config.normalise:
            centred = np.clip(centred, -3.0, 3.0)
        return estimators.clip_norm(centred, self.config.gradient_clip)

    def share(self) -> FloatArray:
        if not self.config.share_effects:
            return np.zeros((2, 0))
        return self.upper_model.factor()

    def merge(self, outside: FloatArray) -> None:
        if outside.shape[1]:
            self.upper_model.merge(outside)
            self.upper_model.fit(0)

    def nominate(self, p: FloatArray, q: FloatArray) -> tuple[Nomination, ...]:
        """The best under the posterior means, run or not, and the most promising run, by lower bound of their loss."""
        model = self.upper_model
        rng = np.random.default_rng(
            [model.count, len(self.seen)]
        )  # of the state alone: a replay draws the same
        decoded = self.search.best(self.spaces.lower.argmax(p), list(self.seen), rng)
        rated = {one: model.value(one) for one in dict.fromkeys([decoded, *self.seen])}
        seen = sorted(self.seen, key=lambda one: rated[one][0] - 0.5 * rated[one][1])[:_NOMINATED]
        return tuple(
            Nomination(one, rated[one][0], rated[one][1], self.seen.get(one, 0))
            for one in dict.fromkeys([decoded, *seen])
        )


def make_policy(
    spaces: WorkerSpace, config: AlgorithmConfig, examples: int
) -> GradientPolicy | PosteriorPolicy:
    """The policy that ``config.policy`` names, for a worker with so many estimate examples."""
    kind = GradientPolicy if config.policy == "score_function" else PosteriorPolicy
    return kind(spaces, config, examples)
