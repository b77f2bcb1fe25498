"""One run: scored, timed, failed or missing."""

from __future__ import annotations

import asyncio
import functools
import threading
import types
from typing import Any

import dspy
import numpy as np
import pytest
from dspy.teleprompt.gepa.gepa_utils import ScoreWithFeedback
from dspy.utils.dummies import DummyLM
from dspy.utils.exceptions import AdapterParseError, LMRateLimitError
from one_rollout import EXAMPLE, Raising, exact, run

from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError, MetricError
from asyndbt_dspy.lms.call_watch import budget_error
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs import rollout as rollout_module
from asyndbt_dspy.programs.rollout import Rollout, RolloutRunner, runs_async


class AsyncRaising(Raising):
    async def aforward(self, message: str) -> Any:
        raise self.error


class Answering(dspy.Module):
    """Calls back, then answers."""

    def __init__(self, action: Any) -> None:
        super().__init__()
        self.action = action

    def forward(self, message: str) -> dspy.Prediction:
        self.action()
        return dspy.Prediction(label="billing")


# --- programs ---


def test_every_kind_runs_and_is_scored(kind: Any) -> None:
    rollout = run(kind.make(), answers=kind.answers)
    assert (rollout.score, rollout.failure, rollout.error) == (1.0, None, None)
    assert rollout.prediction.label == "billing"
    assert rollout.trace is None
    assert rollout.seconds > 0


def test_every_kind_is_traced(kind: Any) -> None:
    program = kind.make()
    rollout = run(program, answers=kind.answers, trace=True)
    assert rollout.trace is not None and len(rollout.trace) == len(kind.answers)
    own = {id(predictor) for predictor in program.predictors()}
    assert all(id(predictor) in own for predictor, _, _ in rollout.trace)


def test_a_predictor_keeps_its_own_lm(with_own_lm: dspy.Module) -> None:
    assert run(with_own_lm).prediction.label == "other"


def test_which_programs_run_on_the_loop(kinds: Any) -> None:
    class OverridesForward(dspy.ChainOfThought):
        def forward(self, **kwargs: Any) -> Any:
            return super().forward(**kwargs)

    class OverridesBoth(OverridesForward):
        async def aforward(self, **kwargs: Any) -> Any:
            return await super().aforward(**kwargs)

    expected = {"predict": True, "chain_of_thought": True, "react": True, "async_only": True}
    for name, kind in kinds.items():
        assert runs_async(kind.make()) is expected.get(name, False), name
    assert not runs_async(OverridesForward("question -> answer")), "acall would pass its forward by"
    assert runs_async(OverridesBoth("question -> answer"))


def test_plain_programs_run_in_a_thread_with_the_context() -> None:
    seen: dict[str, Any] = {}
    lm = DummyLM([{"label": "billing"}])

    def look() -> None:
        seen.update(thread=threading.current_thread(), lm=dspy.settings.lm, adapter=dspy.settings.adapter)

    adapter = dspy.JSONAdapter()
    asyncio.run(RolloutRunner(exact).run(Answering(look), EXAMPLE, lm=lm, adapter=adapter))
    assert seen["thread"] is not threading.main_thread()
    assert seen["lm"] is lm and seen["adapter"] is adapter


def test_a_blocking_program_does_not_block_the_loop() -> None:
    """Two plain programs meet at a barrier, and the loop lets a third task open it."""
    barrier = threading.Barrier(3, timeout=10)
    program = Answering(barrier.wait)
    runner = RolloutRunner(exact)

    async def main() -> list[Rollout]:
        runs = [asyncio.create_task(runner.run(program, EXAMPLE)) for _ in range(2)]
        while barrier.n_waiting < 2:
            await asyncio.sleep(0)
        await asyncio.to_thread(barrier.wait)
        return list(await asyncio.gather(*runs))

    assert [rollout.score for rollout in asyncio.run(main())] == [1.0, 1.0]
    runner.close()


def test_the_ambient_lm_is_used_and_nothing_is_configured(plain: dspy.Module) -> None:
    before = dict(dspy.settings.config)

    async def main() -> Rollout:
        with dspy.context(lm=DummyLM([{"label": "billing"}])):
            return await RolloutRunner(exact).run(plain, EXAMPLE)

    assert asyncio.run(main()).score == 1.0
    assert dict(dspy.settings.config) == before


def test_concurrent_runs_have_their_own_traces(kinds: Any) -> None:
    program = kinds["async_only"].make()
    runner = RolloutRunner(lambda gold, prediction: 1.0)
    examples = [dspy.Example(message=f"message {n};").with_inputs("message") for n in range(20)]
    lm = DummyLM({f"message {n};": {"label": "other"} for n in range(20)})

    async def main() -> list[Rollout]:
        return list(await asyncio.gather(*(runner.run(program, e, lm=lm, trace=True) for e in examples)))

    for example, rollout in zip(examples, asyncio.run(main()), strict=True):
        assert [inputs["message"] for _, inputs, _ in rollout.trace or []] == [example.message]


def test_seconds_come_from_the_clock(plain: dspy.Module) -> None:
    ticks = iter([10.0, 12.5])
    runner = RolloutRunner(exact, clock=lambda: next(ticks))
    assert asyncio.run(runner.run(plain, EXAMPLE, lm=DummyLM([{"label": "billing"}]))).seconds == 2.5


# --- failures ---


@pytest.mark.parametrize("program_class", [Raising, AsyncRaising])
def test_an_exception_of_the_program_counts_as_a_failure(program_class: Any) -> None:
    rollout = run(program_class(KeyError("no such order")))
    assert rollout.score == 0.0 and rollout.failure is FailureKind.PROGRAM
    assert rollout.error == "KeyError: 'no such order'"
    runner = RolloutRunner(exact, failure_score=-1.0)
    assert asyncio.run(runner.run(program_class(KeyError("x")), EXAMPLE)).score == -1.0


@pytest.mark.parametrize("program_class", [Raising, AsyncRaising])
def test_an_unreachable_lm_is_missing_and_no_zero(program_class: Any) -> None:
    rollout = run(program_class(LMRateLimitError("slow down")))
    assert rollout.score is None
    assert rollout.failure is not None and rollout.failure is not FailureKind.PROGRAM
    assert "slow down" in (rollout.error or "")


def test_an_answer_that_cannot_be_parsed_is_a_failure(triage: Any) -> None:
    rollout = run(
        Raising(AdapterParseError("ChatAdapter", triage, "rubbish", parsed_result={"x": 1})), trace=True
    )
    assert rollout.score == 0.0 and rollout.failure is FailureKind.PROGRAM
    assert rollout.trace == []


def test_stop_iteration_is_a_failure_like_any_other() -> None:
    assert run(Raising(StopIteration("spent"))).failure is FailureKind.PROGRAM


@pytest.mark.parametrize("stop", [KeyboardInterrupt, asyncio.CancelledError])
def test_cancellation_is_never_swallowed(stop: type[BaseException]) -> None:
    with pytest.raises(stop):
        run(AsyncRaising(stop()))


def test_a_refused_call_is_raised_however_deep(plain: dspy.Module) -> None:
    refused = BudgetExceededError("0.02 dollars left, the call needs up to 0.03")
    with pytest.raises(BudgetExceededError, match=r"0\.02 dollars"):
        run(Raising(refused))
    wrapped = RuntimeError("engine failed")
    wrapped.__cause__ = ValueError("adapter")
    wrapped.__cause__.__context__ = refused
    assert budget_error(wrapped) is refused
    with pytest.raises(BudgetExceededError):
        run(AsyncRaising(wrapped))
    assert budget_error(ValueError("x")) is None


# --- metrics ---


def three(gold: Any, prediction: Any, trace: Any) -> float:
    assert trace is None
    return 0.25


def gepa(gold: Any, prediction: Any, trace: Any, pred_name: Any, pred_trace: Any) -> dspy.Prediction:
    assert (trace, pred_name, pred_trace) == (None, None, None)
    return dspy.Prediction(score=0.25, feedback="Look again.")


def keyword_only(gold: Any, prediction: Any, *, trace: Any) -> float:
    return 0.25


async def asynchronous(gold: Any, prediction: Any, trace: Any = None) -> float:
    await asyncio.sleep(0)
    return 0.25


class CallableMetric:
    def __call__(self, gold: Any, prediction: Any) -> float:
        return 0.25


class AsyncCallableMetric:
    async def __call__(self, gold: Any, prediction: Any) -> float:
        return 0.25


class ModuleMetric(dspy.Module):
    def forward(self, example: Any, pred: Any, trace: Any = None) -> float:
        return 0.25


class AwaitedModuleMetric(dspy.Module):
    async def aforward(self, example: Any, pred: Any, trace: Any = None) -> float:
        await asyncio.sleep(0)
        return 0.25


METRICS = [
    three,
    gepa,
    keyword_only,
    asynchronous,
    CallableMetric(),
    AsyncCallableMetric(),
    ModuleMetric(),
    AwaitedModuleMetric(),
    functools.partial(three, trace=None),
    lambda gold, prediction: asynchronous(gold, prediction),
    lambda *arguments: 0.25,
]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("trace", [False, True])
def test_metrics_of_every_form(plain: dspy.Module, metric: Any, trace: bool) -> None:
    rollout = run(plain, metric, trace=trace)
    assert rollout.error is None
    assert rollout.score == 0.25
    assert rollout.feedback == ("Look again." if metric is gepa else None)


@pytest.mark.parametrize(
    ("returned", "score"),
    [
        (True, 1.0),
        (False, 0.0),
        (0.5, 0.5),
        (1, 1.0),
        (-2, -2.0),
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (dspy.Prediction(score=0), 0.0),  # true as a bool
        (dspy.Prediction(score=True, feedback="good"), 1.0),
        (ScoreWithFeedback(score=0.5, feedback="half"), 0.5),
    ],
)
def test_what_a_metric_may_return(plain: dspy.Module, returned: Any, score: float) -> None:
    rollout = run(plain, lambda gold, prediction: returned)
    assert rollout.score == score and type(rollout.score) is float


@pytest.mark.parametrize(
    "returned",
    [
        None,
        float("nan"),
        float("inf"),
        pytest.param(10**400, id="beyond all floats"),
        "1.0",
        np.array([0.5, 0.5]),
        [1.0],
        {"score": 1},
        dspy.Prediction(label="x"),
        dspy.Prediction(score=None),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_metric_may_not_return(plain: dspy.Module, returned: Any, is_async: bool) -> None:
    def strict_judge(gold: Any, prediction: Any) -> Any:
        return returned

    async def async_strict_judge(gold: Any, prediction: Any) -> Any:
        return returned

    with pytest.raises(MetricError) as raised:
        run(plain, async_strict_judge if is_async else strict_judge)
    message = str(raised.value)
    assert "strict_judge" in message and "My card was charged twice" in message
    assert (repr(returned)[:20]) in message and "must return a finite number" in message


class UnaryModuleMetric(dspy.Module):
    def forward(self, pred: Any) -> float:
        return 1.0


class UnaryAwaitedMetric(dspy.Module):
    async def aforward(self, pred: Any) -> float:
        return 1.0


@pytest.mark.parametrize(
    "metric", [lambda gold: 1.0, 3, None, UnaryModuleMetric(), UnaryAwaitedMetric(), dspy.Module()]
)
def test_a_metric_that_cannot_take_gold_and_prediction_is_refused(metric: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"\(gold, prediction\)"):
        RolloutRunner(metric)


def test_a_metric_without_a_signature_and_a_partial_one(plain: dspy.Module) -> None:
    RolloutRunner(max)  # written in C: it says nothing about its arguments, so nothing can be refused

    def worst(bound: float, gold: Any, prediction: Any) -> None:
        return None

    with pytest.raises(MetricError, match="metric 'worst' returned None"):
        run(plain, functools.partial(worst, 0.5))


def test_an_exception_of_the_metric_counts_as_a_failure(plain: dspy.Module, caplog: Any) -> None:
    def broken_metric(gold: Any, prediction: Any) -> float:
        raise AttributeError("no attribute 'answer'")

    runner = RolloutRunner(broken_metric)
    lm = DummyLM([{"label": "billing"}] * 2)

    async def main() -> list[Rollout]:
        return [await runner.run(plain, EXAMPLE, lm=lm) for _ in range(2)]

    for rollout in asyncio.run(main()):
        assert rollout.score == 0.0 and rollout.failure is FailureKind.PROGRAM
        assert "broken_metric" in (rollout.error or "") and "no attribute 'answer'" in (rollout.error or "")
        assert rollout.prediction.label == "billing"
    assert len([r for r in caplog.records if "broken_metric" in r.getMessage()]) == 1


def test_a_judge_that_cannot_be_reached_is_missing(plain: dspy.Module) -> None:
    def judge(gold: Any, prediction: Any) -> float:
        raise LMRateLimitError("slow down")

    rollout = run(plain, judge)
    assert rollout.score is None and rollout.failure not in (None, FailureKind.PROGRAM)


def test_a_judge_uses_the_callers_lm_and_stays_out_of_the_trace(plain: dspy.Module) -> None:
    judge_lm = DummyLM([{"verdict": "0.5"}] * 4)
    worker_lm = DummyLM([{"label": "billing"}] * 4)
    judge = dspy.Predict("message -> verdict: float")

    def metric(gold: Any, prediction: Any) -> float:
        return judge(message=gold.message).verdict

    async def main() -> Rollout:
        with dspy.context(lm=judge_lm):
            return await RolloutRunner(metric).run(plain, EXAMPLE, lm=worker_lm, trace=True)

    rollout = asyncio.run(main())
    assert rollout.score == 0.5
    assert (len(worker_lm.history), len(judge_lm.history)) == (1, 1)
    assert rollout.trace is not None and len(rollout.trace) == 1


def test_a_slow_metric_is_kept_off_the_loop_and_a_fast_one_is_not(
    plain: dspy.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    now = [0.0]
    monkeypatch.setattr(rollout_module, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def metric(gold: Any, prediction: Any) -> float:
        threads.append(threading.current_thread() is threading.main_thread())
        now[0] += 0.01 if len(threads) == 3 else 0.001
        return 1.0

    runner = RolloutRunner(metric)
    lm = DummyLM([{"label": "billing"}] * 6)

    async def main() -> None:
        for _ in range(6):
            await runner.run(dspy.Predict(plain.classify.signature), EXAMPLE, lm=lm)

    asyncio.run(main())
    assert threads == [False, True, True, False, False, False]
