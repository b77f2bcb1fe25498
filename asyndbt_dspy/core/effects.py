"""A Bayesian linear model of arm effects (``algorithm.md`` 7.5; ``experiments.md`` found it ahead of policy gradients).

    loss(candidate, example) = mean + difficulty(example) + effects of texts, demos, orders and endings
                               + how often, how late, first and last each class is shown + effect(set) + noise

All effects are Gaussian around zero with a variance per group, fitted as observations come in (expectation
maximization). Because the same example is seen under many candidates, its difficulty is separated from the
candidates' worth: comparisons are paired without being forced to be. What classes are shown, and in which order,
explains more of a small LM's answers than which of their examples are (``docs/benchmarks.md``).

What a worker learned about *shared* arms leaves it as natural parameters of a Gaussian factor (partitioned variational
inference): its posterior divided by its cavity. Factors add up; a later factor of a sender replaces its earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from asyndbt_dspy.core.simplex import FloatArray, IntArray
from asyndbt_dspy.core.space import Candidate, Space

_SHARES = {
    "example": 0.4,
    "text": 0.06,
    "arm": 0.06,
    "order": 0.06,
    "ending": 0.1,
    "shown": 0.06,
    "count": 0.05,
    "recent": 0.1,
    "first": 0.1,
    "last": 0.1,
    "set": 0.04,
}
"""Prior variance of one effect of each group, as a share of the variance of a loss."""
_NOISE_SHARE = 0.4
_PRIOR_WEIGHT = 4.0
"""Pseudo-observations behind each prior variance."""
_MEAN_VARIANCE = 100.0
"""Prior variance of the overall mean, in variances of a loss: practically flat."""
_ENDING_COST = 0.03
"""What an ending must earn, in loss: it makes every call longer, and where it gains nothing it only divides the search."""
_SEQUENCE = ("count", "recent", "first", "last")
_DECAY = 0.6
"""How late a demo is shown counts as this to the power of the demos after it."""


@dataclass(frozen=True)
class EffectKeys:
    """Which parameters a candidate switches on.

    Attributes:
        space: All blocks.
        arms: Per block and arm, the parameters that are the arm's own; arm 0 has none.
        shared: Names that workers exchange, in one fixed order.
    """

    space: Space
    arms: tuple[tuple[tuple[str, ...], ...], ...]
    shared: tuple[str, ...]

    @classmethod
    def of(cls, space: Space, share_credit: bool) -> EffectKeys:
        """The parameters of ``space``; with ``share_credit`` a demo has one worth in all slots of its predictor."""
        rows: list[tuple[tuple[str, ...], ...]] = []
        shared: dict[str, None] = {}
        for block in space.blocks:
            names: list[tuple[str, ...]] = [()]
            for number, arm in enumerate(block.arms[1:], start=1):
                if block.kind == "demo":
                    owner = block.predictor if share_credit else block.name
                    keys: tuple[str, ...] = (f"arm:{owner}:{arm.key}",)
                else:
                    keys = (f"{'text' if block.is_lower else block.kind}:{block.name}:{number}",)
                names.append(keys)
                if arm.shared:
                    shared.update(dict.fromkeys(keys))
            if block.kind == "demo":
                shared[f"shown:{block.predictor}"] = None
                if block.stratum is not None:
                    ending = space.ending_blocks.get(block.predictor)
                    for number in range(1 if ending is None else len(space.blocks[ending].arms)):
                        name = _sequence_name(block.predictor, block.stratum, number)
                        shared.update(dict.fromkeys(f"{kind}:{name}" for kind in _SEQUENCE))
            rows.append(tuple(names))
        return cls(space, tuple(rows), tuple(shared))

    def of_candidate(self, candidate: Candidate) -> dict[str, float]:
        """Name and weight of every parameter that the candidate switches on, without ``mean`` and the set's own."""
        found = {name: 1.0 for block, arm in enumerate(candidate) for name in self.arms[block][arm]}
        for predictor, slots in self.space.demo_slots.items():
            order = self._order(predictor, candidate) or range(len(slots))
            shown = [self.space.blocks[slots[place]].stratum for place in order if candidate[slots[place]]]
            ending = self.space.ending_blocks.get(predictor)
            found.update(_sequence_features(predictor, shown, 0 if ending is None else candidate[ending]))
        return found

    def cost(self, candidate: Candidate) -> float:
        """Loss that a candidate is charged for what makes every call longer."""
        return sum(self.arm_cost(block, candidate[block]) for block in self.space.ending_blocks.values())

    def arm_cost(self, block: int, arm: int) -> float:
        """The part of it that is one arm's."""
        return _ENDING_COST if arm and self.space.blocks[block].kind == "ending" else 0.0

    def _order(self, predictor: str, candidate: Candidate) -> tuple[int, ...]:
        block = self.space.order_blocks.get(predictor)
        return () if block is None else self.space.blocks[block].arms[candidate[block]].order


def _sequence_name(predictor: str, stratum: str, ending: int) -> str:
    return f"{predictor}:{ending}:{stratum}"


def _sequence_features(predictor: str, shown: Sequence[str | None], ending: int = 0) -> dict[str, float]:
    """What the classes of the demos shown, in their order, switch on.

    Each ending has effects of its own: which sets are good with one says nothing of which are with another
    (``docs/benchmarks.md``).
    """
    found = {f"shown:{predictor}": 1.0} if shown else {}
    for place, stratum in enumerate(shown):
        if stratum is None:
            continue
        name, later = _sequence_name(predictor, stratum, ending), len(shown) - 1 - place
        found[f"count:{name}"] = found.get(f"count:{name}", 0.0) + 1.0
        found[f"recent:{name}"] = found.get(f"recent:{name}", 0.0) + _DECAY**later
        if place == 0:
            found[f"first:{name}"] = 1.0
        if later == 0:
            found[f"last:{name}"] = 1.0
    return found


def _square_root(covariance: FloatArray) -> FloatArray:
    """A matrix whose product with its transpose is ``covariance``, up to rounding.

    After thousands of answers that are all alike the inverse of the precision is not quite positive definite: what rounding made
    negative is none.
    """
    jitter = 1e-10 * np.eye(len(covariance)) * max(1e-12, float(np.trace(covariance)))
    try:
        return np.asarray(np.linalg.cholesky(covariance + jitter))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return np.asarray(vectors * np.sqrt(np.clip(values, 0.0, None)))


@dataclass
class EffectModel:
    """The posterior of one worker. Mutable part of a ``WorkerState``; pure (no clock, no global random numbers).

    Attributes:
        keys: Parameters of every arm.
        names: Parameters met so far; index = position in the arrays.
        gram: ``X^T X``, shape ``[P, P]``.
        moment: ``X^T y``, shape ``[P]``.
        square: ``y^T y``.
        count: Observations.
        outside: Natural parameters ``[2, shared]`` (precision, precision times mean) of what other workers learned.
        mean, variance: Of every parameter, shape ``[P]``.
        own: Parameters that this worker has data on; ``covariance`` is theirs. ``rank``: place in ``own`` or -1.
    """

    keys: EffectKeys
    names: dict[str, int] = field(default_factory=dict)
    gram: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    moment: FloatArray = field(default_factory=lambda: np.zeros(0))
    square: float = 0.0
    count: int = 0
    outside: FloatArray = field(default_factory=lambda: np.zeros((2, 0)))
    variances: dict[str, float] = field(default_factory=dict)
    noise: float = 0.0
    mean: FloatArray = field(default_factory=lambda: np.zeros(0))
    covariance: FloatArray = field(default_factory=lambda: np.zeros((0, 0)))
    variance: FloatArray = field(default_factory=lambda: np.zeros(0))
    own: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rank: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if self.outside.shape[1] != len(self.keys.shared):
            self.outside = np.zeros((2, len(self.keys.shared)))

    def observe(self, candidate: Candidate, example: int, loss: float) -> None:
        """Add one finite loss. Call ``fit`` before reading the posterior."""
        features = {"mean": 1.0, f"example:{example}": 1.0, **self.features(candidate)}
        places, weights = self._places(tuple(features)), np.array(list(features.values()))
        self.gram[np.ix_(places, places)] += np.outer(weights, weights)
        self.moment[places] += weights * loss
        self.square += loss * loss
        self.count += 1

    def merge(self, outside: FloatArray) -> None:
        """Replace what the other workers learned: shape ``[2, shared]``."""
        self.outside = outside
        self._places(
            tuple(key for key, weight in zip(self.keys.shared, outside[0], strict=True) if weight > 0)
        )

    def _places(self, names: tuple[str, ...]) -> list[int]:
        for name in names:
            self.names.setdefault(name, len(self.names))
        missing = len(self.names) - len(self.moment)
        if missing:
            self.gram = np.pad(self.gram, (0, missing))
            self.moment = np.pad(self.moment, (0, missing))
        return [self.names[name] for name in names]

    def fit(self, sweeps: int = 2) -> None:
        """Posterior of all parameters; ``sweeps`` expectation-maximization steps on the variances."""
        if not self.names:
            return
        scale = self._scale()
        if not self.variances:
            self.variances = {group: share * scale for group, share in _SHARES.items()}
            self.noise = _NOISE_SHARE * scale
        groups = [name.partition(":")[0] for name in self.names]
        members = {group: np.array([g == group for g in groups]) for group in _SHARES}
        for sweep in range(sweeps + 1):
            self._solve(members, scale)
            if sweep < sweeps and self.count:
                self._refit_variances(members, scale)

    def _scale(self) -> float:
        if self.count < 2:
            return 0.25
        centre = self.moment[self.names["mean"]] / self.count
        return float(max(self.square / self.count - centre * centre, 1e-4))

    def _solve(self, members: dict[str, np.ndarray], scale: float) -> None:
        prior = np.full(len(self.names), 1.0 / (_MEAN_VARIANCE * scale))
        for group, inside in members.items():
            prior[inside] = 1.0 / self.variances[group]
        natural = self.moment / self.noise
        for column, key in enumerate(self.keys.shared):
            if self.outside[0, column] > 0:
                place = self.names[key]
                prior[place] += self.outside[0, column]
                natural[place] += self.outside[1, column]
        # Parameters that only others have met are independent of this worker's data: no matrix is needed for them.
        self.own = np.flatnonzero(np.diag(self.gram) > 0)
        self.rank = np.full(len(self.names), -1, dtype=np.int64)
        self.rank[self.own] = np.arange(len(self.own))
        self.variance = 1.0 / prior
        self.mean = natural / prior
        inner = np.linalg.inv(self.gram[np.ix_(self.own, self.own)] / self.noise + np.diag(prior[self.own]))
        self.covariance = (inner + inner.T) / 2.0
        self.mean[self.own] = self.covariance @ natural[self.own]
        self.variance[self.own] = np.diag(self.covariance)

    def _refit_variances(self, members: dict[str, np.ndarray], scale: float) -> None:
        second = self.mean**2 + self.variance
        for group, inside in members.items():
            anchor = _PRIOR_WEIGHT * _SHARES[group] * scale
            self.variances[group] = float((anchor + second[inside].sum()) / (_PRIOR_WEIGHT + inside.sum()))
        residual = self.square - 2.0 * self.mean @ self.moment + self.mean @ self.gram @ self.mean
        residual += float(np.sum(self.covariance * self.gram[np.ix_(self.own, self.own)]))
        anchor = _PRIOR_WEIGHT * _NOISE_SHARE * scale
        self.noise = max(float((anchor + residual) / (_PRIOR_WEIGHT + self.count)), 1e-6)

    def factor(self) -> FloatArray:
        """This worker's own factor over the shared parameters, shape ``[2, shared]``: posterior over cavity."""
        result = np.zeros((2, len(self.keys.shared)))
        if not len(self.mean):
            return result
        for column, key in enumerate(self.keys.shared):
            place = self.names.get(key)
            if place is not None and place < len(self.mean):
                precision = 1.0 / self.variance[place]
                cavity = 1.0 / self.variances[key.partition(":")[0]] + self.outside[0, column]
                if precision - cavity > 1e-9:
                    result[0, column] = precision - cavity
                    result[1, column] = self.mean[place] * precision - self.outside[1, column]
        return result

    def prior_variance(self, name: str) -> float:
        group = name.partition(":")[0]
        return self.variances.get(group, _SHARES[group] * 0.25)

    def sample(self, rng: np.random.Generator, spread: float = 1.0) -> FloatArray:
        """One draw of all met parameters from the posterior, its deviations times ``spread``; shape ``[P]``."""
        if not len(self.mean):
            return self.mean
        drawn = self.mean + spread * np.sqrt(self.variance) * rng.standard_normal(len(self.mean))
        factor = _square_root(self.covariance)
        drawn[self.own] = self.mean[self.own] + spread * (factor @ rng.standard_normal(len(self.own)))
        return np.asarray(drawn)

    def features(self, candidate: Candidate) -> dict[str, float]:
        """Name and weight of every effect of a candidate, the set's own included."""
        return {f"set:{candidate}": 1.0, **self.keys.of_candidate(candidate)}

    def value(self, candidate: Candidate) -> tuple[float, float]:
        """Posterior mean and standard deviation of a candidate's effect on the loss, the set's own effect and its cost included."""
        known: dict[int, float] = {}
        unmet = 0.0
        for name, weight in self.features(candidate).items():
            place = self.names.get(name)
            if place is None or place >= len(self.mean):
                unmet += weight**2 * self.prior_variance(name)
            else:
                known[place] = weight
        places, weights = np.array(list(known), dtype=np.int64), np.array(list(known.values()))
        is_own = self.rank[places] >= 0
        own, alone = self.rank[places[is_own]], places[~is_own]
        variance = float(weights[is_own] @ self.covariance[np.ix_(own, own)] @ weights[is_own])
        variance += float(weights[~is_own] ** 2 @ self.variance[alone]) + unmet
        return float(self.mean[places] @ weights) + self.keys.cost(candidate), max(variance, 0.0) ** 0.5

    def worths(
        self, candidates: Sequence[Candidate], effects: FloatArray, unmet: Callable[[str], float]
    ) -> list[float]:
        """Each candidate's effect on the loss under one setting of the parameters.

        Args:
            effects: Shape ``[P]``: ``mean``, or a draw of ``sample``.
            unmet: The effect of a name that the model has not met.
        """
        found = []
        for candidate in candidates:
            total = self.keys.cost(candidate)
            for name, weight in self.features(candidate).items():
                place = self.names.get(name)
                if place is not None and place < len(effects):
                    total += weight * float(effects[place])
                else:
                    total += weight * unmet(name)
            found.append(total)
        return found

    def effect(self, name: str) -> tuple[float, float]:
        """Posterior mean and standard deviation of one parameter (the prior where it was never met)."""
        place = self.names.get(name)
        if place is None or place >= len(self.mean):
            return 0.0, self.prior_variance(name) ** 0.5
        return float(self.mean[place]), float(self.variance[place]) ** 0.5
