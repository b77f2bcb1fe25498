"""Losses finer than right or wrong: how probable the LM found the right label, alone and beside the best other one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from asyndbt_dspy.core.estimators import RIGHT_SCORE
from asyndbt_dspy.lms.distributions import Distribution, of_response
from asyndbt_dspy.programs.labels import Enumeration, enumeration

MAX_CROSS_ENTROPY = 10.0
"""In nats. One hopeless example must not outweigh a whole minibatch."""

MAX_MARGIN = 10.0
"""In nats, either way."""


@dataclass(frozen=True)
class RightLabel:
    """How an LM's distribution sees the right label.

    Attributes:
        cross_entropy: -ln P(right), in [0, 10].
        margin: ln P(right) - ln P(best other label), in [-10, 10].
    """

    cross_entropy: float
    margin: float


def right_label(
    trace: Sequence[tuple[dspy.Predict, Any, Any]],
    example: dspy.Example,
    score: float,
    distributions: Sequence[Distribution],
    calls: Sequence[Mapping[str, Any]] = (),
) -> RightLabel | None:
    """The right label of the run's last answer, as the LM saw it.

    Args:
        trace: The run's trace; its last entry is the final answer.
        example: Holds the right label as a field that is not an input.
        score: The metric's verdict on the run.
        distributions: What the LM reported during the run, in order.
        calls: DSPy's history entries of the run's LM calls. An answer from DSPy's cache reports nothing, but
            its stored response holds the distributions.

    Returns:
        ``None`` where the last answer has no enumerated field, the example lacks its
        label, the LM reported no distribution over it, or the metric judges by something else (it calls a
        wrong label right, or the reverse).
    """
    if not trace:
        return None
    predictor, _, answer = trace[-1]
    classes = enumeration(predictor.signature)
    if classes is None or classes.field not in example or classes.field not in answer:
        return None
    right = classes.label_of(example[classes.field])
    if right is None or (classes.label_of(answer[classes.field]) == right) != (score >= RIGHT_SCORE):
        return None
    shares = _shares(classes, _stored(calls) or distributions)
    if right not in shares:
        return None
    mine, best_other = (
        _log(shares[right]),
        _log(max((p for one, p in shares.items() if one != right), default=0.0)),
    )
    return RightLabel(
        cross_entropy=min(MAX_CROSS_ENTROPY, max(0.0, -mine)),
        margin=min(MAX_MARGIN, max(-MAX_MARGIN, mine - best_other)),
    )


def _log(probability: float) -> float:
    return max(-2.0 * MAX_MARGIN, math.log(probability)) if probability > 0.0 else -2.0 * MAX_MARGIN


def _shares(classes: Enumeration, distributions: Sequence[Distribution]) -> dict[str, float]:
    """Probability by label, of the newest distribution over these classes."""
    for distribution in reversed(distributions):
        if distribution.field_path == classes.field:
            labelled = ((classes.label_of(text), p) for text, p in distribution.probabilities.items())
            return {label: p for label, p in labelled if label is not None}
    return {}


def _stored(calls: Sequence[Mapping[str, Any]]) -> list[Distribution]:
    """The distributions in the responses of ``calls``, in order."""
    found: list[Distribution] = []
    for call in calls:
        response = call.get("response")
        for one in response if isinstance(response, list | tuple) else [response]:
            found += [Distribution(field, shares) for field, shares in of_response(one).items()]
    return found
