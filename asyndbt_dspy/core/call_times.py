"""When a call takes so long that its unit of work goes on without it; for what runs units, and for what plans them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

MEMORY = 64
"""A worker's usual time is the median of so many of its newest calls."""
SHARE = 3
"""At most one call in so many of a unit, rounded up, is left behind: where more are slow, the endpoint is slow."""
GIVEN_UP = 3.0
"""Times its limit that a call may go on after it was left behind."""
_FEWEST = 5
"""Durations that must be known for their median to be what is usual."""
_LEAST_S = 1.0
"""Nothing that takes less is worth leaving behind."""
_LEAST_OF_FEW_S = 10.0
"""Nor this while fewer are known: a first call may be slow for a reason, as a model is loaded or a connection made."""


def may_leave(calls: int, share: int = SHARE) -> int:
    """How many of a unit's ``calls`` it may leave behind."""
    return math.ceil(calls / share)


def limit_s(factor: float | None, newest_s: Sequence[float]) -> float:
    """Seconds that one call may take; infinite where nothing is known.

    Of few calls the longest stands for the usual one.

    Args:
        factor: > 1, how many times the median one call may take; ``None``: all are waited for.
        newest_s: What a worker's newest calls took, ``MEMORY`` at most.
    """
    if factor is None or not newest_s:
        return math.inf
    if len(newest_s) < _FEWEST:
        return max(_LEAST_OF_FEW_S, factor * max(newest_s))
    return max(_LEAST_S, factor * statistics.median(newest_s))
