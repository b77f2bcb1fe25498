"""A Bayesian linear model of arm effects (``algorithm.md`` 7.5; ``experiments.md`` found it ahead of policy gradients).

    loss(candidate, example) = mean + difficulty(example) + sum_slots presence(slot) + sum_arms effect(arm)
                               + effect(set) + noise

All effects are Gaussian around zero with a variance per group, fitted as observations come in (expectation
maximization). Because the same example is seen under many candidates, its difficulty is separated from the
candidates' worth: comparisons are paired without being forced to be.

What a worker learned about *shared* arms leaves it as natural parameters of a Gaussian factor (partitioned variational
inference): its posterior divided by its cavity. Factors add up; a later factor of a sender replaces its earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from asyndbt_dspy.core.simplex import FloatArray, IntArray
from asyndbt_dspy.core.space import Candidate, Space

_SHARES = {"example": 0.4, "text": 0.06, "arm": 0.06, "slot": 0.06, "order": 0.1, "set": 0.04}
"""Prior variance of one effect of each group, as a share of the variance of a loss."""
_NOISE_SHARE = 0.4
_PRIOR_WEIGHT = 4.0
"""Pseudo-observations behind each prior variance."""
_MEAN_VARIANCE = 100.0
"""Prior variance of the overall mean, in variances of a loss: practically flat."""


@dataclass(frozen=True)
class EffectKeys:
    """Which parameters a candidate switches on.

    Attributes:
        arms: Per block and arm, the parameter names; arm 0 has none.
        shared: Names that workers exchange, in one fixed order.
    """

    arms: tuple[tuple[tuple[str, ...], ...], ...]
    shared: tuple[str, ...]

    @classmethod
    def of(cls, space: Space, share_credit: bool) -> EffectKeys:
        rows: list[tuple[tuple[str, ...], ...]] = []
        shared: dict[str, None] = {}
        for block in space.blocks:
            names: list[tuple[str, ...]] = [()]
            for number, arm in enumerate(block.arms[1:], start=1):
                if block.kind != "demo":
                    group = "text" if block.is_lower else "order"
                    keys: tuple[str, ...] = (f"{group}:{block.name}:{number}",)
                else:
                    owner = block.predictor if share_credit else block.name
                    keys = (f"slot:{block.name}", f"arm:{owner}:{arm.key}")
                names.append(keys)
                if arm.shared:
                    shared.update(dict.fromkeys(keys))
            rows.append(tuple(names))
        return cls(tuple(rows), tuple(shared))

    def of_candidate(self, candidate: Candidate) -> tuple[str, ...]:
        return tuple(key for block, arm in enumerate(candidate) for key in self.arms[block][arm])


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
        names = ("mean", f"example:{example}", f"set:{candidate}", *self.keys.of_candidate(candidate))
        places = self._places(names)
        self.gram[np.ix_(places, places)] += 1.0
        self.moment[places] += loss
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

    def sample(self, rng: np.random.Generator) -> FloatArray:
        """One draw of all met parameters from the posterior, shape ``[P]``."""
        if not len(self.mean):
            return self.mean
        drawn = self.mean + np.sqrt(self.variance) * rng.standard_normal(len(self.mean))
        jitter = 1e-10 * np.eye(len(self.own)) * max(1e-12, float(np.trace(self.covariance)))
        factor = np.linalg.cholesky(self.covariance + jitter)
        drawn[self.own] = self.mean[self.own] + factor @ rng.standard_normal(len(self.own))
        return np.asarray(drawn)

    def value(self, candidate: Candidate) -> tuple[float, float]:
        """Posterior mean and standard deviation of a candidate's effect on the loss, the set's own effect included."""
        names = (f"set:{candidate}", *self.keys.of_candidate(candidate))
        met = [self.names[name] for name in names if name in self.names and self.names[name] < len(self.mean)]
        unmet = [name for name in names if name not in self.names or self.names[name] >= len(self.mean)]
        mean = float(self.mean[met].sum())
        own = self.rank[met][self.rank[met] >= 0]
        alone = [place for place in met if self.rank[place] < 0]
        variance = float(self.covariance[np.ix_(own, own)].sum() + self.variance[alone].sum())
        variance += sum(self.prior_variance(name) for name in unmet)
        return mean, variance**0.5

    def effect(self, name: str) -> tuple[float, float]:
        """Posterior mean and standard deviation of one parameter (the prior where it was never met)."""
        place = self.names.get(name)
        if place is None or place >= len(self.mean):
            return 0.0, self.prior_variance(name) ** 0.5
        return float(self.mean[place]), float(self.variance[place]) ** 0.5
