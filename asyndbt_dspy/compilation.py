"""From ``AsynDBT.compile``'s arguments to machines that can run: probes, demos, instruction arms, server and workers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dspy

from asyndbt_dspy import preparation, sharding
from asyndbt_dspy.bootstrapping import MOST_OF_SEARCH, make_demos
from asyndbt_dspy.choices import tell_of_no_choice
from asyndbt_dspy.core.config import AlgorithmConfig, resolve
from asyndbt_dspy.core.messages import StopSearch
from asyndbt_dspy.core.policies import WorkerSpace
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.meter import RunMeter
from asyndbt_dspy.engines.protocols import Engine, ListeningEngine, Recorded, RemoteRollouts, ResumableEngine
from asyndbt_dspy.later_instructions import ASKED_AFTER, LaterInstructions
from asyndbt_dspy.lms.estimates import WorkerPlan
from asyndbt_dspy.lms.identity import is_deterministic
from asyndbt_dspy.metering import PROPOSER, Metering, affordable, confirm, make_plans, measured_plans
from asyndbt_dspy.programs import checks
from asyndbt_dspy.programs.evaluator import ProgramEvaluator
from asyndbt_dspy.programs.health import OnlyErrors
from asyndbt_dspy.programs.rollout import Rollout, RolloutRunner, Runner
from asyndbt_dspy.programs.slots import ProgramSpace, demo_slots
from asyndbt_dspy.race_share import RaceShare
from asyndbt_dspy.recording.opening import open_book, space_digest
from asyndbt_dspy.recording.recorder import KeysOnly, RunRecorder
from asyndbt_dspy.recording.rollout_cap import hold_cap
from asyndbt_dspy.remote import RemoteRunner, elsewhere
from asyndbt_dspy.reporting import make_result
from asyndbt_dspy.runs.observers import CurveRecorder, ProgressBar
from asyndbt_dspy.runs.result import Result
from asyndbt_dspy.settings import check_data
from asyndbt_dspy.setup_rollouts import Asked, SetupRollouts
from asyndbt_dspy.stopping import StopRequest
from asyndbt_dspy.workers import Worker

if TYPE_CHECKING:
    from asyndbt_dspy.optimizer import AsynDBT

logger = logging.getLogger(__name__)

_REPLAY = "replay"
_STILL_TURNS = 50
"""Turns of the event loop; from one recorded answer to the next it is a few."""
_DEMO_TOKENS = 60
"""Of one demo, where nothing is known of it."""


async def prepare(
    optimizer: AsynDBT,
    student: dspy.Module,
    trainset: Sequence[dspy.Example] | None,
    teacher: dspy.Module | Sequence[dspy.Module] | None,
    valset: Sequence[dspy.Example] | None,
    stop: StopRequest | None = None,
    metering: Metering | None = None,
) -> Run:
    stop = stop or StopRequest("")
    metering = metering or make_metering(optimizer)
    started = time.perf_counter()
    checks.check_student(student)
    teacher = checks.only_teacher(teacher)
    workers = sharding.make_workers(
        optimizer.workers,
        trainset,
        student,
        optimizer.config,
        shard_key=optimizer.shard_key,
        has_valset=bool(valset),
        seed=optimizer.seed,
        num_threads=optimizer.num_threads,
        limits=optimizer.limits,
    )
    own_data = {one.name for one in _listed(optimizer) if one.trainset is not None}
    if isinstance(optimizer.engine, RemoteRollouts):
        workers = await elsewhere(
            optimizer.engine, optimizer.budget, student, teacher, workers, optimizer.metric
        )
    if teacher is not None:
        checks.check_teacher(student, teacher)
    check_data(optimizer, student, workers, valset)
    config = make_config(optimizer, len(workers))
    needs_pool = optimizer.options.mode != "instructions"
    shards = sharding.split_shards(
        workers,
        valset,
        student,
        config,
        needs_pool=needs_pool,
        seed=optimizer.seed,
        dealt_to={one.name for one in workers} - own_data,
        is_fixed="minibatch" in optimizer.overridden,
    )
    surrounding = metering.answering_lm()
    lms = {worker.name: metering.worker_lm(worker, surrounding) for worker in workers}
    for program in (student, teacher):
        if program is not None:
            checks.check_lms(program, lms)
    if None in lms.values():
        metering.check_own_models(student, teacher)
    called = _Metered(
        lms,
        metering.program(student, is_student=True),
        None if teacher is None else metering.program(teacher),
        metering.lm(optimizer.options.proposer, PROPOSER),
    )
    surroundings = metering.surroundings()
    plans = make_plans(metering, student, shards, surrounding, demo_tokens=_demo_tokens(optimizer, student))
    confirm(optimizer.confirm, plans)
    book = open_book(optimizer, student, teacher, workers, valset, config)
    book.join_ledger(metering.ledger)
    try:
        with dspy.context(**surroundings):
            return await _arrange(
                optimizer,
                student,
                called,
                shards,
                config,
                started - book.elapsed_s,
                stop,
                book,
                metering,
                plans,
            )
    except BaseException as error:
        if isinstance(error, Exception):
            book.ended(error)
        try:
            await metering.ledger.aclose()
        finally:
            book.close()
        raise


def make_config(optimizer: AsynDBT, workers: int) -> AlgorithmConfig:
    """The constants of a run with so many workers, S and tau filled in.

    Where nothing was said of waiting, nobody waits; a run that is to be repeatable has an order of its own.
    """
    is_free = optimizer.preset == "default" and not optimizer.deterministic
    config = resolve(
        optimizer.config,
        workers,
        optimizer.active_workers,
        optimizer.max_staleness,
        is_free=is_free,
        said=optimizer.overridden,
    )
    # Speeds are none of a repeatable run's business.
    return dataclasses.replace(config, balance=False) if optimizer.deterministic else config


def make_metering(optimizer: AsynDBT) -> Metering:
    """The ledger of one compile; of caps on the wire as much is kept for the race as of metric calls."""
    config = optimizer.config
    kept_back = config.race_fraction if config.race else 0.0
    workers = _listed(optimizer) or [Worker("any", **optimizer.limits)]
    return Metering(optimizer.budget, kept_back, optimizer.prices, workers)


def _listed(optimizer: AsynDBT) -> Sequence[Worker]:
    """The workers that the user described; none where there is only a number of them."""
    return optimizer.workers if isinstance(optimizer.workers, Sequence) else ()


def _demo_tokens(optimizer: AsynDBT, student: dspy.Module) -> float:
    """Tokens that demos may add to a prompt, on average over predictors: half of what they are allowed."""
    if optimizer.options.mode == "instructions":
        return 0.0
    layout = demo_slots(
        student, demos_per_class=optimizer.options.demos_per_class, demo_slots=optimizer.options.demo_slots
    )
    slots = sum(map(len, layout.values())) / max(1, len(layout))
    return _DEMO_TOKENS * slots


@dataclasses.dataclass(frozen=True)
class _Metered:
    """All that calls an LM, metered before any call: what the budget's caps cannot bound is refused then."""

    lms: Mapping[str, Any]
    student: dspy.Module
    teacher: dspy.Module | None
    proposer: Any


async def _arrange(
    optimizer: AsynDBT,
    student: dspy.Module,
    called: _Metered,
    shards: Sequence[sharding.Shard],
    config: AlgorithmConfig,
    started: float,
    stop: StopRequest,
    book: KeysOnly,
    metering: Metering,
    plans: Sequence[WorkerPlan],
) -> Run:
    plain = preparation.make_space(
        called.student, shards, dataclasses.replace(optimizer.options, fragments=0), {}, ()
    )
    evaluator = ProgramEvaluator(
        plain,
        preparation.make_parts(shards, called.lms),
        _make_runner(optimizer, config, called.lms, book.run_id),
        rollout_timeout_s=optimizer.rollout_timeout_s + _recover_s(optimizer),
        max_failures=optimizer.max_failures,
        errors=OnlyErrors(optimizer.max_errors),
        straggler_factor=None if optimizer.deterministic else optimizer.straggler_factor,
        repeats=config.repeats,
        on_rollout=preparation.rollout_watch(shards),
        book=book,
        gate=stop.gate,
        on_refused=metering.note_refused,
        on_calls=metering.note_calls,
    )
    evaluator.note_recorded(book.recorded())
    may_begin = _setup_goes_on(optimizer, config, metering, started)
    try:
        setup = SetupRollouts(evaluator, book)
        probes = await _probe(optimizer, setup, shards)
        plans = measured_plans(
            plans, evaluator.uses, optimizer.budget, demo_tokens=_demo_tokens(optimizer, student)
        )
        payable = affordable(optimizer.budget, plans)
        items, rollouts = await make_demos(
            optimizer, student, called.teacher, shards, setup, payable, may_begin
        )
        options = dataclasses.replace(optimizer.options, proposer=called.proposer)
        texts = await preparation.instruction_arms(student, shards, options, rollouts, optimizer.seed, book)
    except BaseException:
        await evaluator.aclose()
        raise
    programs = preparation.make_space(called.student, shards, optimizer.options, texts, items)
    evaluator.programs = programs
    for worker, rollout in probes.items():
        evaluator.remember((programs.space.student, worker, False, 0), rollout)  # paid for already
    use_distributions = optimizer.loss == "auto" and preparation.report_distributions(probes.values())
    spent = setup.close()
    calls = optimizer.budget.metric_calls
    left = None if calls is None else max(0, calls - spent)
    members = preparation.make_members(programs, shards, config)
    tell_of_no_choice(programs.space, members, optimizer.options)
    server = ServerState(programs.space, members, config, left)
    states = [
        WorkerState(
            shard.worker.name,
            index,
            WorkerSpace(programs.space, members[index].allowed),
            config,
            examples=len(shard.estimate),
            seed=optimizer.seed,
            use_distributions=use_distributions,
        )
        for index, shard in enumerate(shards)
    ]
    later = LaterInstructions(
        programs,
        server,
        shards,
        options,
        optimizer.seed,
        book,
        waits=optimizer.deterministic,
        # Where metric calls are the bound, the server knows better what the race leaves of them.
        affordable=0 if payable == calls else _for_search(config, payable) - spent,
        is_late=_late(optimizer, config, started, ASKED_AFTER),
    )
    return Run(
        optimizer, programs, shards, evaluator, server, states, spent, started, stop, book, metering, later
    )


def _for_search(config: AlgorithmConfig, amount: float) -> float:
    """What the race leaves of a cap."""
    return (1 - config.race_fraction) * amount if config.race else amount


def _late(optimizer: AsynDBT, config: AlgorithmConfig, started: float, part: float) -> Callable[[], bool]:
    """Whether so much of what is now left of the search's seconds is over."""
    seconds = optimizer.budget.seconds
    if seconds is None or optimizer.deterministic:  # a run that ends within its time is to be repeatable
        return lambda: False
    now = time.perf_counter()
    due = now + part * max(0.0, started + _for_search(config, seconds) - now)
    return lambda: time.perf_counter() >= due


def _setup_goes_on(
    optimizer: AsynDBT, config: AlgorithmConfig, metering: Metering, started: float
) -> Callable[[], bool]:
    """Whether the setup leaves the search enough of every cap for another trace to begin."""
    is_late = _late(optimizer, config, started, MOST_OF_SEARCH)
    share = _for_search(config, MOST_OF_SEARCH)
    return lambda: not (is_late() or metering.has_spent(share))


def _recover_s(optimizer: AsynDBT) -> float:
    """Seconds for a lost worker to come back in the middle of a rollout; its time limit is kept where it is made."""
    return optimizer.engine.recover_s if isinstance(optimizer.engine, RemoteRollouts) else 0.0


def _make_runner(optimizer: AsynDBT, config: AlgorithmConfig, lms: Mapping[str, Any], run_id: str) -> Runner:
    """Here, or where the workers are."""
    if not isinstance(optimizer.engine, RemoteRollouts):
        return RolloutRunner(optimizer.metric, failure_score=optimizer.failure_score)
    repeatable = {name for name, lm in lms.items() if is_deterministic(lm) and not config.repeats}
    return RemoteRunner(
        optimizer.engine,
        failure_score=optimizer.failure_score,
        repeatable=frozenset(repeatable),
        run_id=run_id,
        timeout_s=optimizer.rollout_timeout_s,
    )


async def _probe(
    optimizer: AsynDBT, setup: SetupRollouts, shards: Sequence[sharding.Shard]
) -> dict[str, Rollout]:
    """The student's rollout on the first example of each worker, as far as the budget reaches.

    It shows a metric that returns nothing before more is paid for, and whether labels have distributions.
    """
    programs = setup.evaluator.programs
    student = programs.build(programs.space.student)
    most = setup.count("probes", optimizer.budget.metric_calls or len(shards))
    names = [shard.worker.name for shard in shards[:most]]
    asked = [Asked(name, student, shard.estimate[0]) for name, shard in zip(names, shards, strict=False)]
    rollouts = await setup.run("probes", asked)
    preparation.check_lm(student, shards, rollouts, optimizer.max_errors)
    return {name: one for name, one in zip(names, rollouts, strict=True) if one is not None}


class Run:
    """One compile in progress."""

    def __init__(
        self,
        optimizer: AsynDBT,
        programs: ProgramSpace,
        shards: Sequence[sharding.Shard],
        evaluator: ProgramEvaluator,
        server: ServerState,
        workers: Sequence[WorkerState],
        spent: int,
        started: float,
        stop: StopRequest,
        book: KeysOnly,
        metering: Metering,
        later: LaterInstructions,
    ) -> None:
        self.optimizer = optimizer
        self.later = later
        self.programs = programs
        self.shards = shards
        self.evaluator = evaluator
        self.server = server
        self.workers = workers
        self.spent = spent
        self.started = started
        self.stop = stop
        self.metering = metering
        self.recorder = book if isinstance(book, RunRecorder) else None
        self.recorded: list[Recorded] = []
        self._is_live = asyncio.Event()
        self._is_live.set()
        self.curve = CurveRecorder(server)
        self.meter = RunMeter(server)
        self.bar = ProgressBar(server, optimizer.budget.metric_calls, spent) if optimizer.progress else None

    async def search(self) -> None:
        observers: list[Any] = [self.recorded.append, self.curve, self.meter]
        if self.bar is not None:
            observers.append(self.bar)
        engine = self.optimizer.make_engine()
        evaluator, is_repeatable = self.evaluator, self.optimizer.deterministic
        share = RaceShare(self.metering, self.server, evaluator.uses, evaluator.gate, is_repeatable)
        observers += [share.observe, self.later.observe]
        if isinstance(engine, ListeningEngine):
            engine.between = self.later.between
        self.evaluator.on_refused = lambda error: share.end_search(engine, error)
        if self.metering.refused is not None:  # the setup took it all
            share.end_search(engine, self.metering.refused)
        if self.recorder is not None:
            self.recorder.begin_search(*space_digest(self.programs))
            observers.append(self.recorder.events)
            self.later.fill_known()
            self._resume(engine, self.recorder)
            if self.recorder.is_resumed and (cap := self.optimizer.budget.metric_calls) is not None:
                hold_cap(cap, self.recorder, self.server, self.stop.gate, self.evaluator.on_refused)
        timer = self._end_search_in_time(engine, share)
        stopping = asyncio.ensure_future(self._stop_when_asked(engine))
        try:
            with dspy.context(**self.metering.surroundings()):
                await engine.run(self.server, self.workers, self.later.watched(self.evaluator), observers)
        except Exception as error:
            if self.recorder is not None:
                self.recorder.ended(error)
            raise
        finally:
            stopping.cancel()
            if timer is not None:
                timer.cancel()
            if isinstance(engine, ListeningEngine):
                engine.between = None
            await asyncio.gather(stopping, self.later.close(), return_exceptions=True)
        if self.evaluator.is_over:  # a race that its last answers ended was to end earlier all the same
            self.server.finish_reason = self.stop.reason
        if self.recorder is not None and not self.stop.was_asked:
            self.recorder.finish(self.server.finish_reason, self.server.winner)

    def _end_search_in_time(self, engine: Engine, share: RaceShare) -> asyncio.TimerHandle | None:
        """The search ends when only the race's share of the seconds is left."""
        seconds = self.optimizer.budget.seconds
        if seconds is None:
            return None
        search_s = _for_search(self.server.config, seconds)
        spent_s = time.perf_counter() - self.started
        return share.end_search_in(engine, search_s - spent_s, seconds - search_s)

    def _resume(self, engine: Engine, recorder: RunRecorder) -> None:
        """An engine that can repeats the recorded events in their order; any other runs again on recorded rollouts."""
        if not isinstance(engine, ResumableEngine):
            recorder.events.may_diverge = True
            return
        if recorder.events.known:
            self._is_live.clear()
            self.stop.gate.hold(_REPLAY)
            recorder.events.on_live = self._go_live
        engine.resume(recorder.events.outside(), recorder.search_elapsed_s)

    def _go_live(self) -> None:
        self.stop.gate.release(_REPLAY)
        self._is_live.set()

    async def _stop_when_asked(self, engine: Engine) -> None:
        await self.stop.asked()
        await self._is_live.wait()
        await self.stop.gate.drained()
        await self.later.close()  # an engine may be waiting for the proposer
        await self._settled()
        if self.recorder is not None:
            self.recorder.events.close()
        if self.server.phase == "race":  # what it has paid for decides
            await self.evaluator.end_units()
        engine.stop_search(StopSearch(self.stop.reason, race=False))

    async def _settled(self) -> None:
        """Wait until nothing moves while no rollout may begin.

        What an earlier process paid for answers without a call, and so does what the server asks for next, one unit after the
        other, within turns of the loop; all of it counts.
        """
        before, still = (-1, -1), 0
        while still < _STILL_TURNS:
            now = (len(self.recorded), sum(use.calls + use.reused for use in self.evaluator.uses.values()))
            still = still + 1 if now == before else 0
            before = now
            await asyncio.sleep(0)

    async def aclose(self) -> None:
        """End what goes on, then what counts it, then what writes that down; all of them, whichever fails."""
        async with contextlib.AsyncExitStack() as last_first:
            if self.recorder is not None:
                last_first.callback(self.recorder.close)
            last_first.push_async_callback(self.metering.ledger.aclose)
            last_first.push_async_callback(self.evaluator.aclose)
            if self.bar is not None:
                last_first.callback(self.bar.close)

    def result(self) -> Result:
        settings = {**self.optimizer.get_params(), "algorithm": self.server.config.to_dict()}
        return make_result(
            self.programs,
            self.server,
            self.workers,
            self.evaluator,
            self.curve,
            self.meter,
            self.recorded,
            seconds=time.perf_counter() - self.started,
            settings=settings,
            spending={name: line.to_dict() for name, line in self.metering.ledger.lines().items()},
        )
