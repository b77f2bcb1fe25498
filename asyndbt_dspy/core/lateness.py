"""Where nobody waits, what a worker says is how far from z it wants to be (``stale_step``; ``algorithm.md`` 7.9).

The consensus is a mean of all workers' points, so that fast workers do not drown slow ones. But then the old point of
a slow worker holds the consensus back where it was when that worker last answered. Giving it less weight would drown
it. So each worker counts with the distance of its point from the z that the point was made from, until its next answer:

    z <- z + share * mean_v (p[v] - z_seen[v]),    share = answers in this update / workers

as in incremental aggregated gradients (Blatt, Hero & Gauchman 2007). Every word counts in as many updates as it is the
newest, in each as much less as updates are more frequent: no worker weighs more for being fast, and none is moved twice.
"""

from __future__ import annotations

import numpy as np

from asyndbt_dspy.core.simplex import FloatArray, IntArray


class Distances:
    """What of z each worker's newest point was made from.

    Args:
        count_so: Whether distances count; else the points do.

    Attributes:
        seen: That z, shape ``[R, D]``; ``[0, D]`` if points count.
    """

    def __init__(self, count: int, z: FloatArray, count_so: bool = True) -> None:
        self._count_so = count_so
        self.seen: FloatArray = np.tile(z, (count if count_so else 0, 1))
        self._sent: list[FloatArray] = [z] * count
        self._answered: list[FloatArray] = [z] * count

    def hand_out(self, number: int, z: FloatArray) -> None:
        """Worker ``number`` begins a step from this z."""
        self._sent[number] = z

    def take_back(self, number: int) -> None:
        """It answered that step; its next one may begin before the answer is used."""
        self._answered[number] = self._sent[number]

    def take_in(self, number: int) -> None:
        """Its newest answer is used."""
        if self._count_so:
            self.seen[number] = self._answered[number]

    def points(self, p: FloatArray, z: FloatArray, rows: IntArray, answers: int) -> FloatArray:
        """Points whose mean is the next z: ``z + share (p[v] - z_seen[v])`` of the workers ``rows``, shape ``[len(rows), D]``.

        Where all answered from this z, that is p.
        """
        if not self._count_so:
            return p[rows]
        share = min(1.0, answers / len(rows))
        return np.asarray(z + share * (p[rows] - self.seen[rows]))
