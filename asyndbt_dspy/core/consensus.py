"""The server's updates of z and theta; robust aggregation (``algorithm.md`` 6 and 7.10)."""

from __future__ import annotations

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.lower_level import bounded
from asyndbt_dspy.core.simplex import FloatArray, Layout, project_blocks


def aggregate(config: AlgorithmConfig, p: FloatArray) -> FloatArray:
    """Mean, trimmed mean or coordinate median of live workers' points ``[R, D]``; not yet on the simplex.

    Where so many workers were lost that ``trim`` would leave none, as many are cut as leaves one or two.
    """
    if config.aggregator == "median":
        return np.asarray(np.median(p, axis=0))
    if config.aggregator == "trimmed_mean":
        trim = min(config.trim, (len(p) - 1) // 2)
        return np.asarray(np.sort(p, axis=0)[trim : len(p) - trim].mean(axis=0))
    return np.asarray(np.add.reduce(p, axis=0) / len(p))


def update_consensus(
    layout: Layout,
    config: AlgorithmConfig,
    z: FloatArray,
    p: FloatArray,
    duals: FloatArray,
    plane_push: FloatArray,
) -> FloatArray:
    """``z <- proj(z - eta_z [-sum_v theta[v] + sum_l lambda_l b_l + psi sum_v sign(z - p[v])])`` (paper).

    With another aggregator the sign term gives way to a step onto the aggregate:
    ``z <- proj(agg(p) - eta_z [-sum_v theta[v] + sum_l lambda_l b_l])``.

    Args:
        p, duals: Rows of live workers, shape ``[R, D]``, in worker order.
        plane_push: ``sum_l lambda_l b_l``, shape ``[D]``.
    """
    bracket = plane_push - bounded(duals, config).sum(axis=0)
    if config.aggregator == "sign":
        bracket = bracket + config.penalty * np.sign(z - p).sum(axis=0)
        return project_blocks(layout, z - config.consensus_step * bracket)
    return project_blocks(layout, aggregate(config, p) - config.consensus_step * bracket)


def update_duals(config: AlgorithmConfig, duals: FloatArray, p: FloatArray, z: FloatArray) -> FloatArray:
    """``theta[v] <- theta[v] + eta_theta (p[v] - z - c2 theta[v])`` for the rows given."""
    return bounded(duals + config.dual_step * (p - z - config.dual_damping * duals), config)
