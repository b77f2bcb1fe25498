"""Metrics of every form; what is no number is said before more is paid for."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import dspy
import kit
import pytest

from asyndbt_dspy import Budget, MetricError, Worker


def right(gold: Any, prediction: Any) -> bool:
    return bool(gold.label == prediction.label)


def as_float(gold: Any, prediction: Any) -> float:
    return 2.5 * right(gold, prediction)


def with_trace(gold: Any, prediction: Any, trace: Any) -> bool:
    # Stricter where DSPy records a trace; scores of one run must not depend on that.
    return right(gold, prediction) and trace is None


def as_prediction(gold: Any, prediction: Any, trace: Any = None) -> dspy.Prediction:
    return dspy.Prediction(score=float(right(gold, prediction)), feedback="look closer")


def of_gepa(gold: Any, prediction: Any, trace: Any, pred_name: Any, pred_trace: Any) -> dspy.Prediction:
    assert (trace, pred_name, pred_trace) == (None, None, None)
    return as_prediction(gold, prediction)


async def awaited(gold: Any, prediction: Any) -> float:
    await asyncio.sleep(0)
    return float(right(gold, prediction))


class Judge(dspy.Module):
    def forward(self, example: Any, pred: Any, trace: Any = None) -> float:
        return float(right(example, pred))


@pytest.mark.parametrize("metric", [right, as_float, with_trace, as_prediction, of_gepa, awaited, Judge()])
def test_metrics_of_every_form_lead_to_the_better_program(metric: Callable[..., Any]) -> None:
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(
        metric=metric, mode="instructions", instructions=kit.texts_for(student, kit.MAGIC)
    )
    with dspy.context(lm=kit.color_lm()):
        optimized = optimizer.compile(student, trainset=kit.examples(48))
    assert optimized.signature.instructions == kit.MAGIC
    best = next(one for one in optimizer.result.candidates if one.won)
    assert best.score == (2.5 if metric is as_float else 1.0)


@pytest.mark.parametrize("score", [1.1e100, -1e160, 1e300])
def test_a_score_too_large_to_be_squared_ends_the_run_at_once(score: float) -> None:
    lm = kit.color_lm()
    optimizer = kit.optimizer(metric=lambda gold, prediction: score, workers=2)
    with dspy.context(lm=lm), pytest.raises(MetricError, match=r"within ±1e\+100") as caught:
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(48))
    assert repr(score) in str(caught.value)
    assert 1 <= kit.calls_of(lm) <= 2


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_the_largest_scores_are_compared_like_any() -> None:
    optimizer = kit.optimizer(
        metric=lambda gold, prediction: 1e100 * kit.metric(gold, prediction),
        instructions={"self": [kit.MAGIC]},
    )
    with dspy.context(lm=kit.color_lm()):
        optimized = optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    assert optimized.signature.instructions == kit.MAGIC


@pytest.mark.parametrize("mode", ["instructions", "both"])
@pytest.mark.parametrize("kind", ["Predict", "TwoSteps"])  # the second one bootstraps traces first
@pytest.mark.parametrize("returned", [None, math.nan, math.inf, "good", dspy.Prediction(score=None)])
def test_a_metric_without_a_number_ends_the_run_at_once(returned: Any, kind: str, mode: str) -> None:
    lm, asked = kit.color_lm(), []

    def metric(gold: Any, prediction: Any) -> Any:
        asked.append(gold)
        return returned

    student = kit.KINDS[kind]()
    optimizer = kit.optimizer(metric=metric, mode=mode, workers=3, auto="heavy", budget=None)
    with dspy.context(lm=lm), pytest.raises(MetricError, match="must return a finite number") as caught:
        optimizer.compile(student, trainset=kit.examples(90))
    assert "'metric'" in str(caught.value)
    assert f"{returned!r}"[:20] in str(caught.value)
    assert 1 <= len(asked) <= 3, "one rollout per worker at most"
    assert kit.calls_of(lm) <= 3 * len(student.named_predictors())
    assert optimizer.result is None


def test_a_metric_that_fails_only_late_still_ends_the_run() -> None:
    asked: list[str] = []

    def metric(gold: Any, prediction: Any) -> Any:
        asked.append(gold.message)
        return None if len(asked) == 40 else right(gold, prediction)

    with dspy.context(lm=kit.color_lm()), pytest.raises(MetricError, match=r"returned None for Example"):
        kit.optimizer(metric=metric).compile(dspy.Predict(kit.Sort), trainset=kit.examples(48))
    assert len(asked) <= 40 + 2 * 8, "what was in flight may have ended, nothing new was begun"


def test_a_metric_that_raises_counts_as_a_failure_of_the_example(caplog: pytest.LogCaptureFixture) -> None:
    def metric(gold: Any, prediction: Any) -> bool:
        if prediction.label == "red":
            raise KeyError("no such label")
        return right(gold, prediction)

    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(
        metric=metric, mode="instructions", instructions=kit.texts_for(student, kit.MAGIC)
    )
    with dspy.context(lm=kit.color_lm()):
        optimized = optimizer.compile(student, trainset=kit.examples(48))
    assert optimized.signature.instructions == kit.MAGIC
    assert sum(worker.failed for worker in optimizer.result.workers) > 0
    assert optimizer.result.candidates[0].score == 0.0
    assert sum("The metric 'metric' raised KeyError" in one.message for one in caplog.records) == 1


def test_a_judge_uses_the_callers_lm_and_not_the_workers() -> None:
    judge_lm, worker_lm = kit.color_lm("judge"), kit.color_lm("worker")
    judge = dspy.Predict(kit.Sort)

    def metric(gold: Any, prediction: Any) -> bool:
        judge(message=gold.message)
        return right(gold, prediction)

    student = dspy.Predict(kit.Sort)
    workers = [Worker("w", kit.examples(36), lm=worker_lm)]
    optimizer = kit.optimizer(
        metric=metric, workers=workers, mode="instructions", instructions=kit.texts_for(student, kit.MAGIC)
    )
    with dspy.context(lm=judge_lm):
        optimizer.compile(student)
    assert kit.calls_of(judge_lm) == optimizer.result.metric_calls == kit.calls_of(worker_lm)


def test_a_noisy_judge_is_asked_again_and_the_better_program_found_more_often() -> None:
    """A judge that is wrong at every fourth toss; few examples, many calls."""

    def wins(noisy: bool) -> tuple[int, int]:
        won = most = 0
        for seed in range(6):
            rng = random.Random(seed)
            judged: Counter[tuple[str, str]] = Counter()

            def judge(gold: Any, prediction: Any, rng: random.Random = rng, judged: Any = judged) -> bool:
                judged[prediction.label, gold.message] += 1
                return right(gold, prediction) != (rng.random() < 0.25)

            student = dspy.Predict(kit.Sort)
            optimizer = kit.optimizer(
                metric=judge,
                workers=2,
                noisy=noisy,
                deterministic=True,
                seed=seed,
                budget=Budget(metric_calls=900),
                mode="instructions",
                instructions=kit.texts_for(student, kit.MAGIC),
            )
            with dspy.context(lm=kit.color_lm()):
                program = optimizer.compile(student, trainset=kit.examples(28))
            won += program.signature.instructions == kit.MAGIC
            most = max([most, *judged.values()])
        return won, most

    (once, few), (again, many) = wins(False), wins(True)
    assert again >= once
    assert again == 6
    assert many > few


def test_a_cache_that_hides_the_noise_is_said(caplog: pytest.LogCaptureFixture) -> None:
    lm = kit.color_lm(cache=True)
    optimizer = kit.optimizer(workers=2, noisy=True)
    with dspy.context(lm=lm):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(40))
    assert sum("cache=False" in one.getMessage() for one in caplog.records) == 2


def right_more_often_and_less_sure(messages: list[dict[str, str]]) -> tuple[str, dict[str, dict[str, float]]]:
    """Without the magic sentence sure of what is right and nearly right elsewhere; with it right, but hardly surer than that."""
    number = kit.number_in(messages)
    toss = number * 7919 % 100 / 100
    with_it, without = (0.05 if toss < 0.9 else -3.0), (3.0 if toss < 0.45 else -0.1)
    margin = with_it if kit.MAGIC in messages[0]["content"] else without
    right = kit.right_label(number)
    best, last = (one for one in kit.LABELS if one != right)
    whole = math.exp(margin) + 1.01
    shares = {right: math.exp(margin) / whole, best: 1.0 / whole, last: 0.01 / whole}
    return kit.answer(messages, label=max(shares, key=lambda one: shares[one])), {"label": shares}


@pytest.mark.parametrize(("loss", "winner"), [("auto", "student"), ("metric", "candidate 1")])
def test_with_the_metric_as_loss_the_race_counts_the_metric_alone(
    loss: Literal["auto", "metric"], winner: str
) -> None:
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(
        loss=loss,
        mode="instructions",
        instructions=kit.texts_for(student, kit.MAGIC),
        budget=Budget(metric_calls=300),
    )
    with dspy.context(lm=kit.make_lm(right_more_often_and_less_sure), adapter=dspy.JSONAdapter()):
        optimizer.compile(student, trainset=kit.examples(72))
    assert optimizer.result.winner == winner
    student_row, other = optimizer.result.candidates
    if loss == "metric":
        assert other.advantage == pytest.approx(other.score - student_row.score)


def test_a_constant_of_ones_own_goes_before_what_the_loss_implies() -> None:
    assert kit.optimizer(loss="metric", config={"race_soft": 0.3}).config.race_soft == 0.3


@pytest.mark.parametrize(
    ("scale", "failure_score", "told"), [(1.0, 0.0, 0), (1.0, -1.0, 0), (10.0, 0.0, 1), (-1.0, 0.0, 1)]
)
def test_a_metric_on_another_scale_is_told_of_once(
    scale: float, failure_score: float, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(messages: Any) -> str:
        return "no JSON" if kit.number_in(messages) % 7 == 0 else kit.stairs(1)(messages)

    optimizer = kit.optimizer(metric=lambda *of: scale * right(*of), failure_score=failure_score)
    with dspy.context(lm=kit.make_lm(broken), adapter=dspy.JSONAdapter()):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    said = [
        one.getMessage() for one in caplog.records if "scores are taken to lie in [0, 1]" in one.getMessage()
    ]
    assert len(said) == told
    assert all(f"The metric gave {scale:g}" in one for one in said)
