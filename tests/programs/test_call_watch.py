"""LM calls that came to nothing, whatever the program made of their errors."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMRateLimitError
from one_rollout import EXAMPLE, exact

from asyndbt_dspy.errors import BudgetExceededError, MetricError
from asyndbt_dspy.lms.call_watch import unwatched, watching_calls
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.lms.scripted import scripted_lm
from asyndbt_dspy.programs.rollout import Rollout, RolloutRunner


class Asking(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ask = dspy.Predict("message -> label")


class Catching(Asking):
    def forward(self, message: str) -> dspy.Prediction:
        try:
            return self.ask(message=message)
        except Exception:  # noqa: BLE001 - as programs do
            return dspy.Prediction(label="unknown")


class Grouped(Asking):
    async def aforward(self, message: str) -> dspy.Prediction:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.ask.acall(message=message))
        return task.result()


class Parallel(Asking):
    def forward(self, message: str) -> Any:
        both = dspy.Parallel(num_threads=2, disable_progress_bar=True)
        return both([(self.ask, {"message": message}), (self.ask, {"message": message + "!"})])[0]


class Waiting(Asking):
    """Asks again and again, with ever longer pauses."""

    def __init__(self, asked: asyncio.Event) -> None:
        super().__init__()
        self.asked = asked

    async def aforward(self, message: str) -> dspy.Prediction:
        try:
            return await self.ask.acall(message=message)
        except Exception:  # noqa: BLE001 - as above
            self.asked.set()
            return await asyncio.Event().wait()  # type: ignore[return-value]


def best_of_two() -> dspy.Module:
    return dspy.BestOfN(dspy.Predict("message -> label"), N=2, reward_fn=lambda *_: 1.0, threshold=1.0)


needs_groups = pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup")
SWALLOWING = [
    lambda: dspy.Predict("message -> label"),  # passes it on
    Catching,
    pytest.param(Grouped, marks=needs_groups),
    Parallel,
    best_of_two,
]


def lm_that(error: Exception) -> dspy.LM:
    def script(messages: Any) -> str:
        raise error

    return scripted_lm(script, num_retries=0)


def run(program: dspy.Module, error: Exception, metric: Any = exact) -> Rollout:
    runner = RolloutRunner(metric)
    return asyncio.run(runner.run(program, EXAMPLE, lm=lm_that(error), adapter=dspy.JSONAdapter()))


@pytest.mark.parametrize("make", SWALLOWING)
def test_a_refused_call_is_no_score_whatever_the_program_makes_of_it(
    make: Callable[[], dspy.Module], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING, logger="asyndbt_dspy"),
        pytest.raises(BudgetExceededError, match="80 calls"),
    ):
        run(make(), BudgetExceededError("the cap of 80 calls is reached"))
    assert not [one for one in caplog.records if one.name.startswith("asyndbt_dspy")], "nothing failed"


def test_a_refused_call_of_a_metric_that_returns_nothing_for_it_is_no_mistake_of_the_metric() -> None:
    def metric(gold: Any, prediction: Any) -> Any:
        return None

    with pytest.raises(BudgetExceededError):
        run(Catching(), BudgetExceededError("spent"), metric)
    with pytest.raises(MetricError):
        run(Catching(), ValueError("no refusal"), metric)


def test_a_program_that_asks_again_until_its_time_is_over_was_refused() -> None:
    async def main() -> None:
        asked = asyncio.Event()
        lm = lm_that(BudgetExceededError("spent"))
        task = asyncio.ensure_future(RolloutRunner(exact).run(Waiting(asked), EXAMPLE, lm=lm))
        await asked.wait()
        task.cancel()
        with pytest.raises(BudgetExceededError):
            await task

    asyncio.run(main())


@pytest.mark.parametrize("make", [Parallel, best_of_two])
def test_a_run_that_fails_for_want_of_an_answer_is_missing(make: Callable[[], dspy.Module]) -> None:
    for metric in (exact, lambda gold, prediction: prediction and 1.0):
        rollout = run(make(), LMRateLimitError("slow down"), metric)
        assert (rollout.score, rollout.failure) == (None, FailureKind.TRANSIENT)
        assert (rollout.error or "").startswith("LMRateLimitError: ") and "slow down" in (rollout.error or "")


def test_what_a_program_answers_without_its_lm_counts_and_so_do_its_own_failures() -> None:
    rollout = run(Catching(), LMRateLimitError("slow down"))
    assert (rollout.score, rollout.failure) == (0.0, None)
    rollout = run(Parallel(), ValueError("the LM's own kind of failure"))
    assert (rollout.score, rollout.failure) == (0.0, FailureKind.PROGRAM)


class AskingAgain(Asking):
    def forward(self, message: str) -> dspy.Prediction:
        try:
            return self.ask(message=message)
        except LMRateLimitError:
            return self.ask(message=message)


def test_a_call_that_is_made_again_and_answered_is_not_lost() -> None:
    asked = []

    def script(messages: Any) -> str:
        asked.append(messages)
        if len(asked) == 1:
            raise LMRateLimitError("slow down")
        return "no JSON"

    runner = RolloutRunner(exact)
    lm = scripted_lm(script, num_retries=0)
    rollout = asyncio.run(runner.run(AskingAgain(), EXAMPLE, lm=lm, adapter=dspy.JSONAdapter()))
    assert len(asked) > 1
    assert (rollout.score, rollout.failure) == (0.0, FailureKind.PROGRAM), (
        "it is the answer that cannot be read"
    )


def test_a_watch_that_is_handed_on_is_taken_once_and_a_compile_inside_is_not_watched() -> None:
    with watching_calls(hand_on=True) as outer:
        with watching_calls() as taken, watching_calls() as other:
            assert taken is outer and other is not outer
            assert [one for one in dspy.settings.callbacks if one in (outer, other)] == [outer, other]
            with unwatched():
                assert not {outer, other} & set(dspy.settings.callbacks)
        with watching_calls() as again:
            assert again is outer


def test_a_program_that_waits_for_a_thread_is_held_back() -> None:
    now, in_thread, go_on = [0.0], threading.Event(), threading.Event()

    class Busy(Asking):
        def forward(self, message: str) -> dspy.Prediction:
            in_thread.set()
            go_on.wait(10)
            return dspy.Prediction(label="billing")

    async def main(threads: ThreadPoolExecutor) -> list[float]:
        runner = RolloutRunner(lambda gold, prediction: 1.0, executor=threads)
        held: list[float] = []
        with watching_calls(lambda: now[0]) as first:
            running = asyncio.ensure_future(runner.run(Busy(), EXAMPLE))
            await asyncio.to_thread(in_thread.wait, 10)
        with watching_calls(lambda: now[0]) as second:
            waiting = asyncio.ensure_future(runner.run(Busy(), EXAMPLE))
            await asyncio.sleep(0)
        with watching_calls(lambda: now[0]) as third:
            cancelled = asyncio.ensure_future(runner.run(Busy(), EXAMPLE))
            await asyncio.sleep(0)
        now[0] = 50.0
        cancelled.cancel()
        await asyncio.wait([cancelled])
        now[0] = 100.0
        held += [first.held_s(), second.held_s(), third.held_s()]
        go_on.set()
        await asyncio.gather(running, waiting)
        now[0] = 200.0
        return [*held, second.held_s()]

    with ThreadPoolExecutor(1) as threads:
        assert asyncio.run(main(threads)) == [0.0, 100.0, 50.0, 100.0]
