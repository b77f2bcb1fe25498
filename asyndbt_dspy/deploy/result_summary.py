"""Scores and spending out of ``optimizer.result``, for the manifest: numbers only, never texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyndbt_dspy.deploy.public_state import numbers_only

CANDIDATE_NUMBERS = ("score", "low", "high", "examples", "advantage", "advantage_error")
SPENT_NUMBERS = ("metric_calls", "seconds", "dollars")
WORKER_NUMBERS = ("lm_calls", "prompt_tokens", "completion_tokens", "missing", "failed")
SCORE_WORDS = ("score", "interval")
SPENT_WORDS = ("calls", "tokens", "dollars", "seconds", "spent", "cost")


def summarize_result(result: Any) -> dict[str, Any]:
    """``{"scores": …, "budget": …}`` for the manifest.

    Args:
        result: ``optimizer.result`` or its ``to_dict()``: the scores of the student and of the winner with their
            95 % intervals, and what was spent. Any other mapping: its top-level numbers whose names speak of
            scores or of spending. ``None`` gives ``None`` for both.
    """
    if result is None:
        return {"scores": None, "budget": None}
    data = result if isinstance(result, Mapping) else result.to_dict()
    if isinstance(data.get("candidates"), list | tuple):
        return {"scores": _scores(data), "budget": _spent(data)}
    return {"scores": _matching(data, SCORE_WORDS), "budget": _matching(data, SPENT_WORDS)}


def _scores(data: Mapping[str, Any]) -> dict[str, Any] | None:
    found = {}
    for candidate in data["candidates"]:
        numbers = {name: candidate.get(name) for name in CANDIDATE_NUMBERS}
        if candidate.get("name") == "student":
            found["student"] = numbers_only(numbers)
        if candidate.get("won"):
            found["optimized"] = numbers_only(numbers)
    return found or None


def _spent(data: Mapping[str, Any]) -> dict[str, Any] | None:
    spent = {name: data.get(name) for name in SPENT_NUMBERS}
    for name in WORKER_NUMBERS:
        counts = [worker.get(name) for worker in data.get("workers") or ()]
        known = [count for count in counts if count is not None]
        spent[name] = sum(known) if known else None
    allowed = (data.get("settings") or {}).get("budget")
    return numbers_only({**spent, "allowed": allowed if isinstance(allowed, Mapping) else None})  # type: ignore[no-any-return]


def _matching(data: Mapping[str, Any], words: tuple[str, ...]) -> dict[str, Any] | None:
    kept = {
        key: numbers_only(value)
        for key, value in data.items()
        if isinstance(key, str) and any(word in key for word in words)
    }
    return {key: value for key, value in kept.items() if value is not None} or None
