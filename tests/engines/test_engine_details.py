"""What is particular to one engine: ties, deadlines, threads, virtual delays."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT
from asyndbt_dspy.core.messages import Evaluate, Scored, Send, StepReply, StopSearch
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.driver import Driver
from asyndbt_dspy.engines.local import LocalEngine
from asyndbt_dspy.engines.protocols import SERVER, Recorded
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays, work_delays
from asyndbt_dspy.errors import ConfigurationError, ProtocolError
from asyndbt_dspy.testing.conformance import hang, quick, scripted_delays
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score, score_table, small_machines


def machines(**changes: Any) -> tuple[ServerState, list[WorkerState]]:
    return small_machines(quick(**changes), calls=120, examples=7, held_out=5)


def evaluation(worker: str, task: int = 1, rollouts: int = 6) -> Evaluate:
    return Evaluate(worker, task, ((0, 0, 0),), (tuple(range(rollouts)),), held_out=False)


class Turnstile:
    """Lets evaluations go only when the test says so, several in one turn of the loop."""

    def __init__(self) -> None:
        self.table = TableEvaluator(additive_score)
        self.waiting: dict[str, asyncio.Future[None]] = {}

    async def evaluate(self, request: Evaluate) -> Scored:
        self.waiting[request.worker] = asyncio.get_running_loop().create_future()
        await self.waiting[request.worker]
        return score_table(request, self.table)

    async def settle(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    def let_go(self, *workers: str) -> None:
        for worker in workers:
            self.waiting.pop(worker).set_result(None)


def test_what_ends_at_the_same_time_is_taken_in_worker_order() -> None:
    order: list[str] = []

    def watch(recorded: Recorded) -> None:
        if recorded.machine == SERVER and isinstance(recorded.event, StepReply):
            order.append(recorded.event.worker)

    async def play() -> None:
        gate = Turnstile()
        server, workers = machines(active_workers=1, max_staleness=9)
        running = asyncio.ensure_future(LocalEngine().run(server, workers, gate, [watch]))
        await gate.settle()
        gate.let_go("w1")  # its next evaluation is the youngest of the three
        await gate.settle()
        gate.let_go("w2", "w1", "w0")
        await gate.settle()
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(play())
    assert order[:4] == ["w1", "w0", "w1", "w2"]


def test_stopping_from_another_thread_wakes_an_engine_that_waits() -> None:
    server, workers = machines()
    engine = LocalEngine()
    gate = Turnstile()

    async def play() -> None:
        running = asyncio.ensure_future(engine.run(server, workers, gate))
        await gate.settle()
        thread = threading.Thread(target=engine.stop_search, args=(StopSearch("interrupted", race=False),))
        thread.start()
        await running
        thread.join()

    asyncio.run(play())
    assert server.finish_reason == "interrupted"


def test_a_stop_before_the_run_is_obeyed() -> None:
    for engine in (LocalEngine(), SimulatedEngine(work_delays())):
        server, workers = machines()
        engine.stop_search(StopSearch("never mind", race=False))
        asyncio.run(engine.run(server, workers, TableEvaluator(additive_score)))
        assert server.finish_reason == "never mind"
        engine.stop_search(StopSearch("too late"))  # of no consequence


def test_a_late_worker_that_ignores_its_cancellation_is_still_set_aside() -> None:
    class Stubborn(Turnstile):
        async def evaluate(self, request: Evaluate) -> Scored:
            if request.worker == "w1":
                try:
                    await asyncio.get_running_loop().create_future()
                except asyncio.CancelledError:
                    return score_table(request, self.table)
            return score_table(request, self.table)

    server, workers = machines()
    asyncio.run(LocalEngine(answer_timeout_s=0.05).run(server, workers, Stubborn()))
    assert server.live.tolist() == [1.0, 0.0, 1.0]
    assert server.phase == "finished"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_time_limits_must_be_positive(value: float) -> None:
    with pytest.raises(ConfigurationError, match=r"answer_timeout_s=.* must be > 0 seconds"):
        LocalEngine(answer_timeout_s=value)
    with pytest.raises(ConfigurationError, match="must be > 0 seconds"):
        SimulatedEngine(work_delays(), answer_timeout_s=value)


def test_an_endless_simulation_is_refused() -> None:
    server, workers = machines()
    with pytest.raises(ConfigurationError, match="'w1' never answers and answer_timeout_s is infinite"):
        asyncio.run(SimulatedEngine(hang("w1", 0)).run(server, workers, TableEvaluator(additive_score)))


def test_an_eager_simulation_starts_evaluations_at_once_and_takes_them_in_virtual_order() -> None:
    most, under_way = 0, 0

    class Slow(TableEvaluator):
        async def evaluate(self, request: Evaluate) -> Scored:
            nonlocal most, under_way
            under_way += 1
            most = max(most, under_way)
            for _ in range(3):
                await asyncio.sleep(0)
            under_way -= 1
            return score_table(request, self)

    for eager, expected in ((True, 3), (False, 1)):
        most, under_way = 0, 0
        server, workers = machines()
        asyncio.run(SimulatedEngine(scripted_delays, eager=eager).run(server, workers, Slow(additive_score)))
        assert most == expected


def test_busy_time_and_the_virtual_clock() -> None:
    server, workers = machines()
    engine = SimulatedEngine(work_delays({"w2": 2.0}))
    asyncio.run(engine.run(server, workers, TableEvaluator(additive_score)))
    assert set(engine.busy_s) == {"w0", "w1", "w2"}
    assert engine.now_s <= sum(engine.busy_s.values())
    assert engine.now_s >= max(engine.busy_s.values()) - 1e-9


@pytest.mark.parametrize("delays", ["by work", "log-normal"])
def test_one_more_worker_ten_times_slower_costs_the_others_no_time(delays: str) -> None:
    """The bound on staleness is wide enough that nobody waits for it; half of the workers make an update."""

    def seconds(count: int, factors: dict[str, float], rollouts: int) -> float:
        server, workers = small_machines(
            dataclasses.replace(DEFAULT, active_workers=2), workers=count, calls=4000, examples=24
        )
        drawn = work_delays(factors) if delays == "by work" else lognormal_delays(1.0, 0.5, 0, factors)
        engine = SimulatedEngine(drawn)
        times: list[tuple[int, float]] = []

        class Counting(TableEvaluator):
            async def evaluate(self, request: Evaluate) -> Scored:
                scored = await super().evaluate(request)  # not eager: when the virtual clock reaches it
                times.append((self.calls, engine.now_s))
                return scored

        asyncio.run(engine.run(server, workers, Counting(additive_score)))
        return next(time_s for calls, time_s in times if calls >= rollouts)

    for rollouts in (600, 1500):
        without = seconds(3, {}, rollouts)
        assert seconds(4, {"w3": 10.0}, rollouts) <= 1.05 * without


@pytest.mark.parametrize(("eager", "expected"), [(False, 0), (True, 3)])
def test_an_evaluation_does_not_exist_before_its_turn_unless_it_is_eager(eager: bool, expected: int) -> None:
    """Three are handed out; at the end, which comes first, none is wanted any more."""
    made: list[Evaluate] = []

    class Counting(TableEvaluator):
        def evaluate(self, request: Evaluate) -> Coroutine[Any, Any, Scored]:
            made.append(request)
            return super().evaluate(request)

    server, workers = machines()
    engine = SimulatedEngine(work_delays(), eager=eager)
    engine.stop_search(StopSearch("enough", race=False))
    asyncio.run(engine.run(server, workers, Counting(additive_score)))
    assert len(workers) == 3 and len(made) == expected


def test_delays_are_seeded_log_normal_and_scaled() -> None:
    delays, again = (lognormal_delays(0.03, 1.0, 5, {"w1": 4.0}) for _ in range(2))
    prepared = lognormal_delays(0.03, 1.0, 5, {"w1": 4.0}, workers=["w1", "w0"])
    drawn = {name: [delays(evaluation(name)) for _ in range(2000)] for name in ("w0", "w1")}
    assert [again(evaluation("w0")) for _ in range(3)] == drawn["w0"][:3]  # whatever other workers drew
    assert [prepared(evaluation("w1")) for _ in range(3)] == drawn["w1"][:3]
    assert np.median(drawn["w0"]) == pytest.approx(0.03, rel=0.1)
    assert np.log(drawn["w0"]).std() == pytest.approx(1.0, rel=0.1)
    assert np.median(drawn["w1"]) == pytest.approx(0.12, rel=0.1)
    assert lognormal_delays(0.03, 0.0, 5)(evaluation("w0")) == 0.03
    assert work_delays({"w1": 4.0})(evaluation("w1")) == 24.0
    assert work_delays()(evaluation("w0", rollouts=0)) == 1.0


class Lying(ServerState):
    """A server that hands out nothing and does not end: what an engine must not wait for."""

    def start(self) -> list[Any]:
        super().start()
        return []


@pytest.mark.parametrize(
    "engine", [LocalEngine(), SimulatedEngine(work_delays())], ids=["local", "simulated"]
)
def test_an_engine_with_nothing_under_way_says_so_instead_of_waiting(engine: Any) -> None:
    server, workers = machines()
    server.__class__ = Lying
    with pytest.raises(ProtocolError, match="no evaluation is under way"):
        asyncio.run(engine.run(server, workers, TableEvaluator(additive_score)))


def test_a_refused_message_costs_the_sender_its_place_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, workers = machines()
    driver = Driver(server, workers, (), lambda: 0.0)
    (first, *_) = driver.start()
    (send,) = workers[0].receive(score_table(first, TableEvaluator(additive_score)))
    assert isinstance(send, Send)
    driver.to_server(send.message)  # type: ignore[arg-type]
    driver.to_server(send.message)  # type: ignore[arg-type]
    assert server.live.tolist() == [0.0, 1.0, 1.0]
    assert "its message was refused" in caplog.text
    assert driver.lose("w0", "again") == []
    assert driver.complete(score_table(first, TableEvaluator(additive_score))) == []


def test_a_mistake_of_the_engine_itself_is_not_blamed_on_a_worker() -> None:
    server, workers = machines()
    driver = Driver(server, workers, (), lambda: 0.0)
    driver.start()
    with pytest.raises(ProtocolError, match="unknown worker 'nobody'"):
        driver.lose("nobody", "who?")


def test_no_worker_may_be_called_server() -> None:
    server, workers = machines()
    server.members = tuple(type(one)(SERVER, one.allowed, one.held_out) for one in server.members[:1])
    workers[0].name = SERVER
    with pytest.raises(ConfigurationError, match="none may be named 'server'"):
        Driver(server, workers[:1], (), lambda: 0.0)
