"""From scores to losses to gradient estimates (``algorithm.md`` 2; BDPL, arXiv:2201.08531; control variates: 7.3, 7.9).

The only place where scores (higher is better) become losses (lower is better).
"""

from __future__ import annotations

import numpy as np

from asyndbt_dspy.core.simplex import FloatArray, IntArray, Layout

MAX_CROSS_ENTROPY = 10.0
"""Nats. A label that the LM deems impossible must not outweigh a whole minibatch."""

MARGIN_RANGE = (-3.0, 0.5)
"""Nats. Margins beyond tell nothing more of which answer is given."""
MARGIN_WEIGHT = 0.6
"""Share of the margin in ``margin_loss``; the rest is the metric's."""

RIGHT_SCORE = 0.5
"""A score of at least this says that the metric takes the answer for right."""


def loss_of(score: float | None, soft: float | None) -> float:
    """The loss of one rollout; NaN where it is missing (a timeout is not a score of zero).

    Args:
        score: The metric, higher is better, ``None`` if the rollout is missing.
        soft: A loss finer than right or wrong that goes before the metric; ``None``: there is none.
    """
    if score is None:
        return float("nan")
    return 1.0 - score if soft is None else soft


class Undescribed:
    """Losses of answers of which the LM's distribution says nothing, where it says something of others.

    ``1 - score`` alone is on another scale: a right label that the metric refuses would cost more than a near miss. So
    what a distribution adds to it is taken to be what it added so far, on average, where the metric said the like
    (right or wrong); before that, nothing.
    """

    def __init__(self) -> None:
        self.sums = [0.0, 0.0]
        self.counts = [0, 0]

    def note(self, score: float | None, soft: float | None) -> None:
        """An answer and its loss by distribution; nothing is learned where either is missing."""
        if score is not None and soft is not None:
            side = score >= RIGHT_SCORE
            self.sums[side] += soft - (1.0 - score)
            self.counts[side] += 1

    def loss(self, score: float | None, soft: float | None) -> float:
        """``loss_of`` on one scale."""
        side = score is not None and score >= RIGHT_SCORE
        if score is None or soft is not None or not self.counts[side]:
            return loss_of(score, soft)
        return 1.0 - score + self.sums[side] / self.counts[side]


def cross_entropy_loss(cross_entropy: float | None) -> float | None:
    """``-ln P(right answer)``, at most ``MAX_CROSS_ENTROPY``; ``None`` where the LM reported no distribution."""
    return None if cross_entropy is None else min(max(cross_entropy, 0.0), MAX_CROSS_ENTROPY)


def soft_score(margin: float) -> float:
    """How far ``ln P(right) - ln P(best other)`` is along ``MARGIN_RANGE``, in [0, 1]."""
    low, high = MARGIN_RANGE
    return (min(max(margin, low), high) - low) / (high - low)


def margin_loss(margin: float, score: float) -> float:
    """A loss in [0, 1] that tells candidates apart in fewer rollouts than accuracy or a cross-entropy.

    Accuracy is noisy, and cross-entropies are ruled by few hopeless examples, so the margin counts only where more of it
    may change an answer; ``docs/benchmarks.md`` has the figures.

    Args:
        margin: ``ln P(right answer) - ln P(best other answer)``, in nats.
        score: The metric.
    """
    return MARGIN_WEIGHT * (1.0 - soft_score(margin)) + (1.0 - MARGIN_WEIGHT) * (1.0 - score)


def advantages(losses: FloatArray, baselines: FloatArray | None = None) -> tuple[FloatArray, float]:
    """Centred losses of the draws and the divisor that keeps the estimate unbiased.

    Args:
        losses: Shape ``[draws, examples]``, all draws on the same examples; NaN where missing. An example that fewer
            than two draws answered is left out, unless a baseline stands in.
        baselines: Shape ``[examples]``: each example's mean loss of *earlier* iterations (a control variate
            independent of the present draws), NaN where unknown. ``None``: leave-one-out over the draws.

    Returns:
        ``(centred [draws], divisor)``: the estimate is ``sum_r centred_r e_j / p_j / divisor``. Without baselines
        ``centred = L - mean(L)`` and ``divisor = I - 1``.
    """
    if baselines is not None and bool(np.all(np.isfinite(baselines))):
        return _row_means(losses - baselines), float(max(1, _answered(losses)))
    present = np.isfinite(losses)
    usable = present.sum(axis=0) >= 2
    kept = np.where(present & usable, losses, np.nan)
    with np.errstate(invalid="ignore"):
        totals = np.nansum(kept, axis=0) / np.maximum(1, np.sum(np.isfinite(kept), axis=0))
    return _row_means(kept - totals), float(max(1, _answered(kept) - 1))


def _row_means(values: FloatArray) -> FloatArray:
    counts = np.sum(np.isfinite(values), axis=1)
    return np.asarray(np.nansum(values, axis=1) / np.maximum(1, counts))


def _answered(losses: FloatArray) -> int:
    return int(np.sum(np.any(np.isfinite(losses), axis=1)))


def score_function_estimate(
    layout: Layout, probabilities: FloatArray, arms: IntArray, centred: FloatArray, divisor: float
) -> FloatArray:
    """``ghat_p[i] = 1/(I-1) sum_r (L^r - Lbar) e_{j_i^r} / p[i][j_i^r]``, shape ``[length]``.

    Divides at the drawn arms only, with ``probabilities`` as they were when the arms were drawn.

    Args:
        arms: Shape ``[draws, blocks]``, numbers within each block.
        centred, divisor: From ``advantages``.
    """
    estimate = np.zeros(layout.length)
    for row, advantage in zip(arms, centred, strict=True):
        places = layout.starts + row
        estimate[places] += advantage / probabilities[places]
    return estimate / divisor


def cross_estimate(
    lower: Layout,
    upper: Layout,
    lower_probabilities: FloatArray,
    upper_probabilities: FloatArray,
    lower_arms: IntArray,
    upper_arms: IntArray,
    centred: FloatArray,
    divisor: float,
) -> FloatArray:
    """Estimate of the mixed derivative ``d ghat_p / d q`` by score functions of both levels, shape ``[D, Q]``."""
    estimate = np.zeros((lower.length, upper.length))
    for low, up, advantage in zip(lower_arms, upper_arms, centred, strict=True):
        rows, columns = lower.starts + low, upper.starts + up
        weight = advantage / np.outer(lower_probabilities[rows], upper_probabilities[columns])
        estimate[np.ix_(rows, columns)] += weight
    return estimate / divisor


def importance_weights(
    layout: Layout,
    new: FloatArray,
    old: FloatArray,
    arms: IntArray,
    limit: float,
    skip_block: int | None = None,
) -> FloatArray:
    """Joint weights ``prod_i p_new / p_old`` of earlier draws, clipped at ``limit``, shape ``[draws]``.

    Args:
        skip_block: Leave this block out: ``score_function_estimate`` divides by ``p_old`` there, which already
            contains its weight. Multiplying twice is the classic mistake.
    """
    weights = np.ones(len(arms))
    for block, part in enumerate(layout.slices):
        if block != skip_block:
            places = part.start + arms[:, block]
            weights *= new[places] / old[places]
    return np.asarray(np.minimum(weights, limit))


def reweighted_estimate(
    layout: Layout,
    new: FloatArray,
    old: FloatArray,
    arms: IntArray,
    centred: FloatArray,
    divisor: float,
    limit: float,
) -> FloatArray:
    """``score_function_estimate`` at ``new`` from draws made at ``old`` (``algorithm.md`` 7.9)."""
    estimate = np.zeros(layout.length)
    for block, part in enumerate(layout.slices):
        weights = importance_weights(layout, new, old, arms, limit, skip_block=block)
        for arm, advantage, weight in zip(arms[:, block], centred, weights, strict=True):
            estimate[part.start + int(arm)] += weight * advantage / old[part.start + int(arm)]
    return estimate / divisor


def logit_estimate(
    layout: Layout,
    new: FloatArray,
    old: FloatArray,
    arms: IntArray,
    centred: FloatArray,
    divisor: float,
    limit: float,
) -> FloatArray:
    """The same in the logits of ``new``: ``sum_r w^r (L^r - Lbar) (e_j - p_new) / (I - 1)``, shape ``[length]``."""
    weights = importance_weights(layout, new, old, arms, limit) * centred
    estimate = -new * weights.sum()
    for row, weight in zip(arms, weights, strict=True):
        estimate[layout.starts + row] += weight
    return np.asarray(estimate / divisor)


def clip_norm(vector: FloatArray, limit: float) -> FloatArray:
    """Scale ``vector`` so that its Euclidean norm is at most ``limit`` (BDPL clips at 3)."""
    norm = float(np.linalg.norm(vector))
    return vector if norm <= limit else np.asarray(vector * (limit / norm))


def centre_blocks(layout: Layout, vector: FloatArray, probabilities: FloatArray) -> FloatArray:
    """Subtract each block's mean under ``probabilities``: what remains is each arm's advantage."""
    result = vector.copy()
    for part in layout.slices:
        result[part] -= float(np.dot(probabilities[part], vector[part]))
    return result


def draw_arms(rng: np.random.Generator, layout: Layout, probabilities: FloatArray, draws: int) -> IntArray:
    """Draw one arm per block, ``draws`` times, shape ``[draws, blocks]``."""
    picked = np.zeros((draws, len(layout.sizes)), dtype=np.int64)
    for block, part in enumerate(layout.slices):
        weights = probabilities[part]
        picked[:, block] = rng.choice(len(weights), size=draws, p=weights / weights.sum())
    return picked
