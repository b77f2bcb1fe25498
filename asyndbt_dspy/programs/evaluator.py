"""Runs candidates on workers' examples: concurrency, timeouts, a rollout cache, and failing workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.utils.usage_tracker import UsageTracker, track_usage

from asyndbt_dspy.core.messages import Evaluate, Outcome, Scored
from asyndbt_dspy.core.space import Candidate
from asyndbt_dspy.errors import MetricError, WorkerFailedError
from asyndbt_dspy.lms.callers import calling_as
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs.rollout import Rollout, RolloutRunner
from asyndbt_dspy.programs.slots import ProgramSpace


@dataclass
class WorkerPart:
    """What the evaluator holds of one worker. The examples stay here.

    Attributes:
        estimate: Examples that estimates are made on.
        held_out: Examples of the final race.
        lm: ``None``: the surrounding one.
        max_concurrency: Rollouts in flight at a time.
        private: Its examples must not appear in any message, errors included.
        shows_estimates: The shard is so small that its demos are estimate examples: a candidate is never scored on an
            example that it shows.
    """

    name: str
    estimate: Sequence[dspy.Example]
    held_out: Sequence[dspy.Example]
    lm: Any = None
    max_concurrency: int = 8
    private: bool = False
    shows_estimates: bool = False


@dataclass
class WorkerUse:
    """What one worker did.

    Attributes:
        calls: Completed rollouts.
        missing: Rollouts lost to the LM or the network.
        failed: Rollouts in which the program or the metric raised.
        reused: Rollouts answered from the rollout cache.
        busy_s: Seconds of rollouts, summed over those in flight together.
        lm_calls, prompt_tokens, completion_tokens: As the LM reported them; answers from a cache are not among them.
        last_error: The newest failure in words.
    """

    calls: int = 0
    missing: int = 0
    failed: int = 0
    reused: int = 0
    busy_s: float = 0.0
    lm_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    last_error: str = ""


CacheKey = tuple[Candidate, str, bool, int]
"""(candidate, worker, held out, example): a worker has one LM, so this names a rollout within a run."""


@dataclass
class _Health:
    """Failures in a row of one worker's LM."""

    in_row: int = 0
    endpoint_in_row: int = 0
    refused_in_row: int = 0


_ENDPOINT_FAILURES = 3
"""An endpoint that refuses the key or does not know the model will not learn: three in a row are enough."""
_REFUSALS = 5
"""Refused examples (too long, filtered) say little of the LM, so it takes ``_REFUSALS * max_failures`` in a row to set a
worker aside; without a bound a shard of nothing else would be asked for ever."""


@dataclass
class ProgramEvaluator:
    """The evaluator of an in-process run (see ``engines.protocols.Evaluator``).

    Attributes:
        programs: Builds programs from candidates.
        parts: Workers by name.
        runner: Runs and scores one program on one example.
        rollout_timeout_s: A rollout that takes longer is missing.
        max_failures: Missing rollouts in a row after which a worker is set aside.
        adapter: DSPy's prompt format; ``None``: the surrounding one.
    """

    programs: ProgramSpace
    parts: Mapping[str, WorkerPart]
    runner: RolloutRunner
    rollout_timeout_s: float = 120.0
    max_failures: int = 8
    adapter: Any = None
    uses: dict[str, WorkerUse] = field(default_factory=dict)
    cache: dict[CacheKey, Outcome] = field(default_factory=dict)
    on_rollout: Callable[[str, Rollout], None] | None = None
    _gates: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    _health: dict[str, _Health] = field(default_factory=dict)

    async def evaluate(self, request: Evaluate) -> Scored:
        """See ``engines.protocols.Evaluator.evaluate``."""
        pairs = [
            (candidate, example)
            for candidate, examples in zip(request.candidates, request.examples, strict=True)
            for example in examples
        ]
        before = self.use(request.worker).calls
        tasks = [
            asyncio.ensure_future(self._outcome(request.worker, candidate, request.held_out, example))
            for candidate, example in pairs
        ]
        try:
            found = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        outcomes = iter(found)
        rows = tuple(tuple(next(outcomes) for _ in examples) for examples in request.examples)
        return Scored(request.worker, request.task, rows, self.use(request.worker).calls - before)

    def use(self, worker: str) -> WorkerUse:
        return self.uses.setdefault(worker, WorkerUse())

    async def _outcome(self, worker: str, candidate: Candidate, held_out: bool, number: int) -> Outcome:
        key = (candidate, worker, held_out, number)
        known = self.cache.get(key)
        if known is not None:
            self.use(worker).reused += 1
            return known
        part = self.parts[worker]
        if (
            part.shows_estimates
            and not held_out
            and number in self.programs.shown_examples(candidate, worker)
        ):
            return Outcome(None)  # copying a demo's answer would look like skill
        example = (part.held_out if held_out else part.estimate)[number]
        rollout = await self.rollout(worker, self.programs.build(candidate), example)
        return self.remember(key, rollout)

    def remember(self, key: CacheKey, rollout: Rollout) -> Outcome:
        """Keep what was paid for, and that an example was refused; what else is missing may be tried again."""
        outcome = Outcome(rollout.score, rollout.cross_entropy)
        if rollout.score is not None or rollout.failure is FailureKind.EXAMPLE:
            self.cache[key] = outcome
        return outcome

    async def rollout(
        self, worker: str, program: dspy.Module, example: dspy.Example, *, trace: bool = False
    ) -> Rollout:
        """One rollout with this worker's LM, within its concurrency, counted and watched.

        Raises:
            WorkerFailedError: the LM of this worker failed ``max_failures`` times in a row.
        """
        part = self.parts[worker]
        gate = self._gates.setdefault(worker, asyncio.Semaphore(part.max_concurrency))
        async with gate:
            self._check_health(worker)
            with calling_as(worker), track_usage() as tracker:
                rollout = await self._timed(part, program, example, trace)
            self._count_usage(worker, tracker)
            self._count(worker, rollout)
        if self.on_rollout is not None:
            self.on_rollout(worker, rollout)
        return rollout

    async def _timed(
        self, part: WorkerPart, program: dspy.Module, example: dspy.Example, trace: bool
    ) -> Rollout:
        """One rollout within its time limit; what goes wrong on a private worker is told without its text."""
        run = self.runner.run(program, example, lm=part.lm, adapter=self.adapter, trace=trace)
        try:
            return await asyncio.wait_for(run, self.rollout_timeout_s)
        except asyncio.TimeoutError:
            late = f"no answer within {self.rollout_timeout_s:g} s"
            return Rollout(None, failure=FailureKind.TRANSIENT, error=late, seconds=self.rollout_timeout_s)
        except MetricError:
            if not part.private:
                raise
        # Raised outside of the handler, so that the first error, which quotes the example, is not its context.
        raise MetricError(
            f"the metric returned no finite number on an example of the private worker {part.name!r}; "
            "make it return a bool or a number for every example"
        )

    def _count(self, worker: str, rollout: Rollout) -> None:
        use = self.use(worker)
        use.busy_s += rollout.seconds
        health = self._health.setdefault(worker, _Health())
        if rollout.error:
            # An error may quote the prompt; of a private worker's only the kind is told.
            private = self.parts[worker].private
            use.last_error = rollout.error.split(":", 1)[0] if private else rollout.error
        if rollout.score is not None:
            use.calls += 1
            use.failed += rollout.failure is FailureKind.PROGRAM
            self._health[worker] = _Health()
            return
        use.missing += 1
        if rollout.failure is FailureKind.EXAMPLE:
            health.refused_in_row += 1
        else:
            health.in_row += 1
            health.endpoint_in_row += rollout.failure is FailureKind.ENDPOINT
        self._check_health(worker)

    def _count_usage(self, worker: str, tracker: UsageTracker) -> None:
        use = self.use(worker)
        for entries in tracker.usage_data.values():
            for entry in entries:
                use.lm_calls += 1
                use.prompt_tokens += int(entry.get("prompt_tokens") or 0)
                use.completion_tokens += int(entry.get("completion_tokens") or 0)

    def _check_health(self, worker: str) -> None:
        health = self._health.setdefault(worker, _Health())
        last = f"the last error: {self.use(worker).last_error}"
        if health.in_row >= self.max_failures or health.endpoint_in_row >= _ENDPOINT_FAILURES:
            raise WorkerFailedError(f"its LM failed {health.in_row} times in a row; {last}")
        if health.refused_in_row >= _REFUSALS * self.max_failures:
            raise WorkerFailedError(f"its LM refused {health.refused_in_row} examples in a row; {last}")
