"""Search for candidates under an ``EffectModel``: draw its parameters, then climb from what is known and from chance.

What the slots show together (how often a class, which one last) is worth more than what each shows alone, so no slot can
be chosen by itself: candidates are made, worked out and changed a few times (``algorithm.md`` 7.5).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from asyndbt_dspy.core.effects import EffectModel
from asyndbt_dspy.core.simplex import FloatArray
from asyndbt_dspy.core.space import Candidate, Space

_RANDOM = 8
_CHANGED = 8
"""Changed forms of each of the best known candidates, and of the best so far in each later round."""
_KEPT = 2
_ROUNDS = 3
_EMPTY = 0.1
"""Chance of a slot to stay empty."""


class CandidateSearch:
    """Candidates of one worker.

    Args:
        space: All blocks.
        allowed: Per upper-level block the arms that this worker may draw.
        model: What is known.
    """

    def __init__(self, space: Space, allowed: Sequence[Sequence[int]], model: EffectModel) -> None:
        self.space = space
        self.allowed = tuple(tuple(arms) for arms in allowed)
        self.model = model
        self.first = len(space.lower)

    def thompson(
        self,
        lower: Candidate,
        known: Sequence[Candidate],
        rng: np.random.Generator,
        spread: float,
        exclude: Collection[Candidate],
    ) -> Candidate:
        """The best candidate found under one draw of the parameters.

        Args:
            lower: Lower-level arms of new candidates.
            known: Candidates that may be run again.
            spread: Deviations of the posterior that the draw spans.
            exclude: Candidates not to return, where there are others.
        """
        drawn = self.model.sample(rng, spread)
        found = self._climb(lower, known, drawn, _Unmet(self.model, rng, spread), rng)
        ranked = sorted(found, key=found.__getitem__)
        return next((one for one in ranked if one not in exclude), ranked[0])

    def best(self, lower: Candidate, known: Sequence[Candidate], rng: np.random.Generator) -> Candidate:
        """The best candidate found under the posterior means."""
        found = self._climb(lower, known, self.model.mean, _unmoved, rng)
        return min(found, key=found.__getitem__)

    def _climb(
        self,
        lower: Candidate,
        known: Sequence[Candidate],
        effects: FloatArray,
        unmet: Callable[[str], float],
        rng: np.random.Generator,
    ) -> dict[Candidate, float]:
        found: dict[Candidate, float] = {}

        def rate(candidates: Sequence[Candidate]) -> None:
            new = [one for one in dict.fromkeys(candidates) if one not in found]
            if new:
                found.update(zip(new, self.model.worths(new, effects, unmet), strict=True))

        rate(known)
        starts = sorted(found, key=found.__getitem__)[:_KEPT]
        rate([lower + self._random(rng) for _ in range(_RANDOM)])
        rate([lower + self._changed(one[self.first :], rng) for one in starts for _ in range(_CHANGED)])
        for _ in range(_ROUNDS):
            best = min(found, key=found.__getitem__)
            rate([best[: self.first] + self._changed(best[self.first :], rng) for _ in range(_CHANGED)])
        return found

    def _random(self, rng: np.random.Generator) -> Candidate:
        chosen = [0] * len(self.allowed)
        for slot in range(len(chosen)):
            chosen[slot] = self._redrawn(chosen, slot, rng)
        return tuple(chosen)

    def _changed(self, upper: Candidate, rng: np.random.Generator) -> Candidate:
        chosen = list(upper)
        for slot in rng.permutation(len(chosen))[: int(rng.integers(1, 3))].tolist():
            chosen[slot] = self._redrawn(chosen, slot, rng)
        return tuple(chosen)

    def _redrawn(self, chosen: Sequence[int], slot: int, rng: np.random.Generator) -> int:
        """Another arm for one slot; no demo twice."""
        block = self.space.blocks[self.first + slot]
        arms = self.allowed[slot]
        if block.kind != "demo":
            return int(arms[int(rng.integers(len(arms)))])
        used = {
            self.space.blocks[self.first + other].arms[arm].key
            for other, arm in enumerate(chosen)
            if arm and other != slot
        }
        free = [arm for arm in arms if arm and arm != chosen[slot] and block.arms[arm].key not in used]
        if not free or rng.random() < _EMPTY:
            return 0
        return int(free[int(rng.integers(len(free)))])


class _Unmet:
    """Effects of names that the model has not met, drawn from the prior when first asked for."""

    def __init__(self, model: EffectModel, rng: np.random.Generator, spread: float) -> None:
        self._model = model
        self._rng = rng
        self._spread = spread
        self._drawn: dict[str, float] = {}

    def __call__(self, name: str) -> float:
        if name.startswith("set:"):
            # A set's own effect would make every new set look better for being new.
            return 0.0
        if name not in self._drawn:
            deviation = self._spread * self._model.prior_variance(name) ** 0.5
            self._drawn[name] = float(self._rng.normal(0.0, deviation))
        return self._drawn[name]


def _unmoved(name: str) -> float:
    """The prior's mean: what has not been met changes nothing."""
    del name
    return 0.0
