"""A loss finer than right or wrong: how probable the LM found the right label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from asyndbt_dspy.lms.distributions import Distribution, of_response
from asyndbt_dspy.programs.labels import Enumeration, enumeration

MAX_CROSS_ENTROPY = 10.0
"""In nats. One hopeless example must not outweigh a whole minibatch."""

RIGHT_SCORE = 0.5
"""A score of at least this says that the metric takes the answer for right."""


def cross_entropy(
    trace: Sequence[tuple[dspy.Predict, Any, Any]],
    example: dspy.Example,
    score: float,
    distributions: Sequence[Distribution],
    calls: Sequence[Mapping[str, Any]] = (),
) -> float | None:
    """-ln P(right label) of the run's last answer.

    Args:
        trace: The run's trace; its last entry is the final answer.
        example: Holds the right label as a field that is not an input.
        score: The metric's verdict on the run.
        distributions: What the LM reported during the run, in order.
        calls: DSPy's history entries of the run's LM calls. An answer from DSPy's cache reports nothing, but
            its stored response holds the distributions.

    Returns:
        A number in [0, 10], or ``None`` where the last answer has no enumerated field, the example lacks its
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
    probability = _probability(classes, right, _stored(calls) or distributions)
    if probability is None:
        return None
    return (
        MAX_CROSS_ENTROPY if probability <= 0.0 else min(MAX_CROSS_ENTROPY, max(0.0, -math.log(probability)))
    )


def _probability(classes: Enumeration, label: str, distributions: Sequence[Distribution]) -> float | None:
    for distribution in reversed(distributions):
        if distribution.field_path == classes.field:
            shares = (p for text, p in distribution.probabilities.items() if classes.label_of(text) == label)
            return next(shares, None)
    return None


def _stored(calls: Sequence[Mapping[str, Any]]) -> list[Distribution]:
    """The distributions in the responses of ``calls``, in order."""
    found: list[Distribution] = []
    for call in calls:
        response = call.get("response")
        for one in response if isinstance(response, list | tuple) else [response]:
            found += [Distribution(field, shares) for field, shares in of_response(one).items()]
    return found
