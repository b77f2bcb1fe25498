"""What workers know of shared arms, added up: for the final program, and for each worker of all others (``algorithm.md`` 7.5)."""

from __future__ import annotations

from typing import Any

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.simplex import FloatArray, IntArray

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

_FEWEST = 3
"""Senders of whom one may lie: below that a median is no protection."""
_ROBUST = ("median", "trimmed_mean")


def pool_factors(config: AlgorithmConfig, factors: FloatArray) -> FloatArray:
    """Add up natural parameters ``[R, 2, K]`` of several senders, shape ``[2, K]``.

    With a robust aggregator the pooled mean of an effect that at least three senders know is their median mean.
    """
    total = np.asarray(factors.sum(axis=0))
    if config.aggregator not in _ROBUST or len(factors) < _FEWEST:
        return total
    means = _means(factors, unknown=np.nan)
    for column in np.flatnonzero((factors[:, 0] > 0).sum(axis=0) >= _FEWEST):
        total[1:, column] = total[0, column] * np.nanmedian(means[:, column])
    return total


def _means(factors: FloatArray, unknown: float) -> FloatArray:
    """Shape ``[R, K]``."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(factors[:, 0] > 0, factors[:, 1] / factors[:, 0], unknown)


class SharedEffects:
    """Factors of all workers. Of a worker that was set aside nothing is known.

    Sums and medians are prepared once after a change: where nobody waits, many requests go out before the next one, and
    each costs the same however many workers there are.

    Attributes:
        factors: Natural parameters, shape ``[R, 2, K]``; changed by ``store`` and ``forget`` alone.
        columns: K; 0 where workers share no effects.
    """

    def __init__(self, config: AlgorithmConfig, workers: int, columns: int) -> None:
        self._config = config
        self.columns = columns
        self.factors: FloatArray = np.zeros((workers, 2, columns))
        self._total: FloatArray | None = None
        self._sorted: FloatArray = np.zeros((0, columns))
        self._rank: IntArray = np.zeros((0, columns), dtype=np.int64)
        self._senders: IntArray = np.zeros(columns, dtype=np.int64)

    def store(self, number: int, factors: FloatArray) -> None:
        """The newest of one worker, shape ``[2, K]``."""
        if self.columns:
            self.factors[number] = factors
            self._total = None

    def forget(self, number: int) -> None:
        """A worker was set aside."""
        self.factors[number] = 0.0
        self._total = None

    def of_others(self, rows: IntArray | slice) -> FloatArray:
        """For each of some workers the pooled factors of all others, times ``effect_trust``.

        Args:
            rows: Index of these workers, as of ``rows_of``.

        Returns:
            Shape ``[workers asked for, 2, K]``.
        """
        own = self.factors[rows]
        if not self.columns or not len(own):
            return own
        merged: FloatArray = self._prepared() - own
        if self._config.effect_trust != 1.0:
            merged *= self._config.effect_trust
        # What is left of a sum minus its only term is rounding, not knowledge.
        np.copyto(merged, 0.0, where=merged[:, :1] <= 1e-9)
        if self._config.aggregator in _ROBUST:
            self._put_medians(merged, own[:, 0] > 0, rows)
        return merged

    def _prepared(self) -> FloatArray:
        """The sum of all, shape ``[1, 2, K]``; with a robust aggregator also the order of their means."""
        if self._total is None:
            self._total = np.asarray(self.factors.sum(axis=0, keepdims=True))
            if self._config.aggregator in _ROBUST:
                means = _means(self.factors, unknown=np.inf)
                order = np.argsort(means, axis=0)
                self._sorted = np.take_along_axis(means, order, axis=0)
                self._rank = np.argsort(order, axis=0)
                self._senders = (self.factors[:, 0] > 0).sum(axis=0)
        return self._total

    def _put_medians(self, merged: FloatArray, knows: BoolArray, rows: IntArray | slice) -> None:
        """Pooled means become medians of the others' means, where at least three of them know: in place."""
        senders = self._senders - knows
        columns = np.arange(self.columns)

        def place(number: IntArray) -> FloatArray:
            """The mean in this place of the others' order: a worker's own is skipped."""
            behind = knows & (number >= self._rank[rows])
            return np.asarray(self._sorted[np.clip(number + behind, 0, len(self._sorted) - 1), columns])

        enough = senders >= _FEWEST
        median = 0.5 * (place((senders - 1) // 2) + place(senders // 2))
        merged[:, 1] = np.where(enough, merged[:, 0] * np.where(enough, median, 0.0), merged[:, 1])
