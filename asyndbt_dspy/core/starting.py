"""Where the distributions over the lower level begin, for the server and for its workers alike."""

from __future__ import annotations

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.simplex import FloatArray, Layout
from asyndbt_dspy.core.space import Space


def starting_distribution(space: Space, config: AlgorithmConfig) -> FloatArray:
    """p and z before the first answer, shape ``[D]``.

    Uniform, as in the paper. With ``sparse_start`` each of the k instruction blocks that offer a choice has of that only one
    k-th, and the student's own text has the rest: in expectation a draw changes as many texts as of a program with one
    predictor. (A mutation rate of one over the length: Bäck 1993, "Optimal mutation rates in genetic search".) Where every
    draw changes nearly all predictors at once, a few hundred rollouts do not tell which change did what.
    """
    layout = Layout(tuple(len(block.arms) for block in space.lower))
    start = layout.uniform()
    chosen = [
        part
        for block, part in zip(space.lower, layout.slices, strict=True)
        if block.kind == "instructions" and len(block.arms) > 1
    ]
    if config.sparse_start and len(chosen) > 1:
        for part in chosen:
            start[part] /= len(chosen)
            start[part.start] += 1.0 - float(np.sum(start[part]))
    return start
