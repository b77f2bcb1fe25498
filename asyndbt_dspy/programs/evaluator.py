"""Runs candidates on workers' examples: concurrency, timeouts, a rollout cache, and failing workers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from asyndbt_dspy.core.messages import Evaluate, Outcome, Scored
from asyndbt_dspy.core.space import Candidate
from asyndbt_dspy.errors import BudgetExceededError, MetricError, WorkerFailedError
from asyndbt_dspy.lms.call_watch import CallWatch, watching_calls
from asyndbt_dspy.lms.callers import calling_as
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs.health import Health, OnlyErrors
from asyndbt_dspy.programs.outcomes import as_outcome, as_rollout, nowhere, shared
from asyndbt_dspy.programs.paid_rollouts import (
    PaidRollout,
    RolloutBook,
    RolloutGate,
    RolloutKey,
    WithdrawnError,
)
from asyndbt_dspy.programs.rollout import Rollout, Runner
from asyndbt_dspy.programs.slots import ProgramSpace
from asyndbt_dspy.programs.stragglers import Stragglers, cancelled
from asyndbt_dspy.programs.time_limit import Patience
from asyndbt_dspy.programs.usage import tracking_usage, usage_of


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
class ProgramEvaluator:
    """The evaluator of an in-process run (see ``engines.protocols.Evaluator``).

    Attributes:
        programs: Builds programs from candidates.
        parts: Workers by name.
        runner: Runs and scores one program on one example.
        rollout_timeout_s: A rollout that takes longer is missing. What it waits for here does not count: a rate limit, a place
            among the calls in flight, its share of the budget, a thread.
        max_failures: Missing rollouts in a row after which a worker is set aside.
        errors: Ends the run where program and metric do nothing but raise.
        adapter: DSPy's prompt format; ``None``: the surrounding one.
        straggler_factor: See ``Stragglers``.
        repeats: A rollout that is asked for again is made again: scores are noisy.
        on_answer: Told of each rollout of a candidate.
        is_over: Whether ``end_units`` was called.
        book: Remembers rollouts; ``None``: a rollout is known by its candidate alone.
    """

    programs: ProgramSpace
    parts: Mapping[str, WorkerPart]
    runner: Runner
    rollout_timeout_s: float = 120.0
    max_failures: int = 8
    errors: OnlyErrors = field(default_factory=OnlyErrors)
    adapter: Any = None
    straggler_factor: float | None = None
    repeats: bool = False
    uses: dict[str, WorkerUse] = field(default_factory=dict)
    cache: dict[CacheKey, Outcome] = field(default_factory=dict)
    on_rollout: Callable[[str, Rollout], None] | None = None
    on_answer: Callable[[CacheKey, Rollout], None] | None = None
    on_refused: Callable[[BudgetExceededError], None] | None = None
    on_calls: Callable[[CallWatch, Rollout], None] | None = None
    book: RolloutBook | None = None
    gate: RolloutGate = field(default_factory=RolloutGate)
    _twins: dict[tuple[str, bytes], Outcome | asyncio.Future[Outcome]] = field(default_factory=dict)
    _gates: dict[str, asyncio.Semaphore] = field(default_factory=dict)
    _health: dict[str, Health] = field(default_factory=lambda: defaultdict(Health))
    _left: dict[CacheKey, asyncio.Task[Outcome]] = field(default_factory=dict)
    _left_tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _late: Counter[str] = field(default_factory=Counter)  # completed after they were left behind
    _units: int = 0
    is_over: bool = False

    def __post_init__(self) -> None:
        self._no_units = asyncio.Event()
        self._no_units.set()
        self.stragglers = Stragglers(self.straggler_factor, time.monotonic)
        self._patience = Patience(self.gate, self.stragglers.longest_s)

    async def evaluate(self, request: Evaluate) -> Scored:
        """See ``engines.protocols.Evaluator.evaluate``."""
        if self.is_over:
            await asyncio.Event().wait()  # until the engine, which is about to stop, cancels it
        # Not by their tasks: an engine may have one task per worker, which is over when the run is.
        self._units += 1
        self._no_units.clear()
        try:
            return await self._evaluate(request)
        finally:
            self._units -= 1
            if not self._units:
                self._no_units.set()

    async def end_units(self) -> None:
        """Units under way end with the rollouts that are in, the others are missing; later ones are never answered."""
        self.is_over = True
        self.gate.close()
        await self._no_units.wait()

    async def _evaluate(self, request: Evaluate) -> Scored:
        worker, task = request.worker, request.task
        failure = self.book.failure(worker, task) if self.book is not None else None
        known = self.book.outcomes(worker, task) if self.book is not None else None
        earlier = known if known is not None else nowhere(request) if failure is not None else None
        pairs = [
            (candidate, example, None if earlier is None else earlier[row][column])
            for row, (candidate, examples) in enumerate(
                zip(request.candidates, request.examples, strict=True)
            )
            for column, example in enumerate(examples)
        ]
        before = self._counted(worker)
        tasks = [
            asyncio.ensure_future(self._outcome(worker, candidate, request.held_out, example, outcome))
            for candidate, example, outcome in pairs
        ]
        try:
            left = await self.stragglers.settle(worker, tasks)
            if failure is not None:
                raise WorkerFailedError(failure)
        except WorkerFailedError as error:
            await cancelled(tasks)
            if self.book is not None and failure is None:
                self.book.keep_failure(worker, task, str(error))
            raise
        except BaseException:
            await cancelled(tasks)
            raise
        calls = self._counted(worker) - before
        for one, (candidate, example, _) in zip(tasks, pairs, strict=True):
            if one in left:
                calls += self._leave(one, (candidate, worker, request.held_out, example))
        outcomes = (Outcome(None) if one in left else one.result() for one in tasks)
        rows = tuple(tuple(next(outcomes) for _ in examples) for examples in request.examples)
        return Scored(worker, task, rows, calls)

    def _counted(self, worker: str) -> int:
        """Completed rollouts but for those that were counted when they were left behind."""
        return self.use(worker).calls - self._late[worker]

    def _leave(self, task: asyncio.Task[Outcome], key: CacheKey) -> int:
        """Let a straggler go on by itself. Returns the calls to count: one that only waited for another is none."""
        if key in self._left:
            task.cancel()
            return 0
        self._left[key] = task
        self.leave_behind(task, worker=key[1])
        task.add_done_callback(lambda _: self._left.pop(key, None))
        return 1

    def leave_behind(self, task: asyncio.Task[Any], worker: str = "") -> None:
        """What ``task`` pays for from here on is counted already."""
        self._left_tasks.add(task)
        self.stragglers.give_up_later(worker, task)
        task.add_done_callback(self._left_tasks.discard)
        task.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # its worker's next call says so

    @property
    def left_behind(self) -> int:
        """Rollouts under way that no unit waits for."""
        return len(self._left_tasks)

    async def aclose(self) -> None:
        """End what was left behind, wait until the ledger knows of it, and end the runner's threads."""
        try:
            await cancelled(list(self._left_tasks))
        finally:
            self.runner.close()

    def use(self, worker: str) -> WorkerUse:
        return self.uses.setdefault(worker, WorkerUse())

    async def _outcome(
        self, worker: str, candidate: Candidate, held_out: bool, number: int, earlier: Outcome | None = None
    ) -> Outcome:
        """``earlier``: what it came to in an earlier process, should the worker's journal not know."""
        key = (candidate, worker, held_out, number)
        known = self.cache.get(key)
        if known is not None:
            if self.repeats and known.score is not None:
                del self.cache[key]  # paid for in the setup; the next time it is another toss
            self.use(worker).reused += 1
            return known
        under_way = self._left.get(key)
        if under_way is not None:
            self.stragglers.begin(like=under_way)
            return await shared(under_way)
        part = self.parts[worker]
        if (
            part.shows_estimates
            and not held_out
            and number in self.programs.shown_examples(candidate, worker)
        ):
            return Outcome(None, skipped=True)  # copying a demo's answer would look like skill
        example = (part.held_out if held_out else part.estimate)[number]
        program = self.programs.build(candidate)
        name = self._name(worker, program, example)
        if name is None or not name.is_repeatable:
            found = await self.rollout(worker, program, example, earlier=earlier, is_search=not held_out)
            self._tell(key, found)
            return (
                as_outcome(found) if self.repeats and found.score is not None else self.remember(key, found)
            )
        # Two candidates may be one program: the same demos from other slots, say.
        twin = self._twins.get((worker, name.digest))
        if twin is not None:
            self.use(worker).reused += 1
            self.stragglers.begin()
            outcome = twin if isinstance(twin, Outcome) else await shared(twin)
            return self._keep_outcome(key, outcome, is_answer=outcome.score is not None)
        with self._as_twin(worker, name) as waiting:
            found = await self.rollout(worker, program, example, earlier=earlier, is_search=not held_out)
            self._tell(key, found)
            outcome = self.remember(key, found)
            waiting.set_result(outcome)
        return outcome

    def _tell(self, key: CacheKey, rollout: Rollout) -> None:
        if self.on_answer is not None:
            self.on_answer(key, rollout)

    @contextlib.contextmanager
    def _as_twin(self, worker: str, name: RolloutKey) -> Iterator[asyncio.Future[Outcome]]:
        """While a rollout is under way, others of the same content wait for it."""
        waiting: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._twins[worker, name.digest] = waiting
        try:
            yield waiting
        except Exception as error:
            waiting.set_exception(error)
            waiting.exception()  # nobody need wait for it
            raise
        finally:
            waiting.cancel()
            if self._twins.get((worker, name.digest)) is waiting:
                del self._twins[worker, name.digest]

    def _name(self, worker: str, program: dspy.Module, example: dspy.Example) -> RolloutKey | None:
        if self.book is None:
            return None
        return self.book.key(self.parts[worker].lm or dspy.settings.lm, program, example)

    def remember(self, key: CacheKey, rollout: Rollout) -> Outcome:
        """Keep what was paid for, and that an example was refused; what else is missing may be tried again."""
        outcome = as_outcome(rollout)
        is_answer = rollout.score is not None or rollout.failure is FailureKind.EXAMPLE
        return self._keep_outcome(key, outcome, is_answer=is_answer)

    def _keep_outcome(self, key: CacheKey, outcome: Outcome, *, is_answer: bool) -> Outcome:
        if is_answer:
            self.cache[key] = outcome
        return outcome

    async def rollout(
        self,
        worker: str,
        program: dspy.Module,
        example: dspy.Example,
        *,
        trace: bool = False,
        earlier: Outcome | None = None,
        is_search: bool = False,
    ) -> Rollout:
        """One rollout with this worker's LM, within its concurrency, counted, recorded and watched.

        What was paid for before is answered from the book and counts as if it ran.

        Args:
            earlier: What it came to in an earlier process, should the worker's journal not know.
            is_search: It is not made once the search is over.

        Raises:
            WorkerFailedError: the LM of this worker failed ``max_failures`` times in a row.
            ProgramFailedError: program and metric did nothing but raise so far.
        """
        part = self.parts[worker]
        name = self._name(worker, program, example)
        recalled = self._recalled(worker, name, program, example, trace, earlier)
        if recalled is not None:
            return recalled
        gate = self._gates.setdefault(worker, asyncio.Semaphore(part.max_concurrency))
        async with gate, self.gate as may_begin:
            if not may_begin or (is_search and self.gate.is_search_over):
                return Rollout(None)  # as where the budget refuses the call
            self._check_health(worker)
            self.stragglers.begin()
            try:
                with calling_as(worker), tracking_usage() as tracker:
                    rollout = await self._timed(part, program, example, trace, is_search)
            except BudgetExceededError as error:
                if self.on_refused is None:
                    raise
                self.on_refused(error)
                return Rollout(None)  # no call was made: neither a score nor a failure of the worker
            except WithdrawnError:
                was_withdrawn = True
            else:
                was_withdrawn = False
                self._book(part, name, program, example, rollout, usage_of(tracker))
        if was_withdrawn:  # to the gate, where those wait that have not begun
            return await self.rollout(worker, program, example, trace=trace, is_search=is_search)
        self._note_twin(worker, name, rollout)
        if self.on_rollout is not None:
            self.on_rollout(worker, rollout)
        return rollout

    def _book(
        self,
        part: WorkerPart,
        name: RolloutKey | None,
        program: dspy.Module,
        example: dspy.Example,
        rollout: Rollout,
        usage: tuple[int, int, int],
    ) -> None:
        """Record and count a rollout that was made."""
        worker = part.name
        if self.book is not None and name is not None:
            self.book.keep(worker, name, program, PaidRollout(rollout, usage))
        self._count_usage(worker, usage)
        self._count(worker, example, rollout)
        self.errors.note(rollout, self._told(worker, rollout))
        self.stragglers.note(worker, rollout.seconds)
        if rollout.score is not None and asyncio.current_task() in self._left_tasks:
            self._late[worker] += 1
        self._check_health(worker)

    def recall(
        self, worker: str, program: dspy.Module, example: dspy.Example, *, trace: bool = False
    ) -> Rollout | None:
        """What was paid for in an earlier process or run, counted as if it ran; ``None`` where nothing was."""
        return self._recalled(worker, self._name(worker, program, example), program, example, trace, None)

    def _recalled(
        self,
        worker: str,
        name: RolloutKey | None,
        program: dspy.Module,
        example: dspy.Example,
        trace: bool,
        earlier: Outcome | None,
    ) -> Rollout | None:
        paid = None
        if self.book is not None and name is not None:
            paid = self.book.take(worker, name, program, trace)
        if paid is None and earlier is not None:
            if earlier.score is None:  # refused by the budget, or cut short: that is in no worker's journal
                return Rollout(None)
            paid = PaidRollout(as_rollout(earlier))
        if paid is None:
            return None
        with calling_as(worker):
            self.runner.note_paid(program, example, trace=trace)
        return self._paid(worker, name, program, example, paid)

    def _paid(
        self,
        worker: str,
        name: RolloutKey | None,
        program: dspy.Module,
        example: dspy.Example,
        paid: PaidRollout,
    ) -> Rollout:
        """Count what was paid for before. A worker that it shows to fail was set aside then, and is again."""
        self._count_usage(worker, paid.usage)
        self._count(worker, example, paid.rollout)
        self.use(worker).reused += paid.is_shared
        if not paid.is_recorded:  # an earlier run's; what is recorded in this one was noted at its start
            self.errors.note(paid.rollout, self._told(worker, paid.rollout))
        if not paid.is_recorded and self.book is not None and name is not None:
            self.book.keep(worker, name, program, paid)
        self._note_twin(worker, name, paid.rollout)
        return paid.rollout

    def _note_twin(self, worker: str, name: RolloutKey | None, rollout: Rollout) -> None:
        if name is not None and name.is_repeatable and rollout.score is not None:
            self._twins[worker, name.digest] = as_outcome(rollout)

    async def _timed(
        self, part: WorkerPart, program: dspy.Module, example: dspy.Example, trace: bool, is_search: bool
    ) -> Rollout:
        """One rollout within its time limit; what goes wrong on a private worker is told without its text."""
        run = self.runner.run(program, example, lm=part.lm, adapter=self.adapter, trace=trace)
        try:
            with watching_calls(asyncio.get_running_loop().time, hand_on=True) as calls:
                found = await self._patience.within(
                    self.rollout_timeout_s, run, calls, part.name, is_search=is_search
                )
                if self.on_calls is not None:
                    self.on_calls(calls, found)
                return found
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

    def _count(self, worker: str, example: dspy.Example, rollout: Rollout) -> None:
        use = self.use(worker)
        use.busy_s += rollout.seconds
        use.last_error = self._told(worker, rollout) or use.last_error
        if rollout.score is not None:
            use.calls += 1
            use.failed += rollout.failure is FailureKind.PROGRAM
            self._health[worker] = Health()
            return
        use.missing += 1
        self._health[worker].note(example, rollout.failure)

    def _told(self, worker: str, rollout: Rollout) -> str:
        """Its error; it may quote the prompt, so of a private worker's only the kind is told."""
        error = rollout.error or ""
        return error.split(":", 1)[0] if self.parts[worker].private else error

    def note_recorded(self, rollouts: Iterable[tuple[str, Rollout]]) -> None:
        """What earlier processes of the run recorded, by worker: where all of it are errors, nothing more is paid for."""
        for worker, rollout in rollouts:
            self.errors.note(rollout, self._told(worker, rollout))

    def _count_usage(self, worker: str, usage: tuple[int, int, int]) -> None:
        use = self.use(worker)
        use.lm_calls += usage[0]
        use.prompt_tokens += usage[1]
        use.completion_tokens += usage[2]

    def _check_health(self, worker: str) -> None:
        self.errors.check()
        self._health[worker].check(self.max_failures, self.use(worker).last_error)
