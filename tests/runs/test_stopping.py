"""Ctrl-C once, ``stop()``, and Ctrl-C twice."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from crashes import Asked, compiled, entries, steady

from asyndbt_dspy import AsynDBT
from asyndbt_dspy.core.messages import Evaluate, StopSearch
from asyndbt_dspy.engines.driver import Driver
from asyndbt_dspy.lms.scripted import AsyncScriptedEngine, ScriptedEngine
from asyndbt_dspy.recording.events import EventLog
from asyndbt_dspy.stopping import StopRequest, stopped_by_interrupt


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


@pytest.fixture(autouse=True)
def a_terminal() -> Any:
    """Shells start jobs in the background with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupted(Asked):
    """A script that is interrupted when it is asked for the n-th time."""

    def __init__(self, at: int, do: Any) -> None:
        super().__init__(kit.stairs(1))
        self.at, self.do = at, do
        self.lock = threading.Lock()  # plain programs run in threads

    def __call__(self, messages: Any) -> Any:
        with self.lock:
            answer = super().__call__(messages)
            if len(self.prompts) == self.at:
                self.do()
        return answer


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("at", [30, 60, 95])
def test_one_ctrl_c_ends_the_run_early_and_resuming_gives_the_undisturbed_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, deterministic: bool, at: int
) -> None:
    script = Interrupted(at, press_ctrl_c)
    with caplog.at_level(logging.WARNING):
        optimizer, program = compiled(tmp_path / "a", script, deterministic=deterministic)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert f"run_dir={str(tmp_path / 'a')!r}, resume=True" in caplog.text
    assert at <= len(script.prompts) <= at + 16, (
        "only what was in flight, of two workers with eight rollouts each, ended"
    )
    assert len(entries(tmp_path / "a", "rollout")) == len(script.prompts), "what was in flight is recorded"
    assert optimizer.result is not None and program is not None
    # What was in flight may have been all that the race lacked.
    assert at > 90 or optimizer.result.stopped.startswith("stopped before its end")
    again, whole = compiled(tmp_path / "a", script, deterministic=deterministic)
    keys = [entry["key"] for entry in entries(tmp_path / "a", "rollout")]
    assert len(keys) == len(set(keys)) == len(script.prompts) == again.result.metric_calls
    if deterministic:
        undisturbed, expected = compiled(tmp_path / "b", kit.stairs(1))
        assert steady(again.result) == steady(undisturbed.result)
        assert kit.state_of(whole) == kit.state_of(expected)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("at", "during"), [(60, 0), (60, 3), (95, 0), (95, 7)])
def test_an_end_during_the_replay_comes_after_it_and_gives_what_is_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool, at: int, during: int
) -> None:
    """As where the time of the budget is over already: the timer of the resumed run asks at once."""
    script = Interrupted(at, press_ctrl_c)
    first, program = compiled(tmp_path, script, deterministic=deterministic)
    optimizers: list[AsynDBT] = []
    outside, make_engine = EventLog.outside, AsynDBT.make_engine

    def noted(optimizer: AsynDBT) -> Any:
        optimizers.append(optimizer)
        return make_engine(optimizer)

    def interrupted(log: EventLog) -> Any:
        for number, one in enumerate(outside(log)):
            if number == during:
                optimizers[-1].stop()
            yield one

    monkeypatch.setattr(AsynDBT, "make_engine", noted)
    monkeypatch.setattr(EventLog, "outside", interrupted)
    for _ in range(2):  # as often as you like
        again, whole = compiled(tmp_path, script, deterministic=deterministic)
        assert len(script.prompts) == first.result.metric_calls, "nothing is paid for"
        assert again.result.stopped == first.result.stopped
        assert again.result.candidates == first.result.candidates
        assert kit.state_of(whole) == kit.state_of(program)
    monkeypatch.undo()
    last, _ = compiled(tmp_path, script, deterministic=deterministic)
    assert last.result.metric_calls == len(script.prompts) >= first.result.metric_calls


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_end_waits_for_the_replay_however_long_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    script = Interrupted(60, press_ctrl_c)
    first, _ = compiled(tmp_path, script, deterministic=deterministic)
    monkeypatch.setattr("asyndbt_dspy.compilation._STILL_TURNS", 0)
    make_engine = AsynDBT.make_engine

    def stopped(optimizer: AsynDBT) -> Any:
        optimizer.stop()
        return make_engine(optimizer)

    monkeypatch.setattr(AsynDBT, "make_engine", stopped)
    again, _ = compiled(tmp_path, script, deterministic=deterministic)
    assert again.result.stopped == "stopped before its end, with the best so far"
    assert len(script.prompts) == first.result.metric_calls


class WorkerTasksEngine:
    """An engine of somebody's own, with one task per worker for the whole run."""

    def __init__(self) -> None:
        self.asked: list[StopSearch] = []
        self.moved = asyncio.Event()

    def stop_search(self, stop: StopSearch) -> None:
        self.asked.append(stop)
        self.moved.set()

    async def run(self, server: Any, workers: Any, evaluator: Any, observers: Any = ()) -> None:
        driver = Driver(server, workers, observers, lambda: 0.0)
        inboxes: dict[str, asyncio.Queue[Evaluate]] = {worker.name: asyncio.Queue() for worker in workers}

        def send(requests: list[Evaluate]) -> None:
            for request in requests:
                inboxes[request.worker].put_nowait(request)
            self.moved.set()

        async def work(inbox: asyncio.Queue[Evaluate]) -> None:
            while True:
                send(driver.complete(await evaluator.evaluate(await inbox.get())))

        async def lead() -> None:
            send(driver.start())
            while not driver.finished:
                await self.moved.wait()
                self.moved.clear()
                while self.asked:
                    send(driver.stop_search(self.asked.pop()))

        tasks = [asyncio.ensure_future(one) for one in (lead(), *map(work, inboxes.values()))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("at", [40, 90])
def test_an_engine_with_one_task_per_worker_can_be_stopped_in_search_and_race(at: int) -> None:
    script = Interrupted(at, press_ctrl_c)
    optimizer, program = compiled(None, script, engine=WorkerTasksEngine(), deterministic=False)
    assert program is not None
    assert optimizer.result.stopped == "stopped before its end, with the best so far"
    assert len(script.prompts) <= at + 16


def test_with_an_engine_that_cannot_repeat_its_order_a_run_goes_on_from_its_rollouts(tmp_path: Path) -> None:
    rewinds = 0
    for second_order in range(2, 7):  # one of them is another order for sure
        folder, script = tmp_path / str(second_order), Interrupted(60, press_ctrl_c)
        for order in (1, second_order):
            engine = kit.TurnsEngine(AsyncScriptedEngine(script, True), order, 40)
            lm = kit.lm_over(script, engine, "colors")
            optimizer, _ = compiled(folder, None, engine=WorkerTasksEngine(), deterministic=False, lm=lm)
        rewinds += len(entries(folder, "rewind"))
        keys = [entry["key"] for entry in entries(folder, "rollout")]
        assert optimizer.result.stopped == "the budget of the search is spent"
        assert len(keys) == len(set(keys)) == len(script.prompts)
    assert rewinds


def test_an_end_during_setup_returns_the_student(tmp_path: Path) -> None:
    student = kit.TwoSteps()
    script = Interrupted(3, press_ctrl_c)
    optimizer, program = compiled(tmp_path, script, student, bootstrap=True)
    assert optimizer.result is None and program is not student
    assert kit.state_of(program) == kit.state_of(student)
    assert len(entries(tmp_path, "rollout")) * 2 == len(script.prompts)
    optimizer, _ = compiled(tmp_path, script, student, bootstrap=True)
    assert optimizer.result is not None


def test_without_a_run_dir_the_warning_says_that_it_cannot_go_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compiled(None, Interrupted(40, press_ctrl_c))
    assert "Without run_dir= it cannot go on later" in caplog.text


class Silent:
    """An async engine that from the n-th call on never answers."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = True

    def __init__(self, after: int, do: Any) -> None:
        self.inner = AsyncScriptedEngine(kit.stairs(1), True)
        self.supported_params = self.inner.supported_params
        self.left, self.do = after, do

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    async def complete(self, request: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            if self.left == -1:
                self.do()
            await asyncio.Event().wait()
        return await self.inner.complete(request)


def silent_lm(after: int, do: Any) -> dspy.LM:
    engines = {"engine": ScriptedEngine(kit.stairs(1), True), "async_engine": Silent(after, do)}
    return dspy.LM("scripted/silent", cache=False, num_retries=0, **engines)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_second_ctrl_c_ends_at_once(tmp_path: Path, deterministic: bool) -> None:
    def twice() -> None:
        press_ctrl_c()
        asyncio.get_running_loop().call_later(0.05, press_ctrl_c)

    with pytest.raises(KeyboardInterrupt):
        compiled(tmp_path, None, lm=silent_lm(50, twice), deterministic=deterministic)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(entries(tmp_path, "rollout")) == 50
    optimizer, _ = compiled(tmp_path, None, lm=silent_lm(10_000, None), deterministic=deterministic)
    assert optimizer.result is not None, "the run_dir was let go, and the run goes on"


def test_stop_from_another_thread_does_what_one_ctrl_c_does(tmp_path: Path) -> None:
    optimizers: list[AsynDBT] = []

    def stop() -> None:
        thread = threading.Thread(target=lambda: stopped.append(optimizers[0].stop()))
        thread.start()
        thread.join()

    stopped: list[bool] = []
    script = Interrupted(50, stop)
    optimizer = kit.optimizer(run_dir=tmp_path)
    optimizers.append(optimizer)
    assert optimizer.stop() is False, "nothing runs yet"
    with dspy.context(lm=kit.scripted_lm(script)):
        program = asyncio.run(optimizer.acompile(dspy.Predict(kit.Sort), trainset=kit.examples(60)))
    assert stopped == [True] and program is not None
    assert len(script.prompts) < 70
    assert optimizer.stop() is False, "and nothing runs any more"


def test_in_a_notebook_ctrl_c_reaches_the_compile_that_runs_in_a_thread(tmp_path: Path) -> None:
    async def cell() -> Any:
        return compiled(tmp_path, script)

    main = threading.main_thread().ident
    assert main is not None
    script = Interrupted(50, lambda: signal.pthread_kill(main, signal.SIGINT))
    _, program = asyncio.run(cell())
    assert program is not None and len(script.prompts) < 70


def test_a_handler_of_the_program_and_other_threads_are_left_alone() -> None:
    def own(number: int, frame: Any) -> None: ...

    before = signal.signal(signal.SIGINT, own)
    try:
        with stopped_by_interrupt(lambda: True):
            assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)
    seen: list[Any] = []

    def elsewhere() -> None:
        with stopped_by_interrupt(lambda: True):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_before_there_is_anything_to_stop_ctrl_c_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), stopped_by_interrupt(lambda: False):
        press_ctrl_c()


def test_a_job_in_the_background_goes_on_ignoring_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopped_by_interrupt(lambda: pytest.fail("nobody asked")):
        press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("is_cancelled", [True, False])
def test_what_is_found_while_the_compile_is_cancelled_is_closed(is_cancelled: bool) -> None:
    """Else its run_dir would stay locked for as long as the process lives."""
    dropped: list[str] = []

    async def drop(found: str) -> None:
        dropped.append(found)

    async def main() -> Any:
        stop = StopRequest("")
        ready = asyncio.Event()

        async def work() -> str:
            await ready.wait()
            return "a run"

        waiting = asyncio.ensure_future(stop.unless_asked(work(), drop))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ready.set()
        await asyncio.sleep(0)  # the work is over, and nobody has been told
        if is_cancelled:
            waiting.cancel()
        return await asyncio.gather(waiting, return_exceptions=True)

    [found] = asyncio.run(main())
    if is_cancelled:
        assert isinstance(found, asyncio.CancelledError) and dropped == ["a run"]
    else:
        assert found == "a run" and not dropped
