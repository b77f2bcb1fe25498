"""The suite that any engine must pass.

Subclass ``EngineConformance`` in a test module (as ``class TestMyEngine(EngineConformance)``), say in ``build`` how the
engine is made, and pytest collects the rest. ``VirtualTime`` lets an engine that runs on real time follow scripted
delays without a sleep, so that one scenario means the same in every engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from asyndbt_dspy.core.config import PRESETS, AlgorithmConfig
from asyndbt_dspy.core.messages import Evaluate, RaceReply, RoundReply, Scored, StepReply, encode
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.protocols import (
    SERVER,
    Engine,
    Evaluator,
    Observer,
    Recorded,
    WorkerFailedError,
    replay,
)
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score, small_machines

Delays = Callable[[Evaluate], float]
"""Virtual seconds that an evaluation takes; ``inf`` never ends."""

SLOW_WORKER = {"w0": 0.001, "w1": 0.0015, "w2": 0.0061}
ANSWER_TIMEOUT_S = 0.05


def scripted_delays(request: Evaluate) -> float:
    """Fixed unequal speeds, with a ripple per task, so that workers overtake each other."""
    return SLOW_WORKER[request.worker] * (1.0 + 0.37 * (request.task * 7 % 5))


class VirtualTime:
    """An evaluator whose answers come in the order of virtual delays, for engines that run on real time.

    Answers wait until every evaluation that can start has started; then the earliest one is let go and ``now_s`` moves
    to its time. An evaluation that never ends holds the queue at its time limit until the engine cancels it.

    Args:
        evaluator: What scores.
        delays: Virtual seconds per evaluation.
        answer_timeout_s: The engine's own limit.
    """

    def __init__(self, evaluator: Evaluator, delays: Delays, answer_timeout_s: float = math.inf) -> None:
        self._evaluator = evaluator
        self._delays = delays
        self._answer_timeout_s = answer_timeout_s
        self._queue: list[tuple[float, str, int, asyncio.Future[None], bool]] = []
        self._count = 0
        self._pumping = False
        self.now_s = 0.0

    def clock(self) -> float:
        """To be given to the engine."""
        return self.now_s

    async def evaluate(self, request: Evaluate) -> Scored:
        delay = self._delays(request)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ends = delay <= self._answer_timeout_s
        time_s = self.now_s + (delay if ends else self._answer_timeout_s)
        self._count += 1
        heapq.heappush(self._queue, (time_s, request.worker, self._count, turn, ends))
        if not self._pumping:
            self._pumping = True
            self._soon(self._release)
        await turn
        return await self._evaluator.evaluate(request)

    def _soon(self, action: Callable[[], None], turns: int = 25) -> None:
        """After so many turns of the loop: everything that could react to the last answer has."""
        later = action if turns == 0 else lambda: self._soon(action, turns - 1)
        asyncio.get_running_loop().call_soon(later)

    def _release(self) -> None:
        self._queue = [entry for entry in self._queue if not entry[3].done()]
        heapq.heapify(self._queue)
        if not self._queue:
            self._pumping = False
            return
        time_s, _, _, turn, ends = self._queue[0]
        self.now_s = max(self.now_s, time_s)
        if ends:
            turn.set_result(None)
            self._soon(self._release)
        else:
            turn.add_done_callback(lambda _: self._soon(self._release))


@dataclasses.dataclass
class Run:
    """One run's machines and recorded events."""

    server: ServerState
    workers: list[WorkerState]
    events: list[Recorded]

    def decisions(self) -> list[str]:
        """What every machine received, in order, to the last bit; without times."""
        return [f"{one.machine} {json.dumps(encode(one.event))}" for one in self.events]

    def states(self) -> str:
        return json.dumps([self.server.snapshot(), *(worker.snapshot() for worker in self.workers)])


def quick(preset: str = "default", **changes: Any) -> AlgorithmConfig:
    """A preset at the size of these tests: two of three workers active, frequent planes, a small race."""
    small: dict[str, Any] = {"active_workers": 2, "max_staleness": 3, "plane_period": 2, "minibatch": 3}
    small |= {"race": True, "race_fraction": 0.4, "race_candidates": 3}
    return dataclasses.replace(PRESETS[preset], **(small | changes))


class EngineConformance:
    """Tests of one engine."""

    def build(
        self, evaluator: Evaluator, delays: Delays, answer_timeout_s: float = math.inf
    ) -> tuple[Engine, Evaluator]:
        """An engine in which an evaluation takes ``delays`` virtual seconds, and the evaluator to run it with."""
        raise NotImplementedError

    def run(
        self,
        config: AlgorithmConfig,
        evaluator: Evaluator | None = None,
        delays: Delays = scripted_delays,
        *,
        calls: int | None = 120,
        answer_timeout_s: float = math.inf,
        watch: Callable[[Recorded, Engine], None] | None = None,
    ) -> Run:
        server, workers = small_machines(config, calls=calls, examples=7, held_out=5)
        engine, scorer = self.build(evaluator or TableEvaluator(additive_score), delays, answer_timeout_s)
        events: list[Recorded] = []

        def observe(recorded: Recorded) -> None:
            events.append(recorded)
            if watch is not None:
                watch(recorded, engine)

        asyncio.run(self._checked(engine, server, workers, scorer, observe))
        return Run(server, workers, events)

    async def _checked(
        self,
        engine: Engine,
        server: ServerState,
        workers: Sequence[WorkerState],
        scorer: Evaluator,
        observe: Observer,
    ) -> None:
        await engine.run(server, workers, scorer, [observe])
        assert asyncio.all_tasks() == {asyncio.current_task()}, "an engine leaves no task behind"

    def test_a_run_ends_within_its_budget(self) -> None:
        table = TableEvaluator(additive_score)
        run = self.run(quick(), table)
        assert run.server.phase == "finished"
        assert run.server.calls_spent == table.calls
        assert 60 < table.calls <= 120
        assert all(worker.stopped for worker in run.workers)

    def test_a_budget_below_one_step_ends_at_once(self) -> None:
        run = self.run(quick(), calls=1)
        assert run.server.winner == run.server.space.student
        assert run.server.calls_spent == 0

    def test_every_event_is_recorded_and_rebuilds_the_machines(self) -> None:
        for preset in PRESETS:
            run = self.run(quick(preset), calls=300)
            server, workers = small_machines(quick(preset), calls=300, examples=7, held_out=5)
            replay(run.events, server, workers)
            assert Run(server, workers, []).states() == run.states(), preset

    def test_times_of_events_never_go_back(self) -> None:
        times = [one.time_s for one in self.run(quick()).events]
        assert times == sorted(times)

    def test_workers_overtake_each_other_within_the_staleness_bound(self) -> None:
        late: list[int] = []
        versions: dict[str, int] = {}

        def watch(recorded: Recorded, engine: Engine) -> None:
            if isinstance(recorded.event, StepReply):
                versions[recorded.event.worker] = versions.get(recorded.event.worker, 0) + 1
                late.append(recorded.event.version)

        run = self.run(quick(active_workers=1), calls=240, watch=watch)
        assert versions["w0"] > versions["w2"]
        assert late != sorted(late)
        assert max(run.server.staleness) <= 2

    def test_a_worker_that_fails_is_set_aside_and_the_run_goes_on(self) -> None:
        run = self.run(quick(), Failing("w1", after=2))
        assert run.server.live.tolist() == [1.0, 0.0, 1.0]
        assert run.server.phase == "finished"
        assert run.server.version > 3

    def test_when_all_workers_fail_the_run_ends(self) -> None:
        run = self.run(quick(), Failing("", after=1))
        assert run.server.finish_reason == "every worker was set aside"

    def test_a_worker_that_does_not_answer_is_timed_out(self) -> None:
        run = self.run(quick(), None, hang("w1", 3), answer_timeout_s=ANSWER_TIMEOUT_S)
        assert run.server.live.tolist() == [1.0, 0.0, 1.0]
        assert run.server.phase == "finished"

    def test_when_nobody_answers_the_run_ends(self) -> None:
        run = self.run(quick(), None, lambda request: math.inf, answer_timeout_s=ANSWER_TIMEOUT_S)
        assert run.server.finish_reason == "every worker was set aside"

    def test_stopping_the_search_goes_on_to_the_race(self) -> None:
        run = self.run(quick(), watch=stop_after(7, race=True))
        assert run.server.race is not None
        assert any(isinstance(one.event, RaceReply) for one in run.events)
        assert run.server.finish_reason == "enough"

    def test_stopping_without_a_race_ends_at_once(self) -> None:
        run = self.run(quick(), watch=stop_after(7, race=False))
        assert run.server.race is None
        assert run.server.finish_reason == "enough"
        assert run.server.calls_spent < 60

    def test_a_stop_while_rounds_run(self) -> None:
        def watch(recorded: Recorded, engine: Engine) -> None:
            if isinstance(recorded.event, RoundReply):
                engine.stop_search("enough")

        run = self.run(quick("paper", lower_rounds=3), calls=400, watch=watch)
        assert run.server.finish_reason == "enough"
        assert run.server.race is not None

    def test_an_error_of_the_evaluator_ends_the_run_and_is_not_swallowed(self) -> None:
        raised = None
        try:
            self.run(quick(), Failing("w2", after=1, error=ZeroDivisionError("metric")))
        except ZeroDivisionError as error:
            raised = error
        assert str(raised) == "metric"

    def test_cancelling_a_run_leaves_no_task(self) -> None:
        async def cancelled() -> None:
            server, workers = small_machines(quick(), calls=120, examples=7, held_out=5)
            gate = Gate(after=4)
            engine, scorer = self.build(gate, scripted_delays)
            running = asyncio.ensure_future(engine.run(server, workers, scorer))
            await gate.reached.wait()
            running.cancel()
            await asyncio.wait([running])
            assert running.cancelled()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(cancelled())

    def test_machines_that_do_not_belong_together_are_refused(self) -> None:
        async def mixed() -> None:
            server, workers = small_machines(quick())
            engine, scorer = self.build(TableEvaluator(additive_score), scripted_delays)
            raised = None
            try:
                await engine.run(server, workers[:2], scorer)
            except ConfigurationError as error:
                raised = error
            assert "must be the server's members" in str(raised)

        asyncio.run(mixed())


def scripted_scenarios(suite: EngineConformance) -> dict[str, list[str]]:
    """Decisions of one engine in every scripted scenario; two engines must agree on all of them."""
    runs = {preset: suite.run(quick(preset), calls=300) for preset in PRESETS}
    runs["hanging"] = suite.run(quick(), None, hang("w1", 3), answer_timeout_s=ANSWER_TIMEOUT_S)
    runs["failing"] = suite.run(quick(), Failing("w2", after=4))
    runs["stopped"] = suite.run(quick(), watch=stop_after(9, race=True))
    runs["rounds_and_loss"] = suite.run(quick("paper", lower_rounds=2), Failing("w1", after=5), calls=400)
    return {name: run.decisions() for name, run in runs.items()}


class Failing:
    """A worker (``""``: each) whose evaluations fail after some successes."""

    def __init__(self, worker: str, after: int, error: Exception | None = None) -> None:
        self._table = TableEvaluator(additive_score)
        self._worker = worker
        self._left: dict[str, int] = {}
        self._after = after
        self._error = error or WorkerFailedError("the LM fails again and again")

    async def evaluate(self, request: Evaluate) -> Scored:
        if self._worker in ("", request.worker):
            self._left[request.worker] = self._left.get(request.worker, self._after) - 1
            if self._left[request.worker] < 0:
                raise self._error
        return await self._table.evaluate(request)


class Gate:
    """Answers some evaluations and never the others; ``reached`` is set when the first of those comes in."""

    def __init__(self, after: int) -> None:
        self.reached = asyncio.Event()
        self._left = after
        self._table = TableEvaluator(additive_score)

    async def evaluate(self, request: Evaluate) -> Scored:
        self._left -= 1
        if self._left < 0:
            self.reached.set()
            await asyncio.get_running_loop().create_future()
        return await self._table.evaluate(request)


def hang(worker: str, after: int) -> Delays:
    """The scripted delays, but this worker stops answering after some tasks."""
    return lambda one: math.inf if one.worker == worker and one.task > after else scripted_delays(one)


def stop_after(events: int, race: bool) -> Callable[[Recorded, Engine], None]:
    """Ask the engine to stop once the server has taken so many events."""
    seen = 0

    def watch(recorded: Recorded, engine: Engine) -> None:
        nonlocal seen
        seen += recorded.machine == SERVER
        if seen == events and recorded.machine == SERVER:
            engine.stop_search("enough", race)

    return watch
