"""Calling the user's metric, whatever its form, and reading what it returns."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import dspy

from asyndbt_dspy.errors import ConfigurationError, MetricError

Metric = Callable[..., Any]
"""``(gold, prediction)``, optionally more arguments, plain or ``async``; see ``read_score`` for results."""

METRIC_ARGUMENTS = 2
EXCERPT_CHARACTERS = 300
MAX_SCORE = 1e100
"""Largest magnitude of a score: squares of scores are summed, and a number ends at 1e308."""


@dataclass(frozen=True)
class Score:
    """A metric's verdict: ``score`` is within ``MAX_SCORE``, higher is better; ``feedback`` explains it, if given."""

    score: float
    feedback: str | None = None


def metric_name(metric: Metric) -> str:
    """A name to print in messages."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    return getattr(metric, "__name__", None) or type(metric).__name__


def bind_metric(metric: Metric) -> Callable[[Any, Any], Any]:
    """``metric`` as a function of (gold, prediction); ``trace``, ``pred_name`` and ``pred_trace`` become
    ``None``.

    A metric sees the same arguments whether or not the caller records a trace, since many metrics are
    stricter where they are given one, and scores of one run must be comparable.

    Raises:
        ConfigurationError: not callable, or unable to take (gold, prediction).
    """
    if not callable(metric):
        raise ConfigurationError(
            f"metric must be a function of (gold, prediction), got {type(metric).__name__}"
        )
    # A dspy.Module (dspy.SemanticF1, …) declares its arguments in `forward` or `aforward`; its `__call__` takes anything.
    declaring = _body(metric) if isinstance(metric, dspy.Module) else metric
    try:
        declared = inspect.signature(declaring)
    except (TypeError, ValueError):
        return metric
    parameters = list(declared.parameters.values())
    if isinstance(metric, dspy.Module):
        _check_module(metric, [parameter.name for parameter in parameters[1:]])
        return cast(Metric, metric.acall if _is_awaited(metric) else metric)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(positional) < METRIC_ARGUMENTS and not takes_any:
        raise ConfigurationError(
            f"metric {metric_name(metric)!r} takes {len(positional)} arguments; it must take "
            f"(gold, prediction) and may take trace, pred_name and pred_trace after them"
        )
    padding = (None,) * max(0, required - METRIC_ARGUMENTS)
    named = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    if not padding and not named:
        return metric
    return lambda gold, prediction: metric(gold, prediction, *padding, **named)


def is_async(metric: Metric) -> bool:
    """Whether calling ``metric`` returns at once with something to await."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    return (
        _is_awaited(metric)
        or inspect.iscoroutinefunction(metric)
        or inspect.iscoroutinefunction(type(metric).__call__)
    )


def read_score(returned: Any, *, metric: Metric, example: Any) -> Score:
    """The score in what a metric returned.

    Args:
        returned: A bool, float, int, NumPy scalar, or ``dspy.Prediction(score=…, feedback=…)`` such as
            ``ScoreWithFeedback``.
        metric: For the message.
        example: For the message.

    Raises:
        MetricError: anything else, ``None``, NaN, or a number beyond ``MAX_SCORE``.
    """
    number: float | None
    feedback: Any = None
    if isinstance(returned, dspy.Prediction):
        number, feedback = _number(returned.get("score")), returned.get("feedback")
    else:
        number = _number(returned)
    if number is None or not math.isfinite(number):
        wanted = "a finite number, a bool, or dspy.Prediction(score=<number>, feedback=<text>)"
    elif abs(number) > MAX_SCORE:
        wanted = f"a number within ±{MAX_SCORE:g}, at best one in [0, 1]"
    else:
        return Score(number, None if feedback is None else str(feedback))
    raise MetricError(
        f"metric {metric_name(metric)!r} returned {excerpt(returned)} for {excerpt(example)}; it must return {wanted}"
    )


def excerpt(value: Any) -> str:
    """``repr(value)``, cut after 300 characters."""
    text = repr(value)
    return text if len(text) <= EXCERPT_CHARACTERS else text[:EXCERPT_CHARACTERS] + "…"


def _is_awaited(metric: Any) -> bool:
    """Whether ``metric`` is a module that can be awaited only."""
    return isinstance(metric, dspy.Module) and not hasattr(type(metric), "forward")


def _body(metric: dspy.Module) -> Callable[..., Any]:
    """What a call of the module runs."""
    body = getattr(type(metric), "aforward" if _is_awaited(metric) else "forward", None)
    if body is None:
        raise ConfigurationError(
            f"metric {metric_name(metric)!r} is a module without forward and aforward; give it one that takes "
            "(gold, prediction)"
        )
    return cast(Callable[..., Any], body)


def _check_module(metric: dspy.Module, names: list[str]) -> None:
    """A module takes (gold, prediction) like ``forward(self, example, pred, trace=None)``, or ``aforward``."""
    if len(names) < METRIC_ARGUMENTS:
        raise ConfigurationError(
            f"metric {metric_name(metric)!r} is a module whose {_body(metric).__name__} takes {names}; "
            f"it must take (gold, prediction)"
        )


def _number(value: Any) -> float | None:
    if not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
    except OverflowError:  # an int beyond all floats
        return math.inf
