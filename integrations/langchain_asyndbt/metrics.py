"""Metrics of DSPy and evaluators of LangSmith, as one kind of function."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import dspy

from asyndbt_dspy.errors import MetricError
from langchain_asyndbt.datasets import source_of
from langchain_asyndbt.fields import OUTPUT

LANGSMITH_ARGUMENTS = frozenset({"run", "example", "inputs", "outputs", "reference_outputs", "attachments"})
LANGSMITH_ONLY = frozenset({"run", "outputs", "reference_outputs"})


def as_dspy_metric(metric: Callable[..., Any]) -> Callable[..., Any]:
    """``metric`` as DSPy calls it, ``(gold, prediction)``.

    An evaluator of LangSmith is known by the names of its arguments: ``(run, example)``, or some of ``inputs``,
    ``outputs``, ``reference_outputs``. It may return a number, a bool, ``{"key": …, "score": …}``, an
    ``EvaluationResult``, or several results, whose scores are averaged. It may be ``async``.
    """
    names = _langsmith_arguments(metric)
    if names is None:
        return metric

    def arguments(gold: dspy.Example, prediction: Any) -> dict[str, Any]:
        inputs, reference = source_of(gold)
        output = prediction[OUTPUT]
        outputs = dict(output) if isinstance(output, Mapping) else {OUTPUT: output}
        found = {
            "inputs": inputs,
            "outputs": outputs,
            "reference_outputs": reference,
            "attachments": {},
            "run": SimpleNamespace(
                inputs=inputs, outputs=outputs, error=None, id=None, trace_id=None, child_runs=[]
            ),
            "example": SimpleNamespace(
                inputs=inputs, outputs=reference, metadata={}, id=None, attachments={}
            ),
        }
        return {name: found[name] for name in names}

    async def ascore(returned: Awaitable[Any]) -> Any:
        return _score(await returned, metric)

    def score(gold: dspy.Example, prediction: Any) -> Any:
        # Only the call tells whether a metric is async: it may be an object, or a function around one.
        returned = metric(**arguments(gold, prediction))
        return ascore(returned) if inspect.isawaitable(returned) else _score(returned, metric)

    return score


def _langsmith_arguments(metric: Callable[..., Any]) -> list[str] | None:
    """The arguments to give by name, ``None`` for a metric of DSPy's form."""
    try:
        parameters = inspect.signature(metric).parameters.values()
    except (TypeError, ValueError):
        return None
    required = {
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    known = [p.name for p in parameters if p.name in LANGSMITH_ARGUMENTS]
    is_langsmith = required <= LANGSMITH_ARGUMENTS and LANGSMITH_ONLY & set(known)
    return known if is_langsmith else None


def _score(returned: Any, metric: Callable[..., Any]) -> Any:
    """The number in a result of LangSmith's; what is no such result is left to the optimizer to judge."""
    several = returned.get("results") if isinstance(returned, Mapping) else getattr(returned, "results", None)
    results = several if several is not None else returned
    if isinstance(results, list):
        scores = [_single(result) for result in results]
        if not scores or None in scores:
            raise MetricError(f"evaluator {_name(metric)} returned no scores: {str(returned)[:200]}")
        return sum(scores) / len(scores)
    return _single(returned)


def _single(result: Any) -> Any:
    if isinstance(result, Mapping):
        comment, score = result.get("comment"), result.get("score")
    elif hasattr(result, "score") and not isinstance(result, dspy.Prediction):
        comment, score = getattr(result, "comment", None), result.score
    else:
        return result
    if comment and isinstance(score, bool | int | float):
        return dspy.Prediction(score=float(score), feedback=str(comment))
    return score


def _name(metric: Callable[..., Any]) -> str:
    return repr(getattr(metric, "__name__", type(metric).__name__))
