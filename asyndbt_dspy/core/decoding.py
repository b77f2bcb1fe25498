"""From what was learned to final candidates: merging of effects and of demos (``algorithm.md`` 7.5, 7.7, 7.8)."""

from __future__ import annotations

from collections.abc import Sequence

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.effects import EffectKeys
from asyndbt_dspy.core.policies import Nomination
from asyndbt_dspy.core.shared_effects import pool_factors
from asyndbt_dspy.core.simplex import FloatArray
from asyndbt_dspy.core.space import Candidate, Space

_SURE = 2.0
"""Standard deviations by which a candidate must be better to be returned without a race."""
_PRIOR_PRECISION = 20.0
"""Prior precision of a merged effect: losses have variances of about a quarter, arms a tenth of their deviation."""


def finalists(
    space: Space,
    config: AlgorithmConfig,
    keys: EffectKeys,
    consensus: Candidate,
    nominated: Sequence[Sequence[Nomination]],
    factors: FloatArray,
    allowed: Sequence[Sequence[Sequence[int]]],
) -> tuple[Candidate, ...]:
    """Candidates for the race, most promising first.

    Args:
        consensus: ``argmax z``, one arm per lower-level block.
        nominated: Per live worker its nominations, its decoded candidate first.
        factors: Of live workers, shape ``[R, 2, K]``.
        allowed: Per live worker the arms it may draw; the union is what the merged program may use.
    """
    rated = sorted(
        (one.value - 0.5 * one.deviation, place, one.candidate)
        for place, rows in enumerate(nominated)
        for one in rows
    )
    best = [candidate for _, _, candidate in rated]
    width = len(consensus)
    swapped = [consensus + candidate[width:] for candidate in best[:3]]
    if not config.share_demos:
        return tuple(dict.fromkeys([*swapped, *best]))
    merged: list[Candidate] = []
    if factors.any():
        merged = [consensus + _merged_demos(space, keys, pool_factors(config, factors), allowed)]
    # What was run goes before what was only put together.
    return tuple(dict.fromkeys([*best[:4], *swapped[:1], *merged, *best, *swapped]))


def decode(
    space: Space,
    config: AlgorithmConfig,
    keys: EffectKeys,
    consensus: Candidate,
    nominated: Sequence[Sequence[Nomination]],
    factors: FloatArray,
    allowed: Sequence[Sequence[Sequence[int]]],
) -> Candidate:
    """The program without a race: ``argmax z`` with the merged demos, or with ``argmax q`` of the best worker (paper).

    Args: as of ``finalists``.
    """
    if config.share_demos and factors.shape[2]:
        return consensus + _merged_demos(space, keys, pool_factors(config, factors), allowed)
    decoded = [rows[0] for rows in nominated if rows]
    if not decoded:
        return consensus + (0,) * len(space.upper)
    best = min(decoded, key=lambda one: one.value)
    return consensus + best.candidate[len(consensus) :]


def safest(student: Candidate, nominated: Sequence[Sequence[Nomination]]) -> Candidate:
    """The candidate to return where no race could be run: the student, unless the workers' models are sure of a better one.

    A candidate's loss relative to the student's is pooled over the workers that nominate it, by precision; it counts as
    better if it is below 0 by two standard deviations.
    """
    pooled: dict[Candidate, tuple[float, float]] = {}
    for one in (one for rows in nominated for one in rows if one.deviation > 0):
        precision, weighted = pooled.get(one.candidate, (0.0, 0.0))
        more = one.deviation**-2
        pooled[one.candidate] = precision + more, weighted + more * one.value
    best, lowest = student, 0.0
    for candidate, (precision, weighted) in pooled.items():
        bound = weighted / precision + _SURE * precision**-0.5
        if bound < lowest:
            best, lowest = candidate, bound
    return best


def _merged_demos(
    space: Space, keys: EffectKeys, pooled: FloatArray, allowed: Sequence[Sequence[Sequence[int]]]
) -> Candidate:
    """Each slot's best shared arm under the pooled effects; no demo twice."""
    means = dict(zip(keys.shared, (pooled[1] / (pooled[0] + _PRIOR_PRECISION)).tolist(), strict=True))
    chosen: list[int] = []
    used: set[str] = set()
    first = len(space.lower)
    for slot, block in enumerate(space.upper):
        usable = sorted({arm for rows in allowed for arm in rows[slot]})
        rated = [
            (
                sum(means[name] for name in keys.arms[first + slot][arm]) + keys.arm_cost(first + slot, arm),
                arm,
            )
            for arm in usable
            if arm and block.arms[arm].shared and block.arms[arm].key not in used
        ]
        worth, arm = min(rated, default=(0.0, 0))
        chosen.append(arm if worth < 0 else 0)
        used.add(block.arms[chosen[-1]].key)
    return tuple(chosen)
