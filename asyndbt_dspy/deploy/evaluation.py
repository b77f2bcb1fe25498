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
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import dspy
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import AdapterParseError

from asyndbt_dspy.deploy.artifact import load_artifact
from asyndbt_dspy.errors import ArtifactError, ConfigurationError, MetricError
from asyndbt_dspy.lms.failures import FailureKind, kind_of
from asyndbt_dspy.programs.checks import check_examples
from asyndbt_dspy.programs.metrics import bind_metric, excerpt, metric_name, read_score

Z_95 = 1.959964
NO_LM = "No LM is loaded"
"""How DSPy's ``ValueError`` begins where a predictor has no LM."""


@dataclass(frozen=True)
class Evaluation:
    """How a saved program does.

    Attributes:
        score: Mean of the metric over the examples that could be run; a program that raises scores 0.
        interval: 95 % interval of the mean: Wilson's for scores of 0 and 1, else normal.
        scores: Per example in order; ``None`` where it is missing.
        errors: Per example in order, class and beginning of the text of what was raised; ``None`` where nothing was.
        failures: Examples on which the program or the metric raised.
        missing: Examples left out, as in ``compile``, because the LM could not be reached (rate limit, timeout,
            server, no valid key, unknown model) or refused them (content filter, context too long).
        calls: The program's LM calls, whichever LM it asks, those answered by DSPy's cache included. Those of the
            metric are not counted, here or below.
        seconds_per_call: Mean, median and 95th percentile of an LM call's duration in seconds.
        seconds_per_example: Mean duration of the program in seconds.
        tokens_per_call: Mean of input and of output tokens; ``None`` where the LM reports none.
        dollars_per_call: Mean cost; ``None`` where it is unknown.
    """

    score: float
    interval: tuple[float, float]
    scores: tuple[float | None, ...]
    errors: tuple[str | None, ...]
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
        data: Examples with their inputs declared, at least one; checked as a compile checks them.
        metric: As for ``compile``: ``(gold, prediction)`` and optionally a trace, which is ``None``; plain or
            ``async``.
        student: See ``load_artifact``.
        lm: For predictors without an own LM; default: that of ``dspy.settings``.
        lms: See ``load_artifact``.
        adapter: Default: that of ``dspy.settings``. A warning is logged where the manifest names another one.
        num_threads: Examples in flight, at least 1.

    Raises:
        ArtifactError: the artifact must not be loaded, or no example could be run: all are missing, or the program
            raised on each. (Answers that came and do not parse are a measured 0.)
        ConfigurationError: no examples or no inputs, no LM, no threads, a metric that cannot take (gold, prediction),
            or ``lms`` of predictors that there are not.
        MetricError: the metric returned something that is no finite number, or it raised wherever it was asked.
    """
    if num_threads < 1:
        raise ConfigurationError(f"need num_threads >= 1, got {num_threads}")
    data = list(data)
    ledger = _Ledger()
    runner = _Runner(metric, ledger)
    default = lm or dspy.settings.lm
    with (
        dspy.context(lm=default, adapter=adapter or dspy.settings.adapter),
        ThreadPoolExecutor(num_threads) as threads,
    ):
        program = load_artifact(path, student, lms=lms)
        check_examples(program, data, name="data")
        # DSPy's settings travel in context variables, which threads do not inherit.
        runs = [
            threads.submit(contextvars.copy_context().run, runner.run, program, example) for example in data
        ]
        outcomes = [run.result() for run in runs]
    _check_lm(program, default, outcomes)
    _check_measured(outcomes, metric)
    return _summary(outcomes, ledger)


@dataclass(frozen=True)
class _Outcome:
    score: float | None
    seconds: float
    error: Exception | None = None
    metric_raised: bool = False


class _Runner:
    """Runs and scores one example; called from several threads at once."""

    def __init__(self, metric: Callable[..., Any], ledger: _Ledger) -> None:
        self._metric = metric
        self._ledger = ledger
        self._score = bind_metric(metric)

    def run(self, program: dspy.Module, example: dspy.Example) -> _Outcome:
        start = time.perf_counter()
        try:
            # Not `toDict`, which makes dicts of models, histories and nested examples.
            with self._ledger.open():
                prediction = _call(program, dict(example.inputs().items()))
        except Exception as error:  # noqa: BLE001 - the user's program may raise anything
            return _failed(error, time.perf_counter() - start)
        seconds = time.perf_counter() - start
        try:
            returned = self._score(example, prediction)
            if inspect.isawaitable(returned):
                returned = asyncio.run(_awaited(returned))
        except Exception as error:  # noqa: BLE001 - as above, for the user's metric
            return _failed(error, seconds, metric_raised=True)
        return _Outcome(read_score(returned, metric=self._metric, example=example).score, seconds)


def _call(program: dspy.Module, inputs: Mapping[str, Any]) -> Any:
    # A module with `aforward` alone cannot be called plainly.
    if not hasattr(type(program), "forward"):
        return asyncio.run(program.acall(**inputs))
    return program(**inputs)


def _failed(error: Exception, seconds: float, *, metric_raised: bool = False) -> _Outcome:
    missing = kind_of(error) is not FailureKind.PROGRAM
    return _Outcome(None if missing else 0.0, seconds, error, metric_raised)


class _Ledger(BaseCallback):
    """Durations and records of all LM calls inside ``open``, whichever LM is asked."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.history = _Entries()
        self._started: dict[str, float] = {}

    def open(self) -> AbstractContextManager[Any]:
        """Inside, LM calls are recorded.

        DSPy writes each call down for the LM and for the modules that it is made in, and a callback is not told what it
        cost: so this stands among the modules. test_comparison_and_evaluation.py fails if DSPy moves that.
        """
        return dspy.context(
            callbacks=[*dspy.settings.callbacks, self],
            caller_modules=[*(dspy.settings.caller_modules or ()), self],
            max_history_size=max(1, dspy.settings.max_history_size),
            disable_history=False,
        )

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        self._started[call_id] = time.perf_counter()

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        started = self._started.pop(call_id, None)
        if started is not None and exception is None:
            self.seconds.append(time.perf_counter() - started)


class _Entries:
    """A history of which DSPy drops no old entries, and with them their cost: it never seems full."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return 0

    def append(self, entry: dict[str, Any]) -> None:
        self.kept.append(entry)


async def _awaited(value: Any) -> Any:
    return await value


def _check_lm(program: dspy.Module, default: Any, outcomes: Sequence[_Outcome]) -> None:
    """Say that there is no LM, where that is why every example failed: a program may also bring one while it runs."""
    unset = [name for name, predictor in program.named_predictors() if predictor.lm is None]
    if default is None and unset and all(NO_LM in str(outcome.error) for outcome in outcomes):
        raise ConfigurationError(
            f"no LM for the predictors {unset}: none is set by dspy.configure or dspy.context; give lm=…"
        )


def _check_measured(outcomes: Sequence[_Outcome], metric: Callable[..., Any]) -> None:
    """Refuse a score where nothing was measured: it would look like that of a bad program."""
    known = [outcome for outcome in outcomes if outcome.score is not None]
    if not known:
        error = outcomes[0].error
        raise ArtifactError(
            f"none of {len(outcomes)} examples could be run: the LM could not be reached or refused them "
            f"({type(error).__name__})"
        ) from error
    errors = [outcome.error for outcome in known if outcome.error is not None]
    if len(errors) < len(known):
        return
    raised = [outcome.error for outcome in known if outcome.metric_raised]
    if raised:
        raise MetricError(
            f"metric {metric_name(metric)!r} raised for each of the {len(raised)} predictions that it was given: "
            f"{excerpt(raised[0])}"
        ) from raised[0]
    # An answer that came and cannot be read is the program's, and measured.
    if not any(isinstance(error, AdapterParseError) for error in errors):
        raise ArtifactError(
            f"the program raised on each of the {len(known)} examples that could be run, so nothing was measured: "
            f"{excerpt(errors[0])}"
        ) from errors[0]


def _summary(outcomes: Sequence[_Outcome], ledger: _Ledger) -> Evaluation:
    scores = [outcome.score for outcome in outcomes]
    known = [score for score in scores if score is not None]
    entries = ledger.history.kept
    costs = [entry.get("cost") for entry in entries]
    return Evaluation(
        score=statistics.fmean(known),
        interval=mean_interval(known),
        scores=tuple(scores),
        errors=tuple(None if o.error is None else excerpt(o.error) for o in outcomes),
        failures=sum(o.score is not None and o.error is not None for o in outcomes),
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
        # It holds the mean and lies within [0, 1], but for rounding.
        return max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))
    half = Z_95 * statistics.stdev(scores) / math.sqrt(count) if count > 1 else math.inf
    return mean - half, mean + half


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
