"""Points of late workers move along with the consensus (``stale_step``; ``algorithm.md`` 7.9).

The consensus is a mean of all workers' points, so that fast workers do not drown slow ones. But then the old point of
a slow worker holds the consensus back where it was when that worker last answered. Giving it less weight would drown
it. Instead an old point counts as if it had moved with z: what a worker says is how far from z it wants to be. At
rest both are the same (as in incremental aggregated gradients, Blatt et al. 2007), and no worker weighs more.
"""

from __future__ import annotations

import numpy as np

from asyndbt_dspy.core.simplex import FloatArray, Layout

_LEAST = 1e-3
"""Smallest probability of a point that was moved: mirror descent never gets an arm back from 0."""


class Carried:
    """What of z each worker's newest point was made from.

    Args:
        moves: Whether points move along at all.

    Attributes:
        version: Per worker, the update of z that its point is based on.
        seen: That z, shape ``[R, D]``.
    """

    def __init__(self, count: int, z: FloatArray, moves: bool = True) -> None:
        self._moves = moves
        self.version = np.zeros(count, dtype=np.int64)
        self.seen: FloatArray = np.tile(z, (count, 1))
        self._sent: list[FloatArray] = [z] * count

    def hand_out(self, number: int, z: FloatArray) -> None:
        """Worker ``number`` begins a step from this z."""
        self._sent[number] = z

    def take_in(self, number: int, version: int) -> None:
        """Its point, made from the z of ``version``, came in."""
        self.version[number] = version
        self.seen[number] = self._sent[number]

    def points(self, p: FloatArray, z: FloatArray, version: int) -> FloatArray:
        """``p[v] + (1 - 1 / (1 + age)) (z - z_seen[v])``, age in updates of z; not yet on the simplex. Shape ``[R, D]``."""
        age = version - self.version
        return p + _share(age)[:, None] * (z - self.seen) if self._moves and age.any() else p


def moved_along(
    layout: Layout, point: FloatArray, z: FloatArray, seen: FloatArray | None, staleness: int
) -> FloatArray:
    """Where the next step of a worker begins whose last answer was ``staleness`` updates late: the same of its own point.

    Args:
        z, seen: The consensus of this step, and of the one before (``None``: there was none).
    """
    if seen is None or not staleness:
        return point
    moved = np.maximum(point + _share(np.array([staleness])) * (z - seen), _LEAST)
    for part in layout.slices:
        moved[part] /= moved[part].sum()
    return np.asarray(moved)


def _share(age: np.ndarray) -> FloatArray:
    return np.asarray(1.0 - 1.0 / (1.0 + age))
