"""How a caller reads the distribution over the labels of an enumerated answer.

An engine that scores every label of a `Literal`, `bool` or `Enum` field calls `record`; a caller that wants the
distributions binds a list with `collect` around the call. The list is shared by every task and thread that runs
in a copy of the caller's context, so nested and parallel calls of one rollout land in one list.

An answer from DSPy's response cache never reaches the engine and leaves no record; `of_response` reads the same
distributions from the stored response (`lm.history[i]["response"]`), where the cache keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

# The key under which an engine puts {field: {label: probability}} into Response.provider_data.
PROVIDER_DATA_KEY = "probabilities"


@dataclass(frozen=True)
class Distribution:
    """The distribution over the labels of one enumerated field of one answer.

    Attributes:
        field_path: Name of the output field (the path in the JSON answer).
        probabilities: label -> probability at temperature 1; they sum to one.
    """

    field_path: str
    probabilities: dict[str, float]


_collector: ContextVar[list[Distribution] | None] = ContextVar("asyndbt_label_distributions", default=None)


def record(field_path: str, probabilities: Mapping[str, float]) -> None:
    """Append one distribution to the list bound in the current context; does nothing when none is bound."""
    collected = _collector.get()
    if collected is not None:
        collected.append(Distribution(field_path, dict(probabilities)))


@contextmanager
def collect() -> Iterator[list[Distribution]]:
    """Bind a new list for the calls inside the block and yield it.

    Inner blocks hide outer ones: a distribution is recorded once, in the innermost list.
    """
    collected: list[Distribution] = []
    token = _collector.set(collected)
    try:
        yield collected
    finally:
        _collector.reset(token)


def of_response(response: Any) -> dict[str, dict[str, float]]:
    """The distributions that travel with a response, {field: {label: probability}}; empty when it has none.

    Args:
        response: A `dspy.lm15.Response`, fresh or from DSPy's cache.
    """
    measured = getattr(response, "probabilities", None)
    if measured:
        return {name: dict(labels) for name, labels in measured.items()}
    provider_data = getattr(response, "provider_data", None)
    if not isinstance(provider_data, Mapping):
        return {}
    return {name: dict(labels) for name, labels in provider_data.get(PROVIDER_DATA_KEY, {}).items()}
