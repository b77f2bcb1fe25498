"""A budget is a hard cap, and small ones are no error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, Worker
from asyndbt_dspy.race_share import RaceShare
from asyndbt_dspy.recording.recorder import RunRecorder


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gold: Any, prediction: Any) -> bool:
        self.calls += 1
        return kit.metric(gold, prediction)


@pytest.mark.parametrize(("auto", "calls"), [("light", 300), ("medium", 1_200), ("heavy", 4_000)])
def test_auto_is_a_number_of_metric_calls(auto: Any, calls: int) -> None:
    assert AsynDBT(kit.metric, auto=auto).budget == Budget(metric_calls=calls)
    assert AsynDBT(kit.metric, auto=auto, budget=Budget(metric_calls=7)).budget.metric_calls == 7


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("kind", ["Predict", "TwoSteps"])
@pytest.mark.parametrize("calls", [1, 2, 3, 5, 13, 30, 61, 100])
def test_it_is_never_exceeded(calls: int, kind: str, deterministic: bool) -> None:
    metric, student = Counted(), kit.KINDS[kind]()
    optimizer = kit.optimizer(
        metric=metric, workers=3, budget=Budget(metric_calls=calls), deterministic=deterministic
    )
    with dspy.context(lm=kit.color_lm(predictors=len(student.named_predictors()))):
        program = optimizer.compile(student, trainset=kit.examples(72))
    assert metric.calls <= calls
    assert optimizer.result.metric_calls == metric.calls
    assert sum(one.calls for one in optimizer.result.workers) == metric.calls
    if calls <= 13:
        assert kit.state_of(program) == kit.state_of(student)
        assert optimizer.result.winner == "student"


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_most_of_it_is_used(preset: Any) -> None:
    metric = Counted()
    optimizer = kit.optimizer(metric=metric, preset=preset, budget=Budget(metric_calls=150))
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(72))
    assert 110 <= metric.calls <= 150


def test_nothing_is_paid_for_twice() -> None:
    """Same candidate, same example, same worker: one call of the LM. (Draws may repeat: the space is small.)"""
    student, lm = dspy.Predict(kit.Sort), kit.color_lm()
    workers = [Worker("a", kit.examples(30)), Worker("b", kit.examples(30, start=30))]
    optimizer = kit.optimizer(
        workers=workers,
        mode="instructions",
        instructions=kit.texts_for(student, kit.MAGIC),
        budget=Budget(metric_calls=500),
    )
    with dspy.context(lm=lm):
        optimizer.compile(student)
    asked = [tuple(one["content"] for one in request) for request in kit.requests_of(lm)]
    assert len(asked) == len(set(asked)) == optimizer.result.metric_calls
    assert len(asked) <= 2 * 60, "two candidates, sixty examples"
    assert sum(one.reused for one in optimizer.result.workers) > 0
    assert "known already" in optimizer.result.stopped


def test_a_fast_worker_with_nothing_left_waits_for_the_others() -> None:
    student = dspy.Predict(kit.Sort)
    workers = [Worker("small", kit.examples(8)), Worker("large", kit.examples(60, start=60))]
    optimizer = kit.optimizer(
        workers=workers,
        mode="instructions",
        active_workers=1,
        instructions=kit.texts_for(student, kit.MAGIC, "Guess."),
        budget=Budget(metric_calls=400),
    )
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(student)
    assert optimizer.result.workers[1].calls >= 3 * 40, "all three candidates on the whole large shard"


def test_seconds_end_the_search_and_the_race_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search's share of them is over with its fortieth rollout."""
    timers: list[Any] = []
    rollouts = 0

    class Loop:
        def time(self) -> float:
            return float(rollouts)

        def call_later(self, delay_s: float, call: Any) -> Any:
            timers.append(call)
            return SimpleNamespace(cancel=timers.clear)

    def metric(gold: Any, prediction: Any) -> bool:
        nonlocal rollouts
        rollouts += 1
        if rollouts == 40:
            timers[0]()
        return kit.metric(gold, prediction)

    monkeypatch.setattr("asyndbt_dspy.race_share.asyncio", SimpleNamespace(get_running_loop=Loop))
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(
        metric=metric,
        deterministic=False,
        budget=Budget(seconds=600),
        mode="instructions",
        instructions=kit.texts_for(student, kit.MAGIC),
    )
    with dspy.context(lm=kit.color_lm()):
        program = optimizer.compile(student, trainset=kit.examples(72))
    assert optimizer.result.stopped == "the time budget is spent"
    assert optimizer.result.candidates[0].examples > 0
    assert program.signature.instructions == kit.MAGIC


def test_whichever_cap_comes_first_ends_the_search() -> None:
    optimizer = kit.optimizer(deterministic=False, budget=Budget(metric_calls=40, seconds=3600))
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(72))
    assert optimizer.result.metric_calls <= 40
    assert optimizer.result.seconds < 60


def test_concurrency_of_a_worker_is_bounded() -> None:
    running, most = [0], [0]

    class Watching(kit.TurnsEngine):
        async def complete(self, request: Any) -> Any:
            running[0] += 1
            most[0] = max(most[0], running[0])
            try:
                return await super().complete(request)
            finally:
                running[0] -= 1

    recorder = kit.Recorder(kit.stairs(1))
    engine = Watching(kit.AsyncScriptedEngine(recorder, True), 0, 10)
    lm = dspy.LM("scripted/x", engine=kit.ScriptedEngine(recorder, True), async_engine=engine, cache=False)
    workers = [Worker("w", kit.examples(48), lm=lm, max_concurrency=3)]
    kit.optimizer(workers=workers, budget=Budget(metric_calls=60)).compile(dspy.Predict(kit.Sort))
    assert most[0] == 3


def test_seconds_of_an_earlier_search_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setup of ten seconds, then ninety of search, in an earlier process: a search that may take six hundred goes on."""
    asked: list[tuple[float, float]] = []
    end_search_in = RaceShare.end_search_in

    def noted(share: RaceShare, engine: Any, delay_s: float, left_s: float) -> Any:
        asked.append((delay_s, left_s))
        return end_search_in(share, engine, delay_s, left_s)

    monkeypatch.setattr(RunRecorder, "elapsed_s", 100.0)
    monkeypatch.setattr(RunRecorder, "search_elapsed_s", 90.0)
    monkeypatch.setattr(RaceShare, "end_search_in", noted)
    made = kit.optimizer(budget=Budget(seconds=1_000, metric_calls=60), run_dir=tmp_path, deterministic=False)
    with dspy.context(lm=kit.color_lm(), adapter=dspy.JSONAdapter()):
        made.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    ((delay_s, left_s),) = asked
    assert 450.0 < delay_s <= 500.0
    assert left_s == 400.0


def test_a_program_that_makes_its_own_history_is_estimated_and_compiled() -> None:
    class Ask(dspy.Signature):
        """Sort the message."""

        history: dspy.History = dspy.InputField()
        message: str = dspy.InputField()
        label: Literal["red", "green", "blue"] = dspy.OutputField()

    class Chat(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict(Ask)

        def forward(self, message: str) -> dspy.Prediction:
            return self.ask(history=dspy.History(messages=[]), message=message)

    made = kit.optimizer(instructions={"ask": [kit.MAGIC]})
    with dspy.context(lm=kit.color_lm(), adapter=dspy.JSONAdapter()):
        program = made.compile(Chat(), trainset=kit.examples(60))
    assert program.ask.signature.instructions == kit.MAGIC


def test_a_lone_surrogate_is_a_failed_example_and_no_failed_compile() -> None:
    broken = dspy.Example(message="item \ud800 3", label="red").with_inputs("message")
    made = kit.optimizer(instructions={"self": [kit.MAGIC]})
    with dspy.context(lm=kit.color_lm(), adapter=dspy.JSONAdapter()):
        made.compile(dspy.Predict(kit.Sort), trainset=[broken, *kit.examples(60)])
    assert made.result.metric_calls > 60
