"""Geometry of the probability simplex: layout of blocks, Euclidean projection, exponentiated gradient.

Vectors over all blocks of one level are flat: block ``i`` takes the slice ``layout.slices[i]``. Leading axes (workers)
are allowed everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FEW = 16
"""Numbers up to which Python is quicker than a handful of calls of numpy."""

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def rows_of(numbers: Sequence[int]) -> IntArray | slice:
    """Index of these rows: a slice for a single one, which numpy takes several times faster than a list, and as a view."""
    if len(numbers) == 1:
        return slice(numbers[0], numbers[0] + 1)
    return np.asarray(numbers, dtype=np.int64)


@dataclass(frozen=True)
class Layout:
    """Sizes of consecutive blocks of a flat vector.

    Attributes:
        sizes: Number of arms of each block, each at least 1.
    """

    sizes: tuple[int, ...]

    @functools.cached_property
    def slices(self) -> tuple[slice, ...]:
        ends = np.cumsum(self.sizes, dtype=np.int64).tolist()
        return tuple(slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True))

    @functools.cached_property
    def length(self) -> int:
        return sum(self.sizes)

    @functools.cached_property
    def starts(self) -> IntArray:
        """Where each block begins."""
        return np.array([part.start for part in self.slices], dtype=np.int64)

    @functools.cached_property
    def runs(self) -> tuple[tuple[slice, int], ...]:
        """Runs of neighbouring blocks of equal size, as (slice of the run, block size), for vectorized passes."""
        found: list[tuple[slice, int]] = []
        for part, size in zip(self.slices, self.sizes, strict=True):
            if found and found[-1][1] == size:
                found[-1] = (slice(found[-1][0].start, part.stop), size)
            else:
                found.append((part, size))
        return tuple(found)

    def uniform(self) -> FloatArray:
        """Each block's uniform distribution, shape ``[length]``."""
        return np.concatenate([np.full(size, 1.0 / size) for size in self.sizes] or [np.zeros(0)])

    def map_blocks(self, vector: FloatArray, function: Callable[[FloatArray], FloatArray]) -> FloatArray:
        """Apply ``function`` to arrays ``[..., blocks, size]`` of each run; the result has ``vector``'s shape."""
        lead = vector.shape[:-1]
        if len(self.runs) == 1:  # all blocks of one size: no copy
            return function(vector.reshape(*lead, len(self.sizes), -1)).reshape(vector.shape)
        result = np.empty_like(vector)
        for part, size in self.runs:
            blocks = vector[..., part].reshape(*lead, -1, size)
            result[..., part] = function(blocks).reshape(*lead, -1)
        return result

    def block_values(self, vector: FloatArray, arms: Sequence[int]) -> FloatArray:
        """``vector`` at one arm per block, shape ``[blocks]``."""
        return np.array([vector[part.start + arm] for part, arm in zip(self.slices, arms, strict=True)])

    def argmax(self, vector: FloatArray) -> tuple[int, ...]:
        """Each block's most probable arm; ties go to the lower number, so to the student's own arm 0."""
        return tuple(int(np.argmax(vector[part])) for part in self.slices)

    def is_distribution(self, vector: FloatArray, tolerance: float = 1e-6) -> bool:
        """Whether every block of a vector ``[length]`` is a point of its simplex (finite, non-negative, sum 1)."""
        if vector.shape != (self.length,):
            return False
        # As plain numbers: for the few dozen arms of a lower level numpy's calls alone take longer.
        values = vector.tolist()
        if values and not min(values) >= -tolerance:
            return False
        # NaN passes no comparison, and infinity is no sum of 1.
        return all(abs(sum(values[part]) - 1.0) <= tolerance for part in self.slices)


def shared(layouts: Sequence[Layout]) -> list[Layout]:
    """The same, with one object for all that are equal: thousands of workers mostly have as many arms as the others."""
    known: dict[Layout, Layout] = {}
    return [known.setdefault(layout, layout) for layout in layouts]


def project(points: FloatArray) -> FloatArray:
    """Euclidean projection onto the probability simplex along the last axis (``algorithm.md`` 3).

    Solves ``min_y ||y - x||^2  subject to  y >= 0, sum(y) = 1`` by the sorted-threshold method, exact,
    ``O(N log N)``; ``y = max(x - v*, 0)`` with ``v* = max_k (x_(1) + .. + x_(k) - 1) / k`` over the k largest entries:
    the quotient grows exactly as long as the next entry exceeds it, so its maximum is at the size of the support.

    Args:
        points: Finite values, shape ``[..., N]``, N >= 1.
    """
    if points.shape[-1] == points.size <= _FEW:
        return _project_few(points)
    rising = np.array(points, dtype=np.float64)
    rising.sort(axis=-1)
    means = np.add.accumulate(rising[..., ::-1], axis=-1)
    means -= 1.0
    means /= _counts(points.shape[-1])
    # Over the first axis of a copy: numpy reduces a short last axis row by row, at a multiple of the price.
    last = means.ndim - 1
    largest = np.maximum.reduce(means.transpose(last, *range(last)).copy(), axis=0)
    result = points - largest[..., None]
    return np.asarray(np.maximum(result, 0.0, out=result))


def _project_few(points: FloatArray) -> FloatArray:
    """The same with the same rounding, as plain numbers: numpy's calls alone would take longer."""
    values, total, largest = points.ravel().tolist(), 0.0, -math.inf
    for count, value in enumerate(sorted(values, reverse=True), start=1):
        total += value
        largest = max(largest, (total - 1.0) / count)
    return np.array([max(0.0, value - largest) for value in values]).reshape(points.shape)


@functools.cache
def _counts(size: int) -> IntArray:
    return np.arange(1, size + 1)


def project_blocks(layout: Layout, vector: FloatArray) -> FloatArray:
    """``project`` for every block of a flat vector ``[..., length]``."""
    return layout.map_blocks(vector, project)


def project_columns(layout: Layout, columns: FloatArray) -> FloatArray:
    """``project_blocks`` of column 0, and the derivatives of that projection along the other columns.

    On the support ``A`` of a block the projection is ``x_A - mean(x_A) + 1/|A|``; off it it is constant.

    Args:
        columns: Shape ``[..., length, 1 + Q]``: a point and Q directions.
    """
    lead, width = columns.shape[:-2], columns.shape[-1]
    if width == 1:
        return project_blocks(layout, columns[..., 0])[..., None]
    result = np.empty_like(columns)
    for part, size in layout.runs:
        blocks = columns[..., part, :].reshape(*lead, (part.stop - part.start) // size, size, width)
        moved = blocks - np.add.reduce(blocks, axis=-2, keepdims=True) / size
        moved[..., 0] += 1.0 / size
        if not moved[..., 0].min() > 0:  # not an interior point
            moved = _project_boundary(blocks)
        result[..., part, :] = moved.reshape(*lead, part.stop - part.start, width)
    return result


def _project_boundary(blocks: FloatArray) -> FloatArray:
    projected = project(blocks[..., 0])
    support = (projected > 0)[..., None]
    masked = blocks * support
    mean = masked.sum(axis=-2, keepdims=True) / support.sum(axis=-2, keepdims=True)
    moved = (masked - mean) * support
    moved[..., 0] = projected
    return np.asarray(moved)


def exponentiated_step(
    layout: Layout, vector: FloatArray, bracket: FloatArray, step_size: float, floor: float
) -> FloatArray:
    """Mirror descent with the entropy mirror map: ``p_j <- p_j exp(-step b_j) / sum``, floored (``algorithm.md`` 7.4).

    Args:
        floor: In [0, 1): every arm keeps at least ``floor / N``, since a probability of zero is absorbing.
    """

    def step(blocks: FloatArray) -> FloatArray:
        size = blocks.shape[-1]
        # Counted from the best arm that has any probability, so that at least one weight survives the exponential.
        least = np.where(blocks > 0, blocks_bracket, np.inf).min(axis=-1, keepdims=True)
        weights = blocks * np.exp(np.minimum(-(blocks_bracket - least) * step_size, 0.0))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return np.asarray((1.0 - floor) * weights + floor / size)

    result = np.empty_like(vector)
    for part, size in layout.runs:
        blocks_bracket = bracket[part].reshape(-1, size)
        result[part] = step(vector[part].reshape(-1, size)).reshape(-1)
    return result
