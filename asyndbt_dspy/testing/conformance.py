"""The suite that any engine must pass.

Subclass ``EngineConformance`` in a test module (as ``class TestMyEngine(EngineConformance)``), say in ``build`` how the
engine is made, and pytest collects the rest. ``VirtualTime`` lets an engine that runs on real time follow scripted
delays without a sleep, so that one scenario means the same in every engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from asyndbt_dspy.core.config import PRESETS, AlgorithmConfig
from asyndbt_dspy.core.messages import (
    ArmsJoined,
    RaceReply,
    RoundReply,
    Scored,
    StepReply,
    StopSearch,
    WorkerLost,
    encode,
)
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.space import Space
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.protocols import (
    SERVER,
    Engine,
    Evaluator,
    ListeningEngine,
    Observer,
    Recorded,
    ResumableEngine,
    replay,
)
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.testing.scripted import (
    Delays,
    Failing,
    Gate,
    Late,
    Stopping,
    VirtualTime,
    hang,
    scripted_delays,
    stop_after,
)
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score, small_machines, small_space

__all__ = [
    "Delays",
    "EngineConformance",
    "Run",
    "VirtualTime",
    "hang",
    "quick",
    "scripted_delays",
    "scripted_scenarios",
]

ANSWER_TIMEOUT_S = 0.05
_OUTSIDE = (Scored, WorkerLost, StopSearch, ArmsJoined)
"""What no machine causes: what a resumed engine is given."""
_AT_ONCE_S = 30.0
"""Real seconds, which only an engine that fails comes to wait."""


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
    """Tests of one engine.

    Attributes:
        resumed_delays: Of the process that goes on where another one died: the order of the first one's events is to be
            repeated all the same. The scripted ones for an engine whose order is a matter of its delays alone.
    """

    resumed_delays: Delays = staticmethod(lambda request: 0.008 - scripted_delays(request) / 4)

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
        space: Space | None = None,
        prepare: Callable[[Engine, list[Recorded]], None] = lambda engine, events: None,
        around: Callable[[Engine, Evaluator], Evaluator] = lambda engine, scorer: scorer,
    ) -> Run:
        """One run.

        Args:
            watch: Told of each event.
            prepare: Given the engine and the list that events will be in, before the run.
            around: Wraps the evaluator that the engine runs with.
        """
        server, workers = small_machines(config, calls=calls, examples=7, held_out=5, space=space)
        engine, scorer = self.build(evaluator or TableEvaluator(additive_score), delays, answer_timeout_s)
        scorer = around(engine, scorer)
        events: list[Recorded] = []
        prepare(engine, events)

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

    def test_a_search_whose_budget_is_gone_is_told_what_is_left_for_the_race(self) -> None:
        run = self.run(quick(), calls=240, watch=stop_after(7, calls=30, is_dry=True))
        stops = [one.event for one in run.events if isinstance(one.event, StopSearch)]
        assert stops == [StopSearch("enough", calls=30, is_dry=True)]
        raced = sum(one.event.calls for one in run.events if isinstance(one.event, RaceReply))
        assert 12 <= raced <= 30
        assert run.server.finish_reason == "enough"

    def test_stopping_without_a_race_ends_at_once(self) -> None:
        run = self.run(quick(), watch=stop_after(7, race=False))
        assert run.server.race is None
        assert run.server.finish_reason == "enough"
        assert run.server.calls_spent < 60

    def test_a_stop_while_rounds_run(self) -> None:
        def watch(recorded: Recorded, engine: Engine) -> None:
            if isinstance(recorded.event, RoundReply):
                engine.stop_search(StopSearch("enough"))

        run = self.run(quick("paper", lower_rounds=3), calls=400, watch=watch)
        assert run.server.finish_reason == "enough"
        assert run.server.race is not None

    async def _until_one_hangs(self) -> tuple[ServerState, Engine, asyncio.Future[None]]:
        """A run whose evaluations hang from the fourth on."""
        server, workers = small_machines(quick(), calls=120, examples=7, held_out=5)
        gate = Gate(after=4)
        engine, scorer = self.build(gate, scripted_delays)
        running = asyncio.ensure_future(engine.run(server, workers, scorer))
        await gate.reached.wait()
        return server, engine, running

    def test_a_stop_from_another_thread_does_not_wait_for_an_evaluation_that_hangs(self) -> None:
        async def stopped() -> ServerState:
            server, engine, running = await self._until_one_hangs()
            thread = threading.Thread(target=engine.stop_search, args=(StopSearch("enough", race=False),))
            thread.start()
            await asyncio.wait([running], timeout=_AT_ONCE_S)
            thread.join()
            running.cancel()  # of an engine that waits on
            await asyncio.wait([running])
            return server

        assert asyncio.run(stopped()).finish_reason == "enough"

    def test_a_stop_without_a_race_takes_what_is_over_first(self) -> None:
        for count in (3, 8):  # at three, an engine that begins all evaluations at once has them all
            stopping: list[Stopping] = []

            def around(
                engine: Engine, scorer: Evaluator, count: int = count, made: list[Stopping] = stopping
            ) -> Evaluator:
                made.append(Stopping(engine, scorer, count))
                return made[0]

            run = self.run(quick(), around=around)
            assert run.server.finish_reason == "enough" and len(stopping[0].over) == count
            taken = [one.event for one in run.events]
            assert all(scored in taken for scored in stopping[0].over)
            kinds = [type(one.event) for one in run.events if one.machine == SERVER]
            assert kinds[-1] is StopSearch, "and only then tells the server"

    def test_what_joins_between_two_events_is_taken_once_and_holds_up_the_next_event(self) -> None:
        """Only of a ``ListeningEngine``."""
        table = TableEvaluator(additive_score)
        first, *rest = small_space().blocks
        asked: list[int] = []
        is_listening: list[bool] = []

        def prepare(engine: Engine, events: list[Recorded]) -> None:
            async def between() -> ArmsJoined | None:
                before = len(events)
                asked.append(before)
                for _ in range(5):
                    await asyncio.sleep(0)
                assert len(events) == before, "no event is taken meanwhile"
                joined = any(isinstance(one.event, ArmsJoined) for one in events)
                return None if joined or before < 30 else ArmsJoined((4,))

            is_listening.append(isinstance(engine, ListeningEngine))
            if isinstance(engine, ListeningEngine):
                engine.between = between

        late = Space((dataclasses.replace(first, late=1), *rest))
        run = self.run(quick(), table, calls=300, space=late, prepare=prepare)
        if not is_listening[0]:
            return
        joined = [number for number, one in enumerate(run.events) if isinstance(one.event, ArmsJoined)]
        assert len(joined) == 1 and run.events[joined[0]].machine == SERVER
        assert len(set(asked)) > 20 and joined[0] in asked
        drawn = [any(one[0] == 3 for one in request.candidates) for request in table.requests]
        assert any(drawn) and not any(drawn[: len(drawn) // 6]), (
            "the arm that joined is drawn, and not before"
        )

    def test_a_resumed_run_repeats_the_recorded_events_in_their_order(self) -> None:
        """Only of a ``ResumableEngine``."""
        first = self.run(quick(), Failing("w2", after=4), calls=240, watch=stop_after(12, race=True))
        places = [number for number, one in enumerate(first.events) if isinstance(one.event, _OUTSIDE)]
        kinds = {type(first.events[number].event) for number in places}
        assert kinds == {Scored, WorkerLost, StopSearch}
        is_resumable: list[bool] = []
        for count in (len(places) // 2, len(places)):

            def prepare(engine: Engine, events: list[Recorded], count: int = count) -> None:
                def earlier() -> Iterator[Recorded]:
                    for number in places[:count]:
                        assert len(events) == number, "what followed has happened again before the next"
                        yield first.events[number]

                is_resumable.append(isinstance(engine, ResumableEngine))
                if isinstance(engine, ResumableEngine):
                    engine.resume(earlier())

            again = self.run(quick(), Failing("w2", after=4), self.resumed_delays, calls=240, prepare=prepare)
            if not all(is_resumable):
                return
            over = len(first.events) if count == len(places) else places[count - 1] + 1
            assert again.decisions()[:over] == first.decisions()[:over]
            assert again.server.phase == "finished"

    def test_what_a_lost_worker_answers_after_all_reaches_nobody(self) -> None:
        late: list[Late] = []

        def around(engine: Engine, scorer: Evaluator) -> Evaluator:
            late.append(Late(scorer))
            return late[0]

        run = self.run(quick(), None, hang("w1", 3), answer_timeout_s=ANSWER_TIMEOUT_S, around=around)
        assert run.server.live.tolist() == [1.0, 0.0, 1.0] and run.server.phase == "finished"
        (lost,) = (number for number, one in enumerate(run.events) if isinstance(one.event, WorkerLost))
        after = run.events[lost + 1 :]
        assert after and not any(one.event in late[0].answers for one in after)
        assert not any(isinstance(one.event, Scored) and one.event.worker == "w1" for one in after)

    def test_an_error_of_the_evaluator_ends_the_run_and_is_not_swallowed(self) -> None:
        raised = None
        try:
            self.run(quick(), Failing("w2", after=1, error=ZeroDivisionError("metric")))
        except ZeroDivisionError as error:
            raised = error
        assert str(raised) == "metric"

    def test_cancelling_a_run_leaves_no_task(self) -> None:
        async def cancelled() -> None:
            *_, running = await self._until_one_hangs()
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
