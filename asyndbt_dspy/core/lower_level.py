"""The lower-level estimate phi: K rounds of consensus on workers' lower-level losses (``algorithm.md`` 4, eqs 7-13).

``solve_rounds`` runs all K rounds at once from surrogates of the workers' lower-level losses; the server's ``rounds``
phase runs the same ``worker_round`` and ``server_round`` over messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.simplex import FloatArray, Layout, project_columns


class Surrogate(NamedTuple):
    """A worker's local model of its lower-level loss around ``point``: ``g(p) = gradient + curvature (p - point)``.

    Attributes:
        gradient: Shape ``[D]``.
        point: Shape ``[D]``, where the gradient was estimated.
        curvature: Shape ``[D, D]`` or ``None`` for zero (a sampled loss is linear in each block's p).
        cross: Shape ``[D, Q]``: derivative of the gradient with respect to this worker's q, or ``None``.
    """

    gradient: FloatArray
    point: FloatArray
    curvature: FloatArray | None = None
    cross: FloatArray | None = None

    def at(self, p: FloatArray) -> FloatArray:
        if self.curvature is None:
            return self.gradient
        return np.asarray(self.gradient + self.curvature @ (p - self.point))

    def moved(self, p: FloatArray, q_change: FloatArray) -> Surrogate:
        """The same model around another ``p``, after this worker's q changed by ``q_change [Q]``."""
        gradient = self.at(p)
        if self.cross is not None:
            gradient = gradient + self.cross @ q_change
        return Surrogate(gradient, p, self.curvature, self.cross)


@dataclass(frozen=True)
class RoundState:
    """Variables of the rounds: ``p [R, D, C]``, ``z [D, C]``, ``rho [R, D, C]``.

    Column 0 holds the values; the others, if any, their derivatives with respect to every entry of all workers' q, so
    that one formula advances both. ``rho`` is bounded already: it starts at zero, and ``server_round`` bounds it.
    """

    p: FloatArray
    z: FloatArray
    rho: FloatArray

    @classmethod
    def start(cls, p: FloatArray, z: FloatArray, columns: int = 1) -> RoundState:
        """At ``p [R, D]``, ``z [D]``, with ``rho = 0`` and derivatives zero."""
        state = cls(*(np.zeros((*shape, columns)) for shape in (p.shape, z.shape, p.shape)))
        state.p[..., 0], state.z[..., 0] = p, z
        return state


@dataclass(frozen=True)
class LowerEstimate:
    """``phi = [p_1 .. p_R ; z]`` and, if asked for, its total derivative with respect to every worker's q.

    Attributes:
        p: Shape ``[R, D]``.
        z: Shape ``[D]``.
        p_by_q: Shape ``[R, D, Q_1 + .. + Q_R]`` or ``None``.
        z_by_q: Shape ``[D, Q_1 + .. + Q_R]`` or ``None``.
    """

    p: FloatArray
    z: FloatArray
    p_by_q: FloatArray | None = None
    z_by_q: FloatArray | None = None


def bounded(values: FloatArray, config: AlgorithmConfig) -> FloatArray:
    """Clip to ``[-psi, psi]`` where the consensus is to be robust (``algorithm.md`` 7.10)."""
    if not config.clip_consensus:
        return values
    result = np.maximum(values, -config.penalty)
    return np.minimum(result, config.penalty, out=result)


def worker_round(
    layout: Layout,
    config: AlgorithmConfig,
    p: FloatArray,
    z: FloatArray,
    rho: FloatArray,
    gradient: FloatArray,
) -> FloatArray:
    """``p <- proj(p - eta [g + rho + mu (p - z) + psi sign(p - z)])``; arrays ``[..., D, C]`` as in ``RoundState``."""
    gap = p - z
    pull = gradient + rho
    pull += _bounded_columns(config.proximal * gap, config)
    _add_signs(pull, gap, config)
    pull *= config.round_step
    return project_columns(layout, p - pull)


def server_round(layout: Layout, config: AlgorithmConfig, state: RoundState) -> RoundState:
    """``z <- proj(z - eta_z [sum_v(-rho + mu (z - p)) + psi sum_v sign(z - p)])``, then ``rho += eta_rho (p - z)``."""
    gap = state.z - state.p
    push = _bounded_columns(config.proximal * gap, config) - state.rho
    _add_signs(push, gap, config)
    z = project_columns(layout, state.z - config.round_consensus_step * np.add.reduce(push, axis=0))
    rho = _bounded_columns(state.rho + config.round_dual_step * (state.p - z), config)
    return RoundState(state.p, z, rho)


def _add_signs(force: FloatArray, gap: FloatArray, config: AlgorithmConfig) -> None:
    """The subgradient of ``psi |gap|_1``, added to the values in place."""
    if config.penalty:
        values = force[..., 0]
        values += config.penalty * np.sign(gap[..., 0])


def _bounded_columns(columns: FloatArray, config: AlgorithmConfig) -> FloatArray:
    """``bounded`` for values with derivatives: where a value is clipped, its derivatives are zero."""
    if not config.clip_consensus:
        return columns
    if columns.shape[-1] == 1:
        return bounded(columns, config)
    inside = np.abs(columns[..., 0]) <= config.penalty
    result = columns * inside[..., None]
    result[..., 0] = bounded(columns[..., 0], config)
    return np.asarray(result)


def solve_rounds(
    layout: Layout, config: AlgorithmConfig, p: FloatArray, z: FloatArray, surrogates: Sequence[Surrogate]
) -> LowerEstimate:
    """Run ``config.lower_rounds`` rounds from ``(p, z)`` and ``rho = 0``.

    Args:
        p: Shape ``[R, D]``, one row per surrogate.
        z: Shape ``[D]``.
    """
    curvature = _stacked_curvature(surrogates, layout.length)
    constant = _constant_gradients(surrogates, layout.length, config.hypergradient)
    state = RoundState.start(p, z, constant.shape[-1])
    for _ in range(config.lower_rounds):
        gradient = constant if curvature is None else constant + curvature @ state.p
        moved = worker_round(layout, config, state.p, state.z, state.rho, gradient)
        state = server_round(layout, config, RoundState(moved, state.z, state.rho))
    if not config.hypergradient:
        return LowerEstimate(state.p[..., 0], state.z[..., 0])
    return LowerEstimate(state.p[..., 0], state.z[..., 0], state.p[..., 1:], state.z[..., 1:])


def _constant_gradients(surrogates: Sequence[Surrogate], length: int, derivatives: bool) -> FloatArray:
    """Every model's gradient at p = 0 and its derivative with respect to all workers' q, shape ``[R, D, C]``."""
    origin = np.zeros(length)
    rows = [model.gradient if model.curvature is None else model.at(origin) for model in surrogates]
    values = np.concatenate([origin[:0], *rows]).reshape(len(rows), length, 1)
    if not derivatives:
        return values
    columns = np.zeros(
        (len(rows), length, sum(0 if one.cross is None else one.cross.shape[1] for one in surrogates))
    )
    first = 0
    for row, model in enumerate(surrogates):
        if model.cross is not None:
            columns[row, :, first : first + model.cross.shape[1]] = model.cross
            first += model.cross.shape[1]
    return np.concatenate([values, columns], axis=-1)


def buffered_estimate(
    layout: Layout,
    config: AlgorithmConfig,
    p: FloatArray,
    z: FloatArray,
    surrogates: Sequence[Surrogate | None],
    q_owner: FloatArray,
) -> LowerEstimate:
    """phi from what workers sent last, without asking anybody (``algorithm.md`` 7.2).

    Args:
        p: Shape ``[R, D]``.
        surrogates: ``None`` for workers that never answered or were lost: their p stays where it is.
        q_owner: Worker number of each entry of q; its length is that of the derivative's last axis.
    """
    models = [model for model in surrogates if model is not None]
    known = np.array([number for number, model in enumerate(surrogates) if model is not None], dtype=np.int64)
    solved = solve_rounds(layout, config, p[known], z, models)
    moved = p.copy()
    moved[known] = solved.p
    if solved.p_by_q is None or solved.z_by_q is None:
        return LowerEstimate(moved, solved.z)
    with_q = [
        number for number, model in enumerate(surrogates) if model is not None and model.cross is not None
    ]
    columns = np.isin(q_owner, with_q)
    p_by_q = np.zeros((*p.shape, len(q_owner)))
    z_by_q = np.zeros((len(z), len(q_owner)))
    for number, slopes in zip(known, solved.p_by_q, strict=True):
        p_by_q[number][:, columns] = slopes
    z_by_q[:, columns] = solved.z_by_q
    return LowerEstimate(moved, solved.z, p_by_q, z_by_q)


def _stacked_curvature(surrogates: Sequence[Surrogate], length: int) -> FloatArray | None:
    """Shape ``[R, D, D]``, ``None`` if every model is linear."""
    if all(model.curvature is None for model in surrogates):
        return None
    zero = np.zeros((length, length))
    return np.stack([zero if model.curvature is None else model.curvature for model in surrogates])
