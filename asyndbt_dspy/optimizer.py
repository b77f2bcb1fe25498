"""``AsynDBT``: the optimizer that users call. It puts the parts together, and nothing else does."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import dspy
from dspy.teleprompt import Teleprompter

from asyndbt_dspy import preparation
from asyndbt_dspy.compilation import Run, prepare
from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.core.config import PRESETS
from asyndbt_dspy.engines.local import LocalEngine
from asyndbt_dspy.engines.protocols import Engine, Recorded, RemoteRollouts
from asyndbt_dspy.engines.simulated import SimulatedEngine, work_delays
from asyndbt_dspy.errors import NoLiveWorkersError
from asyndbt_dspy.lms.call_watch import unwatched
from asyndbt_dspy.lms.endpoints import blocks_a_loop
from asyndbt_dspy.lms.estimates import Estimate
from asyndbt_dspy.lms.prices import Price
from asyndbt_dspy.metering import with_lms_of
from asyndbt_dspy.programs.copies import copy_program, shared_parts
from asyndbt_dspy.reporting import why_set_aside
from asyndbt_dspy.runs.result import Result
from asyndbt_dspy.settings import check_choice, check_settings, with_overrides
from asyndbt_dspy.stopping import StopRequest, stopped_by_interrupt
from asyndbt_dspy.workers import Worker

logger = logging.getLogger(__name__)

AUTO_METRIC_CALLS = {"light": 300, "medium": 1_200, "heavy": 4_000}
"""Metric calls of ``auto``."""
_PAPER_FRAGMENTS = 8
"""Word slots of the paper preset here; the paper's 75 need hundreds of thousands of calls (``fragments=75`` sets them)."""


class AsynDBT(Teleprompter):
    """Asynchronous distributed bilevel tuning of a DSPy program's instructions and demos (arXiv:2602.17694).

    Args:
        metric: ``(gold, prediction) -> bool | float | dspy.Prediction(score=…, feedback=…)``, in [0, 1], higher is better
            (other scales are ranked by, but not read as good and bad runs: a warning says so); may take DSPy's further
            arguments and may be ``async``.
        workers: A number (``trainset`` is split, stratified by label), or a list of ``Worker`` with their own shards, or without
            (``trainset`` is split over those). By default three, fewer where ``trainset`` is too small to give each a minibatch.
        num_threads: Rollouts in flight at a time, of all workers together, at least one for each; ``None``: eight for each. Where
            ``workers`` is a list each has its own ``max_concurrency``.
        requests_per_minute, tokens_per_minute: Of the LMs' endpoint, > 0, where ``workers`` is no list; ``None``: no limit.
        auto: Budget in metric calls: ``light`` 300, ``medium`` 1,200, ``heavy`` 4,000. Ignored where ``budget`` is given.
        budget: Hard caps on metric calls, LM calls, tokens, dollars, seconds; see ``Budget``.
        preset: ``default``, ``paper`` (faithful to the paper) or ``cendbt`` (its centralised form, one worker).
        mode: ``both``, or only ``instructions``, or only ``demos`` (ablations).
        active_workers: S, answers the server waits for. ``"auto"``: as few as the workers' observed speeds and the bound on
            staleness allow, and nobody waits for others; so by default. With another preset, a bound on staleness or
            ``deterministic`` half of the workers.
        max_staleness: tau >= 1, bound on lateness in iterations; 1 is synchronous. ``"auto"``: follows the slowest worker,
            up to four times the preset's.
        deterministic: The order of events does not depend on timing: same seed and same LM answers, same program, unless a
            cap on tokens, dollars or seconds ends the search (which is told): when it does, timing decides.
        seed: Of every random choice.
        instructions: ``{predictor: [texts]}``: instruction arms of your own.
        proposer: LM that writes instruction arms from the program, the data and observed failures; without one, shipped
            guidance sentences are tried.
        tips: Hints for the proposer.
        later_instructions: Instruction arms per predictor that the proposer writes a third of the search in, from what the best
            candidates so far got wrong; they join then and are tried like any other. 0 without a proposer.
        instruction_candidates, demos_per_class, demo_slots, demo_candidates, demo_order, demo_ending, max_demo_tokens, bootstrap,
            fragments: See ``preparation.SearchSpaceOptions``.
        shard_key: ``example -> key``: examples of one key stay on one worker (``workers`` a number).
        engine: Replaces the asyncio engine; ``RayEngine``: workers are actors of a Ray cluster.
        rollout_timeout_s: A rollout that takes longer is missing. Time in which the process itself stood still does not count, nor
            what a rollout waits for here: a rate limit, a place among the calls in flight, a share of the budget, a thread.
        straggler_factor: A rollout that takes so many times its worker's usual time (and a second at least) is left behind once
            two thirds of its unit are in: it counts as missing and as paid for, and its answer is there the next
            time. > 1; ``None``, and under ``deterministic``: every rollout is waited for.
        max_failures: Missing rollouts in a row, of more than one example, after which a worker is set aside.
        max_errors: Rollouts in which program or metric raised, before any has run to its end, after which the compile ends with an
            error; answers that the adapter cannot read and missing ones do not count. ``None``: it never does.
        noisy: Scores of one candidate on one example differ from time to time (an LM judge in the metric, a sampling LM): asking
            again is new evidence for the search, and the race asks again while it is undecided. Needs LMs without
            DSPy's response cache (``cache=False``).
        failure_score: Score of an example on which the program raised, as in ``dspy.Evaluate``.
        loss: What is learned from. ``auto``: where the LMs report a distribution over the labels, how far the right one is ahead,
            and the metric (the right one's cross-entropy in ``preset="paper"``); else ``1 - score``. ``metric``: that always,
            and the race counts the metric alone too.
        progress: Show a progress bar.
        config: Overrides of single constants of the algorithm (see ``docs/notation.md``); they stand also where the arguments
            above leave a choice.
        prices: By model name, for LMs whose price the table does not know (a cap on dollars needs one).
        confirm: Asked with an ``Estimate`` of calls, tokens, dollars and time before any call; ``False`` ends it there.
        run_dir: Folder that keeps everything that is paid for; a run that is killed can go on (``docs/guides/runs.md``).
        resume: Continue the newest run in ``run_dir``; where there is none, start one. The budget may be raised.
        fsync: Wait until the disk has each journal line: safe against the death of the machine, not only of the process.

    Attributes:
        result: ``Result`` of the newest compile, ``None`` before.
        recorded: Its events, in order; replaying them rebuilds the states of server and workers.

    Raises:
        ConfigurationError: a setting that cannot work; raised before any LM call.
    """

    def __init__(
        self,
        metric: Callable[..., Any],
        *,
        workers: int | Sequence[Worker] | None = None,
        num_threads: int | None = None,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        auto: Literal["light", "medium", "heavy"] = "light",
        budget: Budget | None = None,
        preset: Literal["default", "paper", "cendbt"] = "default",
        mode: preparation.Mode = "both",
        active_workers: int | Literal["auto"] | None = None,
        max_staleness: int | Literal["auto"] | None = None,
        deterministic: bool = False,
        seed: int = 0,
        instructions: Mapping[str, Sequence[str]] | None = None,
        proposer: Any = None,
        tips: Sequence[str] = (),
        instruction_candidates: int = 5,
        later_instructions: int = 0,
        demos_per_class: int | None = None,
        demo_slots: int = 4,
        demo_candidates: int | None = None,
        demo_order: bool | None = None,
        demo_ending: bool | None = None,
        max_demo_tokens: int = 400,
        bootstrap: bool | None = None,
        fragments: int | None = None,
        shard_key: Callable[[dspy.Example], Any] | None = None,
        engine: Engine | None = None,
        rollout_timeout_s: float = 120.0,
        straggler_factor: float | None = 8.0,
        max_failures: int = 8,
        max_errors: int | None = 30,
        noisy: bool = False,
        failure_score: float = 0.0,
        loss: Literal["auto", "metric"] = "auto",
        progress: bool = True,
        config: Mapping[str, Any] | None = None,
        prices: Mapping[str, Price] | None = None,
        confirm: Callable[[Estimate], bool] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: bool = False,
        fsync: bool = False,
    ) -> None:
        super().__init__()
        check_choice("preset", preset, PRESETS)
        check_choice("auto", auto, AUTO_METRIC_CALLS)
        check_choice("mode", mode, ("both", "instructions", "demos"))
        check_choice("loss", loss, ("auto", "metric"))
        self.run_dir = run_dir
        self.resume = resume
        self.fsync = fsync
        self.metric = metric
        self.workers = workers
        self.num_threads = num_threads
        self.limits: dict[str, Any] = {
            "requests_per_minute": requests_per_minute,
            "tokens_per_minute": tokens_per_minute,
        }
        self.budget = Budget(metric_calls=AUTO_METRIC_CALLS[auto]) if budget is None else budget
        self.prices = dict(prices or {})
        self.confirm = confirm
        self.preset = preset
        self.seed = seed
        self.deterministic = deterministic
        self.active_workers = active_workers
        self.max_staleness = max_staleness
        self.shard_key = shard_key
        self.engine = engine
        self.rollout_timeout_s = rollout_timeout_s
        self.max_failures = max_failures
        self.max_errors = max_errors
        self.straggler_factor = straggler_factor
        self.noisy = noisy
        self.failure_score = failure_score
        self.loss = loss
        self.progress = progress
        self.overridden = frozenset(config or ())
        implied = ({"repeats": True} if noisy else {}) | ({"race_soft": 0.0} if loss == "metric" else {})
        self.config = with_overrides(PRESETS[preset], implied | dict(config or {}))
        paper = preset != "default"
        self.options = preparation.SearchSpaceOptions(
            mode=mode,
            instructions=instructions,
            proposer=proposer,
            tips=(tips,) if isinstance(tips, str) else tuple(tips),
            instruction_candidates=instruction_candidates,
            later_instructions=later_instructions,
            demos_per_class=demos_per_class,
            demo_slots=demo_slots,
            demo_candidates=(50 if paper else 12) if demo_candidates is None else demo_candidates,
            demo_order=not paper if demo_order is None else demo_order,
            demo_ending=not paper if demo_ending is None else demo_ending,
            max_demo_tokens=max_demo_tokens,
            bootstrap=bootstrap,
            fragments=(_PAPER_FRAGMENTS if paper else 0) if fragments is None else fragments,
        )
        self.result: Result | None = None
        self.recorded: list[Recorded] = []
        self._stops: list[StopRequest] = []
        check_settings(self)

    def get_params(self) -> dict[str, Any]:
        """Plain settings, without LMs, data or results; ``workers`` is ``None`` where the data decide."""
        count = len(self.workers) if isinstance(self.workers, Sequence) else self.workers
        return {
            "preset": self.preset,
            "seed": self.seed,
            "workers": count,
            "budget": dataclasses.asdict(self.budget),
            "deterministic": self.deterministic,
            "mode": self.options.mode,
        }

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example] | None = None,
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
    ) -> dspy.Module:
        """Optimize ``student``; works with and without a running event loop (in a notebook too).

        Args:
            student: Never changed.
            trainset: Examples with inputs declared, for the workers that bring none of their own.
            teacher: Program whose traces become demos (or a list of one, as other optimizers pass it on); default the student.
            valset: Held-out examples of the final race; without it a quarter of the data is kept back, up to half where that is
                fewer than 24.

        Returns:
            A new program with the student's LMs; the student's own form if nothing beat it.

        Raises:
            ConfigurationError: input that cannot work; before any LM call (but for a budget that turns out to count none).
            JournalError: ``run_dir`` is in use, or cannot be read or written.
            ResumeError: ``run_dir`` holds a run of something else.
            KeyboardInterrupt: at the second Ctrl-C; the first one is ``stop``.
            MetricError: the metric returned something that is no number, or one beyond ±1e100.
            ProgramFailedError: program or metric raised ``max_errors`` times before any rollout has run to its end.
            NoLiveWorkersError: every worker was set aside; says why, and carries the best program so far.
        """

        def run() -> dspy.Module:
            return asyncio.run(self.acompile(student, trainset=trainset, teacher=teacher, valset=valset))

        with stopped_by_interrupt(self.stop):
            # Not in an except block: "no running event loop" would be the context of every error of the run.
            if blocks_a_loop():
                return _in_thread(contextvars.copy_context(), run, self._abort)
            return run()

    def stop(self) -> bool:
        """End the compiles of this optimizer early, as one Ctrl-C does. Safe from any thread.

        No rollout begins any more, those in flight end (unless they had no answer yet and only wait for their turn), and the
        best program so far is returned.

        Returns:
            Whether there was a compile to stop.
        """
        stops = list(self._stops)
        for one in stops:
            one.ask()
        return bool(stops)

    def _abort(self) -> None:
        for one in list(self._stops):
            one.abort()

    async def acompile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example] | None = None,
        teacher: dspy.Module | Sequence[dspy.Module] | None = None,
        valset: Sequence[dspy.Example] | None = None,
    ) -> dspy.Module:
        """``compile`` as a coroutine of the running loop."""
        with unwatched():
            return await self._acompile(student, trainset, teacher, valset)

    async def _acompile(
        self,
        student: dspy.Module,
        trainset: Sequence[dspy.Example] | None,
        teacher: dspy.Module | Sequence[dspy.Module] | None,
        valset: Sequence[dspy.Example] | None,
    ) -> dspy.Module:
        self.result, self.recorded = None, []
        held_out = None if valset is None else list(valset)  # a generator may be read once
        stop = StopRequest(
            "Without run_dir= it cannot go on later."
            if self.run_dir is None
            else f"Go on later with run_dir={os.fspath(self.run_dir)!r}, resume=True."
        )
        self._stops.append(stop)
        timer = self._end_in(stop, 0.0)
        try:
            run = await stop.unless_asked(
                prepare(self, student, trainset, teacher, held_out, stop), drop=Run.aclose
            )
            if run is None:  # nothing is known yet that could be better
                return copy_program(student, shared_parts(student))
            self.recorded = run.recorded
            timer.cancel()  # a resumed run has spent a part of its time already
            timer = self._end_in(stop, time.perf_counter() - run.started)
            try:
                await run.search()
            finally:
                await run.aclose()
        finally:
            timer.cancel()
            self._stops.remove(stop)
            if isinstance(self.engine, RemoteRollouts):
                self.engine.stop()
        self.result = run.result()
        program = with_lms_of(student, run.programs.build(run.server.winner, fresh=True))
        if not run.server.live.any():
            raise NoLiveWorkersError(
                f"all {len(run.shards)} workers were set aside: {why_set_aside(run.recorded)}; the best program so far is in "
                "`best_program`",
                best_program=program,
            )
        return program

    def _end_in(self, stop: StopRequest, spent_s: float) -> asyncio.TimerHandle:
        """When the time of the budget is over, the run ends as at one Ctrl-C."""
        seconds = math.inf if self.budget.seconds is None else self.budget.seconds
        return stop.ask_at(seconds - spent_s, f"the {seconds:g} s of the budget are over")

    def make_engine(self) -> Engine:
        """The engine of one run."""
        if self.engine is not None and not isinstance(self.engine, RemoteRollouts):
            return self.engine
        if self.deterministic:
            return SimulatedEngine(work_delays(), eager=True)
        return LocalEngine()


def _in_thread(
    context: contextvars.Context, run: Callable[[], dspy.Module], abort: Callable[[], None]
) -> dspy.Module:
    """Run with its own loop in a thread, where a loop already runs here."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append((context.run(run), None))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            outcome.append((None, error))

    thread = threading.Thread(target=target, name="asyndbt-compile")
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        abort()
        thread.join()
        raise
    program, error = outcome[0]
    if error is not None:
        raise error
    return program  # type: ignore[no-any-return]
