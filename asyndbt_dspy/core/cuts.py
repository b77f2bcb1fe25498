"""Cutting planes of ``h_i(x) = |x_i - phi_i|_1 <= epsilon`` (``algorithm.md`` 5, eqs 28-33; scheme from ADBO).

    sum_v a[v]^T p[v] + b^T z + sum_v d[v]^T q[v] + c <= 0,    a[v] = s_p[v],  b = s_z,  s = sign(x - phi)

with ``c = -s^T phi - epsilon`` (``- sum_v d[v]^T q[v]`` when planes carry the q-part).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.lower_level import LowerEstimate
from asyndbt_dspy.core.simplex import FloatArray, Layout


@dataclass(frozen=True)
class Plane:
    """One plane of one lower-level block; arrays span the whole lower level and are zero outside the block.

    Attributes:
        block: Number of the block.
        a: Shape ``[R, D]``.
        b: Shape ``[D]``.
        d: Shape ``[Q_1 + .. + Q_R]``, zero without the q-part.
        offsets: Shape ``[R]``: each worker's part of ``c``, so that an evicted worker's part can leave.
        offset: The rest of ``c``.
        multiplier: lambda >= 0.
        low: Updates in a row with ``lambda < gamma``; the iteration that created the plane is none.
    """

    block: int
    a: FloatArray
    b: FloatArray
    d: FloatArray
    offsets: FloatArray
    offset: float
    multiplier: float = 0.0
    low: int = 0

    def value(
        self, p: FloatArray, z: FloatArray, q: FloatArray, live: FloatArray, q_live: FloatArray
    ) -> float:
        """Left-hand side at ``p [R, D]``, ``z [D]``, ``q``; ``live [R]`` and ``q_live`` are 1 for live workers."""
        constant = float(self.offsets.dot(live)) + self.offset
        products = self.a * p
        products *= live[:, None]
        workers = float(np.add.reduce(products, axis=None))
        return workers + float(self.b.dot(z)) + float((self.d * q_live).dot(q)) + constant

    def sign_key(self) -> bytes:
        return np.concatenate([self.a.ravel(), self.b]).astype(np.int8).tobytes()


def violation(
    layout: Layout, p: FloatArray, z: FloatArray, phi: LowerEstimate, live: FloatArray
) -> FloatArray:
    """``h_i = |x_i - phi_i|_1`` over live workers and z, shape ``[blocks]``."""
    total = np.add.reduce(np.abs(p - phi.p) * live[:, None], axis=0) + np.abs(z - phi.z)
    return np.array([float(total[part].sum()) for part in layout.slices])


def make_plane(
    layout: Layout,
    config: AlgorithmConfig,
    block: int,
    signs: tuple[FloatArray, FloatArray],
    phi: LowerEstimate,
    q: FloatArray,
    q_owner: FloatArray,
    multiplier: float = 0.0,
    low: int = 0,
) -> Plane:
    """The plane of ``block`` with sign pattern ``signs = (a, b)`` at the present phi.

    Args:
        q: All workers' q in one vector, shape ``[Q_1 + .. + Q_R]``.
        q_owner: Worker number of each entry of ``q``.
        multiplier, low: Of the plane that this one takes the place of.
    """
    part = layout.slices[block]
    a, b = np.zeros_like(signs[0]), np.zeros_like(signs[1])
    a[:, part], b[part] = signs[0][:, part], signs[1][part]
    offsets = -np.add.reduce(a * phi.p, axis=1)
    d = np.zeros_like(q)
    if phi.p_by_q is not None and phi.z_by_q is not None:
        d = -(np.einsum("rd,rdq->q", a, phi.p_by_q) + b @ phi.z_by_q)
        np.subtract.at(offsets, q_owner.astype(np.int64), d * q)
    offset = -float(np.dot(b, phi.z)) - config.plane_tolerance
    return Plane(block, a, b, d, offsets, offset, multiplier, low)


def refresh(
    layout: Layout,
    config: AlgorithmConfig,
    planes: tuple[Plane, ...],
    iteration: int,
    p: FloatArray,
    z: FloatArray,
    phi: LowerEstimate,
    q: FloatArray,
    q_owner: FloatArray,
    live: FloatArray,
) -> tuple[Plane, ...]:
    """Move known planes to the new phi (``rekey_planes``) and add one for each violated block while ``t < T1``."""
    known: dict[bytes, Plane] = {}
    if config.rekey_planes:
        known = _without_twins(_moved(layout, config, plane, phi, q, q_owner, live) for plane in planes)
        planes = tuple(known.values())
    if iteration >= config.plane_iterations:
        return planes
    signs = (np.sign(p - phi.p) * live[:, None], np.sign(z - phi.z))
    for block, amount in enumerate(violation(layout, p, z, phi, live)):
        if amount > config.plane_tolerance:
            plane = make_plane(layout, config, block, signs, phi, q, q_owner)
            if plane.sign_key() not in known:
                planes = (*planes, plane)
    return planes


def _moved(
    layout: Layout,
    config: AlgorithmConfig,
    plane: Plane,
    phi: LowerEstimate,
    q: FloatArray,
    q_owner: FloatArray,
    live: FloatArray,
) -> Plane:
    signs = (plane.a * live[:, None], plane.b)
    return make_plane(layout, config, plane.block, signs, phi, q, q_owner, plane.multiplier, plane.low)


def _without_twins(planes: Iterable[Plane]) -> dict[bytes, Plane]:
    """By their signs: planes that differed only in a lost worker's signs become one, with the sum of their multipliers."""
    kept: dict[bytes, Plane] = {}
    for plane in planes:
        key = plane.sign_key()
        twin = kept.get(key)
        if twin is not None:
            plane = dataclasses.replace(twin, multiplier=twin.multiplier + plane.multiplier)
        kept[key] = plane
    return kept


def update_multiplier(config: AlgorithmConfig, plane: Plane, value: float) -> Plane:
    """``lambda <- max(0, lambda + eta_lambda (value - c1 lambda))`` and the count of low values in a row."""
    multiplier = max(
        0.0, plane.multiplier + config.plane_step * (value - config.plane_damping * plane.multiplier)
    )
    low = plane.low + 1 if multiplier < config.plane_drop else 0
    return dataclasses.replace(plane, multiplier=multiplier, low=low)


def update(
    config: AlgorithmConfig,
    planes: tuple[Plane, ...],
    p: FloatArray,
    z: FloatArray,
    q: FloatArray,
    live: FloatArray,
    q_owner: FloatArray,
) -> tuple[Plane, ...]:
    """Every multiplier's update at the new z and the latest p and q, then the drop."""
    q_live = live[q_owner.astype(np.int64)]
    updated = [update_multiplier(config, plane, plane.value(p, z, q, live, q_live)) for plane in planes]
    return drop_idle(tuple(updated))


def consensus_push(planes: tuple[Plane, ...], lower: Layout) -> FloatArray:
    """``sum_l lambda_l b_l``, shape ``[D]``. Planes with ``lambda = 0`` are skipped: the step stays bit-identical."""
    return sum((plane.multiplier * plane.b for plane in planes if plane.multiplier), np.zeros(lower.length))


class Pushes:
    """What the planes push each worker with: ``sum_l lambda_l a_l[v]`` and ``sum_l lambda_l d_l[v]``.

    Added up for all workers once after a change: where nobody waits, many requests go out one by one before the next.

    Args:
        lower: Layout of the lower level.
        widths: Entries of each worker's q that planes push, Q_v; all zero without the q-part.
        uppers: Layouts of the upper level, of all workers.
    """

    def __init__(self, lower: Layout, uppers: Sequence[Layout], widths: Sequence[int]) -> None:
        self._shape = len(uppers), lower.length
        self._uppers = uppers
        self._ends = np.cumsum(widths, dtype=np.int64).tolist()
        self._planes: tuple[Plane, ...] | None = None
        self._lower_push: FloatArray = np.zeros(self._shape)
        self._upper_push: FloatArray = np.zeros(sum(widths))

    def of(self, planes: tuple[Plane, ...], number: int) -> tuple[FloatArray, FloatArray]:
        """For worker ``number``, shapes ``[D]`` and ``[Q_v]``; not to be written to."""
        if planes is not self._planes:
            self._planes = planes
            active = [plane for plane in planes if plane.multiplier]
            self._lower_push = sum((one.multiplier * one.a for one in active), np.zeros(self._shape))
            self._upper_push = sum(
                (one.multiplier * one.d for one in active), np.zeros_like(self._upper_push)
            )
        push = self._lower_push[number].copy()  # a request keeps its own row alive, not everybody's
        if len(self._upper_push):
            first = self._ends[number - 1] if number else 0
            return push, self._upper_push[first : self._ends[number]].copy()
        return push, _nothing(self._uppers[number].length)


@functools.cache
def _nothing(length: int) -> FloatArray:
    """Zeros that many messages share: nobody can write to them."""
    zeros = np.zeros(length)
    zeros.flags.writeable = False
    return zeros


def drop_idle(planes: tuple[Plane, ...]) -> tuple[Plane, ...]:
    """Drop planes whose multiplier was below gamma after two updates in a row."""
    return tuple(plane for plane in planes if plane.low < 2)
