"""Where nobody waits, what a worker says is how far from z it wants to be (``stale_step``; ``algorithm.md`` 7.9).

The consensus is a mean of all workers' points, so that fast workers do not drown slow ones. But then the old point of
a slow worker holds the consensus back where it was when that worker last answered. Giving it less weight would drown
it. So each worker counts with the distance of its point from the z that the point was made from, until its next answer:

    z <- z + share * mean_v (p[v] - z_seen[v]),    share = answers in this update / workers

as in incremental aggregated gradients (Blatt, Hero & Gauchman 2007). Every word counts in as many updates as it is the
newest, in each as much less as updates are more frequent: no worker weighs more for being fast.

Once these shares sum to 1, the word has moved z by all that it said, its worker's part of the mean. It goes on counting, or
slow workers would be drowned after all, but it takes z no further than to its point: where slow workers outweigh fast ones,
z would else be thrown from one side of all points to the other, further each time, by what they said of a z of long ago.
"""

from __future__ import annotations

import numpy as np

from asyndbt_dspy.core.simplex import FloatArray, IntArray, Layout

_LEAST = 1e-300
"""Squared length below which a distance is nothing."""


class Distances:
    """What of z each worker's newest point was made from.

    Args:
        count_so: Whether distances count; else the points do.

    Attributes:
        seen: That z, shape ``[R, D]``; ``[0, D]`` if points count.
        used: Answers in the updates since each worker's newest one was used, shape ``[R]``.
    """

    def __init__(self, count: int, z: FloatArray, layout: Layout, count_so: bool = True) -> None:
        self._count_so = count_so
        self._layout = layout
        self.used: IntArray = np.zeros(count, dtype=np.int64)
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
            self.used[number] = 0

    def points(self, p: FloatArray, z: FloatArray, rows: IntArray, answers: int) -> FloatArray:
        """Points whose mean is the next z: ``z + share (p[v] - z_seen[v])`` of the workers ``rows``, shape ``[len(rows), D]``.

        Where all answered from this z, that is p.
        """
        if not self._count_so:
            return p[rows]
        answers = min(answers, len(rows))
        distances = p[rows] - self.seen[rows]
        whole = np.clip(len(rows) - self.used[rows], 0, answers)
        self.used[rows] += answers
        old = np.flatnonzero(whole < answers)
        if len(old):
            distances[old] *= self._reach(distances[old], p[rows[old]] - z, whole[old] / answers)
        return np.asarray(z + answers / len(rows) * distances)

    def _reach(self, distances: FloatArray, ways: FloatArray, whole: FloatArray) -> FloatArray:
        """How much of these distances counts: a part ``whole`` of each in full, the rest as far as from z to the point.

        Per block, along the distance.
        """
        starts = self._layout.starts
        along = np.add.reduceat(distances * ways, starts, axis=1)
        length = np.add.reduceat(distances**2, starts, axis=1)
        parts = np.clip(along / np.maximum(length, _LEAST), 0.0, 1.0)
        parts = whole[:, None] + (1.0 - whole[:, None]) * parts
        return np.repeat(parts, self._layout.sizes, axis=1)
