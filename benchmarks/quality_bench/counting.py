"""What reaches an LM, counted by one wrapper for every optimizer, and the metric.

The wrapper stands between ``dspy.LM`` and the engine, so that it sees what is really asked: every retry, every
fallback of an adapter and every completion of ``n``, whoever asks. DSPy's cache is off for all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections import Counter
from typing import Any

import dspy

MAX_TEXT = {"task": 160, "proposer": 600}
"""Largest free text of an answer in characters, by role. Small LMs ramble until the last token; a text cut off there is
no JSON, and a proposal is lost. The bound is in the schema, so that texts end and parse, for every optimizer alike."""
_PLAIN_TOKENS = {"task": 64, "proposer": 256}
"""Bound of an answer without a schema, in tokens."""


class Calls:
    """Calls that reached an engine, per role (``task`` or ``proposer``). Thread-safe.

    Args:
        seed: Of sampled answers; every request without a seed of its own gets one from this, its text and how often
            the same text was asked before, so that a rerun samples the same answers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._counts: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, role: str, request_text: str) -> int:
        """Count one call; returns the seed of its answer."""
        with self._lock:
            self._counts[role] += 1
            number = self._asked[request_text]
            self._asked[request_text] += 1
        digest = hashlib.sha256(f"{self.seed}|{number}|{request_text}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def of(self, role: str) -> int:
        with self._lock:
            return self._counts[role]


class _Counting:
    """What the sync and the async wrapper share. Copies of an LM share it, as they share the engine."""

    def __init__(self, engine: Any, role: str, book: CallBook) -> None:
        self._engine = engine
        self._role = role
        self._book = book

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._engine, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __copy__(self) -> Any:
        return self

    def counted(self, request: Any) -> Any:
        """The request as the engine gets it: counted, bounded, seeded."""
        seed = self._book.calls.add(self._role, f"{self._role}|{request!r}")
        config = request.config
        changes: dict[str, Any] = {}
        if config.seed is None and config.temperature:
            changes["seed"] = seed
        if config.response_format is None:
            changes["max_tokens"] = min(config.max_tokens or 1_000_000, _PLAIN_TOKENS[self._role])
        elif "schema" in config.response_format:
            changes["response_format"] = bounded(config.response_format, MAX_TEXT[self._role])
        return dataclasses.replace(request, config=dataclasses.replace(config, **changes))


class CountingEngine(_Counting):
    """``complete`` for threads."""

    def complete(self, request: Any) -> Any:
        return self._engine.complete(self.counted(request))


class AsyncCountingEngine(_Counting):
    """``complete`` for coroutines."""

    async def complete(self, request: Any) -> Any:
        return await self._engine.complete(self.counted(request))


class CallBook:
    """Holds the ``Calls`` of the run in progress; the engines outlive single runs."""

    def __init__(self) -> None:
        self.calls = Calls()

    def start(self, seed: int) -> Calls:
        """A new count; later calls are added to it."""
        self.calls = Calls(seed)
        return self.calls


def bounded(response_format: Any, length: int) -> Any:
    """The format with ``maxLength`` at every free string of its schema."""

    def bound(part: Any) -> Any:
        if isinstance(part, dict):
            free = part.get("type") == "string" and not {"enum", "const", "maxLength"} & set(part)
            inner = {key: bound(value) for key, value in part.items()}
            return {**inner, "maxLength": length} if free else inner
        return [bound(one) for one in part] if isinstance(part, list) else part

    # The request's own mappings may be read-only: a copy in plain JSON.
    return bound(json.loads(json.dumps(response_format)))


class CountedMetric:
    """Accuracy of the label, counting its calls. Takes the arguments of every DSPy optimizer.

    Args:
        feedback: Return ``dspy.Prediction(score=…, feedback=…)``, as GEPA wants.
    """

    def __init__(self, *, feedback: bool = False) -> None:
        self.calls = 0
        self.feedback = feedback
        self._lock = threading.Lock()

    def __call__(
        self, gold: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> Any:
        with self._lock:
            self.calls += 1
        right = bool(prediction is not None and gold.label == getattr(prediction, "label", None))
        if not self.feedback:
            return right
        said = f"The answer {getattr(prediction, 'label', None)!r} is {'right' if right else 'wrong'}."
        return dspy.Prediction(score=float(right), feedback=said + f" The right label is {gold.label!r}.")
