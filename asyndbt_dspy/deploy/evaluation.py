"""Score a saved program on examples: mean score with its interval, cost and latency per call."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import is_retryable_lm_error

from asyndbt_dspy.deploy.artifact import load_artifact
from asyndbt_dspy.errors import ArtifactError, ConfigurationError, MetricError

Z_95 = 1.959964
HISTORY = 10**9
"""More entries than any evaluation makes: DSPy drops old ones, and with them their cost."""


@dataclass(frozen=True)
class Evaluation:
    """How a saved program does.

    Attributes:
        score: Mean of the metric over the examples that could be run; a program that raises scores 0.
        interval: 95 % interval of the mean: Wilson's for scores of 0 and 1, else normal.
        scores: Per example in order; ``None`` where the LM could not be reached.
        failures: Examples on which the program or the metric raised.
        missing: Examples left out because the LM could not be reached (rate limit, timeout, server).
        calls: LM calls, those answered by DSPy's cache included.
        seconds_per_call: Mean, median and 95th percentile of an LM call's duration in seconds.
        seconds_per_example: Mean duration of the program in seconds.
        tokens_per_call: Mean of input and of output tokens; ``None`` where the LM reports none.
        dollars_per_call: Mean cost; ``None`` where it is unknown.
    """

    score: float
    interval: tuple[float, float]
    scores: tuple[float | None, ...]
    failures: int
    missing: int
    calls: int
    seconds_per_call: Mapping[str, float]
    seconds_per_example: float
    tokens_per_call: Mapping[str, float] | None
    dollars_per_call: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def evaluate_artifact(
    path: str | os.PathLike[str],
    data: Sequence[dspy.Example],
    metric: Callable[..., Any],
    *,
    student: dspy.Module | None = None,
    lm: dspy.BaseLM | None = None,
    lms: Mapping[str, dspy.BaseLM] | None = None,
    adapter: dspy.Adapter | None = None,
    num_threads: int = 8,
) -> Evaluation:
    """Load an artifact and run it on ``data``.

    Args:
        path: The artifact's folder.
        data: Examples with their inputs declared, at least one.
        metric: ``(gold, prediction)`` and optionally a trace; plain or ``async``.
        student: See ``load_artifact``.
        lm: For predictors without an own LM; default: that of ``dspy.settings``.
        lms: See ``load_artifact``.
        adapter: Default: that of ``dspy.settings``; it should be the one named in the manifest.
        num_threads: Examples in flight, at least 1.

    Raises:
        ArtifactError: the artifact must not be loaded, or no example could be run.
        ConfigurationError: no examples, or no threads.
        MetricError: the metric returned something that is no finite number.
    """
    if not data or num_threads < 1:
        raise ConfigurationError(f"need examples and num_threads >= 1, got {len(data)} and {num_threads}")
    program = load_artifact(path, student, lms=lms)
    ledger = _Ledger()
    default = ledger.own(lm or dspy.settings.lm)
    for _, predictor in program.named_predictors():
        predictor.lm = ledger.own(predictor.lm)
    settings: dict[str, Any] = {
        "lm": default,
        "callbacks": [*dspy.settings.callbacks, ledger],
        "max_history_size": HISTORY,
        "disable_history": False,
    }
    if adapter is not None:
        settings["adapter"] = adapter
    runner = _Runner(program, metric)
    with dspy.context(**settings), ThreadPoolExecutor(num_threads) as threads:
        # DSPy's settings travel in context variables, which threads do not inherit.
        runs = [threads.submit(contextvars.copy_context().run, runner.run, example) for example in data]
        outcomes = [run.result() for run in runs]
    return _summary(outcomes, ledger)


@dataclass(frozen=True)
class _Outcome:
    score: float | None
    failed: bool
    seconds: float


class _Runner:
    """Runs and scores one example; called from several threads at once."""

    def __init__(self, program: dspy.Module, metric: Callable[..., Any]) -> None:
        self._program = program
        self._metric = metric

    def run(self, example: dspy.Example) -> _Outcome:
        start = time.perf_counter()
        seconds = None
        try:
            prediction = self._call(example.inputs().toDict())
            seconds = time.perf_counter() - start
            returned = self._metric(example, prediction)
            if inspect.isawaitable(returned):
                returned = asyncio.run(_awaited(returned))
        except Exception as error:  # noqa: BLE001 - the user's program and metric may raise anything
            missing = is_retryable_lm_error(error)
            return _Outcome(None if missing else 0.0, not missing, seconds or time.perf_counter() - start)
        return _Outcome(_number(returned), False, seconds)

    def _call(self, inputs: Mapping[str, Any]) -> Any:
        # A module with `aforward` alone cannot be called plainly.
        if not hasattr(type(self._program), "forward"):
            return asyncio.run(self._program.acall(**inputs))
        return self._program(**inputs)


class _Ledger(BaseCallback):
    """Durations of LM calls, and copies of the LMs whose history is this evaluation's alone."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started: dict[str, float] = {}
        self._copies: dict[int, tuple[Any, Any]] = {}

    def own(self, lm: Any) -> Any:
        if lm is None:
            return None
        # The original is kept beside its copy: an id is only unique while its object lives.
        return self._copies.setdefault(id(lm), (lm, lm.copy()))[1]

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._started[call_id] = time.perf_counter()

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        started = self._started.pop(call_id, None)
        if started is not None and exception is None:
            self.seconds.append(time.perf_counter() - started)

    def entries(self) -> list[dict[str, Any]]:
        return [entry for _, copy in self._copies.values() for entry in copy.history]


async def _awaited(value: Any) -> Any:
    return await value


def _number(returned: Any) -> float:
    value = returned.get("score") if isinstance(returned, dspy.Prediction) else returned
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MetricError(
            f"the metric returned {repr(returned)[:200]}; it must return a finite number or a bool"
        )
    return number


def _summary(outcomes: Sequence[_Outcome], ledger: _Ledger) -> Evaluation:
    scores = [outcome.score for outcome in outcomes]
    known = [score for score in scores if score is not None]
    if not known:
        raise ArtifactError(f"none of {len(outcomes)} examples could be run: the LM could not be reached")
    entries = ledger.entries()
    costs = [entry.get("cost") for entry in entries]
    return Evaluation(
        score=statistics.fmean(known),
        interval=mean_interval(known),
        scores=tuple(scores),
        failures=sum(outcome.failed for outcome in outcomes),
        missing=len(scores) - len(known),
        calls=len(entries),
        seconds_per_call=_durations(ledger.seconds),
        seconds_per_example=statistics.fmean(outcome.seconds for outcome in outcomes),
        tokens_per_call=_tokens(entries),
        dollars_per_call=sum(c for c in costs if c is not None) / len(costs)
        if costs and None not in costs
        else None,
    )


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of at least one score: Wilson's where all are 0 or 1, else normal."""
    count, mean = len(scores), statistics.fmean(scores)
    if all(score in (0.0, 1.0) for score in scores):
        shrink = 1 + Z_95**2 / count
        centre = (mean + Z_95**2 / (2 * count)) / shrink
        half = Z_95 / shrink * math.sqrt(mean * (1 - mean) / count + Z_95**2 / (4 * count**2))
    else:
        centre = mean
        half = Z_95 * statistics.stdev(scores) / math.sqrt(count) if count > 1 else math.inf
    return centre - half, centre + half


def _durations(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {"mean": 0.0, "median": 0.0, "p95": 0.0}
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
    return {"mean": statistics.fmean(ordered), "median": statistics.median(ordered), "p95": p95}


def _tokens(entries: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    usages = [entry.get("usage") or {} for entry in entries]
    if not usages or not any(usages):
        return None
    return {
        "input": statistics.fmean(usage.get("prompt_tokens") or 0 for usage in usages),
        "output": statistics.fmean(usage.get("completion_tokens") or 0 for usage in usages),
    }
