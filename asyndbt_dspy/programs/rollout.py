"""One run of a program on one example: scored, timed, and told apart from a run that could not take place."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import time
import traceback
import types
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import dspy
from dspy.utils.exceptions import AdapterParseError

from asyndbt_dspy.errors import MetricError
from asyndbt_dspy.lms.attempts import answers_async
from asyndbt_dspy.lms.call_watch import CallWatch, budget_error, held_back, watching_calls
from asyndbt_dspy.lms.distributions import collect
from asyndbt_dspy.lms.failures import FailureKind, causes, kind_of
from asyndbt_dspy.programs.cross_entropy import right_label
from asyndbt_dspy.programs.metrics import (
    Metric,
    Score,
    bind_metric,
    is_async,
    metric_name,
    read_score,
)

logger = logging.getLogger(__name__)

MAX_THREADS = 64
"""Threads for programs and metrics that are not ``async``. They wait for LMs, so cores are no measure."""

SLOW_METRIC_S = 0.005
"""A plain metric that takes longer than this (an LM judge, say) is kept off the event loop from then on."""

ERROR_CHARACTERS = 2000


@dataclass(frozen=True)
class Rollout:
    """What one run of a program on one example gave.

    Attributes:
        score: Higher is better; the failure score where program or metric failed; ``None`` where the run is
            missing.
        cross_entropy: -ln P(right label), in [0, 10], where the LM reported a distribution over the final
            labels; else ``None``.
        margin: ln P(right label) - ln P(best other label), in [-10, 10], likewise.
        failure: Why it failed, ``None`` for a run that was scored by the metric.
        is_unread: ``True`` where it failed because an answer could not be read, else ``None``.
        error: The failure in words.
        feedback: What the metric said beside the score.
        seconds: Duration of program and metric by the runner's clock.
        trace: (predictor, inputs, prediction) per call of a predictor, if asked for.
        prediction: What the program returned, ``None`` where it failed.
    """

    score: float | None
    cross_entropy: float | None = None
    margin: float | None = None
    failure: FailureKind | None = None
    is_unread: bool | None = None
    error: str | None = None
    feedback: str | None = None
    seconds: float = 0.0
    trace: list[Any] | None = None
    prediction: Any = None


class Runner(Protocol):
    """Runs and scores one program on one example (``RolloutRunner``, here or elsewhere)."""

    def note_paid(self, program: dspy.Module, example: dspy.Example, *, trace: bool = False) -> None:
        """The journal answered this rollout: whoever keeps answers must not give its own for the next one."""
        ...

    async def run(
        self,
        program: dspy.Module,
        example: dspy.Example,
        *,
        lm: Any = None,
        adapter: Any = None,
        trace: bool = False,
    ) -> Rollout: ...

    def close(self) -> None: ...


class RolloutRunner:
    """Runs programs on examples without ever blocking the event loop.

    Args:
        metric: ``(gold, prediction)``, optionally ``trace``, ``pred_name``, ``pred_trace``; plain or
            ``async``.
        failure_score: The score of a run in which program or metric raised, as in ``dspy.Evaluate``.
        clock: Seconds since any fixed point; for ``Rollout.seconds``.
        executor: Threads for what is not ``async``; the runner makes its own where ``None`` (``close`` ends
            those).

    Raises:
        ConfigurationError: the metric cannot take (gold, prediction).
    """

    def __init__(
        self,
        metric: Metric,
        *,
        failure_score: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        executor: Executor | None = None,
    ) -> None:
        self.metric = metric
        self.failure_score = failure_score
        self._score = bind_metric(metric)
        self._metric_is_async = is_async(metric)
        self._metric_is_module = isinstance(metric, dspy.Module)
        # Unknown until it was timed once: the first call runs in a thread.
        self._metric_is_fast = False
        self._metric_was_slow = self._metric_is_module
        self._metric_has_raised = False
        self._program_has_raised = False
        self._clock = clock
        self._executor = executor
        self._owns_executor = executor is None

    async def run(
        self,
        program: dspy.Module,
        example: dspy.Example,
        *,
        lm: dspy.BaseLM | None = None,
        adapter: dspy.Adapter | None = None,
        trace: bool = False,
    ) -> Rollout:
        """Run ``program`` on ``example`` and score it.

        Args:
            program: Predictors that have an LM of their own keep it.
            example: With its inputs declared (``with_inputs``).
            lm: For predictors without an own LM; ``None``: the LM of the surrounding ``dspy.context``.
            adapter: DSPy's prompt format; ``None``: the surrounding one.
            trace: Whether to return the trace.

        Raises:
            MetricError: the metric returned something that is no score.
            BudgetExceededError: a call was refused because a cap is reached, whatever program or metric made of it. Nothing
                was scored.
        """
        with watching_calls() as calls:
            try:
                rollout = await self._run(program, example, lm, adapter, trace, calls)
            except (MetricError, asyncio.CancelledError):
                # Cancelled: out of time, perhaps as it asks again and again for what it will not get.
                if calls.refused is None:
                    raise
        if calls.refused is not None:
            raise calls.refused
        return rollout

    async def _run(
        self,
        program: dspy.Module,
        example: dspy.Example,
        lm: dspy.BaseLM | None,
        adapter: dspy.Adapter | None,
        trace: bool,
        calls: CallWatch,
    ) -> Rollout:
        start = self._clock()
        # DSPy appends every LM call to the history of all its callers: an extra one sees those of this run.
        caller = types.SimpleNamespace(history=[])
        callers = [*(dspy.settings.caller_modules or ()), caller]
        settings: dict[str, Any] = {"trace": [], "caller_modules": callers}
        if lm is not None:
            settings["lm"] = lm
        if adapter is not None:
            settings["adapter"] = adapter
        kept = settings["trace"] if trace else None
        try:
            with dspy.context(**settings), collect() as distributions:
                prediction = await self._call_program(program, example)
        except Exception as error:  # noqa: BLE001 - whatever the user's program raises counts as its failure
            return self._failed(error, calls, start, kept)
        try:
            verdict = await self._call_metric(example, prediction, lm)
        except Exception as error:  # as above, for the user's metric
            if isinstance(error, MetricError) and calls.lost is None:
                raise
            return self._failed(error, calls, start, kept, prediction, is_metrics=True)
        label = right_label(settings["trace"], example, verdict.score, distributions, caller.history)
        return Rollout(
            score=verdict.score,
            cross_entropy=None if label is None else label.cross_entropy,
            margin=None if label is None else label.margin,
            feedback=verdict.feedback,
            seconds=self._clock() - start,
            trace=kept,
            prediction=prediction,
        )

    def note_paid(self, program: dspy.Module, example: dspy.Example, *, trace: bool = False) -> None:
        """No answers are kept here."""

    def close(self) -> None:
        """End the runner's own threads; runs in progress end by themselves."""
        if self._owns_executor and self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    async def _call_program(self, program: dspy.Module, example: dspy.Example) -> Any:
        # As dspy.Evaluate passes them: toDict() would take models, histories and nested examples apart.
        inputs = dict(example.inputs().items())
        if not runs_async(program):
            return await self._in_thread(lambda: program(**inputs))
        # DSPy calls plain tools on the event loop, whatever they wait for.
        if has_plain_tools(program) or (runs_plainly(program) and lms_without_async(program)):
            with dspy.context(allow_tool_async_sync_conversion=True):
                return await self._in_thread(lambda: program(**inputs))
        return await program.acall(**inputs)

    async def _call_metric(self, example: dspy.Example, prediction: Any, lm: dspy.BaseLM | None) -> Score:
        # A judge uses the caller's LM, not the one under optimization; that one only where there is no other.
        settings: dict[str, Any] = {"trace": []}
        if dspy.settings.lm is None:
            settings["lm"] = lm
        with dspy.context(**settings):
            if self._metric_is_async:
                returned = await self._score(example, prediction)
            elif self._metric_is_fast and not self._metric_was_slow:
                returned = self._timed_metric(example, prediction)
            else:
                returned = await self._in_thread(lambda: self._timed_metric(example, prediction))
            if inspect.isawaitable(returned):
                returned = await returned
        return read_score(returned, metric=self.metric, example=example)

    def _timed_metric(self, example: dspy.Example, prediction: Any) -> Any:
        # Real time, whatever the runner's clock: the question is whether the event loop would be held up.
        start = time.perf_counter()
        try:
            return self._score(example, prediction)
        finally:
            is_slow = time.perf_counter() - start > SLOW_METRIC_S
            self._metric_was_slow = self._metric_was_slow or is_slow
            self._metric_is_fast = True

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="asyndbt-rollout")
        context = contextvars.copy_context()
        waiting = contextlib.ExitStack()
        waiting.enter_context(held_back())

        def guarded() -> tuple[Any, Exception | None]:
            waiting.close()  # there is a thread
            # Returned, not raised: a future refuses to carry StopIteration.
            try:
                return context.run(function), None
            except Exception as error:  # noqa: BLE001 - re-raised below, on the loop
                return None, error

        try:
            returned, error = await asyncio.get_running_loop().run_in_executor(self._executor, guarded)
        finally:
            waiting.close()  # cancelled before it had a thread
        if error is not None:
            raise error
        return returned

    def _failed(
        self,
        error: Exception,
        calls: CallWatch,
        start: float,
        trace: list[Any] | None,
        prediction: Any = None,
        *,
        is_metrics: bool = False,
    ) -> Rollout:
        refused = calls.refused or budget_error(error)
        if refused is not None:
            raise refused
        kind = kind_of(error)
        said = f"{type(error).__name__}: {error}"
        if is_metrics:
            said = f"metric {metric_name(self.metric)!r} raised {said}"
        if kind is FailureKind.PROGRAM and calls.lost is not None:
            # What fails after it went on without an answer (dspy.Parallel leaves None in its place) does so for want of it.
            kind = kind_of(calls.lost)
            said = f"{type(calls.lost).__name__}: {calls.lost}; then {said}"
        if kind is FailureKind.PROGRAM:
            self._warn_of(error, is_metrics)
        is_unread = kind is FailureKind.PROGRAM and not is_metrics and _is_unread(error)
        return Rollout(
            score=self.failure_score if kind is FailureKind.PROGRAM else None,
            failure=kind,
            is_unread=is_unread or None,
            error=said[:ERROR_CHARACTERS],
            seconds=self._clock() - start,
            trace=trace,
            prediction=prediction,
        )

    def _warn_of(self, error: Exception, is_metrics: bool) -> None:
        """An answer that does not parse is every small LM's; anything else is more likely a mistake in program or metric."""
        if is_metrics and not self._metric_has_raised:
            self._metric_has_raised = True
            self._warn(f"The metric {metric_name(self.metric)!r}", error)
        is_unparsed = any(isinstance(one, AdapterParseError) for one in causes(error))
        if not (is_metrics or is_unparsed or self._program_has_raised):
            self._program_has_raised = True
            self._warn("The program", error)

    def _warn(self, what: str, error: Exception) -> None:
        # Where, not what: the message may quote an example of a private worker. Rollout.error has it.
        where = traceback.extract_tb(error.__traceback__)[-1]
        logger.warning(
            "%s raised %s (%s, line %s). Such examples count as failures (score %g); this is said once.",
            what,
            type(error).__name__,
            where.filename,
            where.lineno,
            self.failure_score,
        )


def _is_unread(error: BaseException | None) -> bool:
    """Whether an answer that could not be read is the reason; not so for a mistake in what handles one."""
    if error is None or isinstance(error, AdapterParseError):
        return error is not None
    return _is_unread(error.__cause__) or any(map(_is_unread, getattr(error, "exceptions", ())))


def runs_async(program: dspy.Module) -> bool:
    """Whether ``program.acall`` runs what ``program(...)`` runs.

    Not so for a class that overrides ``forward`` of a class that has both: its ``aforward`` is still the
    parent's.
    """
    for cls in type(program).__mro__:
        if "aforward" in vars(cls):
            return "forward" not in vars(program)
        if "forward" in vars(cls):
            return False
    return False


def runs_plainly(program: dspy.Module) -> bool:
    """Whether ``program(...)`` runs: not so with ``aforward`` alone."""
    return hasattr(type(program), "forward") or "forward" in vars(program)


def lms_without_async(program: dspy.Module, lm: Any = None) -> list[dspy.BaseLM]:
    """Those LMs of the program that can be called plainly only. ``lm``: for predictors without one; else the surrounding."""
    default = dspy.settings.lm if lm is None else lm
    found = [default if predictor.lm is None else predictor.lm for _, predictor in program.named_predictors()]
    return [one for one in found if isinstance(one, dspy.BaseLM) and not answers_async(one)]


def has_plain_tools(program: dspy.Module) -> bool:
    """Whether ``program``, which can run in a thread as well, has a tool of the user's that is no coroutine function."""
    if not runs_plainly(program):
        return False
    for _, module in program.named_sub_modules():
        for value in vars(module).values():
            held = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            )
            if any(isinstance(one, dspy.Tool) and _may_block(one.func) for one in held):
                return True
    return False


def _may_block(function: Callable[..., Any]) -> bool:
    if str(getattr(function, "__module__", "")).partition(".")[0] == "dspy":
        return False  # DSPy's own, such as ReAct's "finish"
    return not any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
