"""What a compile says that it may take: before any call, and once more after its first rollouts."""

from __future__ import annotations

import logging
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import Budget, ConfigurationError, Estimate


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=kit.color_lm(max_tokens=50)):
        yield


class Twice(dspy.Module):
    """Two loops, of four turns and an answer each, and a predictor by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.ReAct("message -> topic", tools=[kit.look_up], max_iters=4)
        self.second = [dspy.ReAct("topic -> note", tools=[kit.look_up], max_iters=4)]
        self.sort = dspy.ChainOfThought(kit.Sort)

    def forward(self, message: str) -> dspy.Prediction:
        raise NotImplementedError


def estimate_of(student: dspy.Module, trainset: Any, **options: Any) -> Estimate:
    asked: list[Estimate] = []
    with pytest.raises(ConfigurationError, match="refused by confirm="):
        kit.optimizer(confirm=lambda one: asked.append(one) or False, **options).compile(
            student, trainset=trainset
        )
    return asked[0]


@pytest.mark.parametrize(
    ("student", "calls"),
    [(dspy.Predict(kit.Sort), 1), (kit.TwoSteps(), 2), (kit.make_react(), 4), (Twice(), 11)],
)
def test_a_loop_counts_as_often_as_it_may_turn(student: dspy.Module, calls: int) -> None:
    found = estimate_of(student, kit.examples(60), budget=Budget(metric_calls=50))
    assert (found.metric_calls, found.lm_calls) == (50, 50 * calls)
    capped = estimate_of(student, kit.examples(60), budget=Budget(lm_calls=440), deterministic=False)
    assert (capped.metric_calls, capped.lm_calls) == (440 // calls, 440)


def test_the_first_rollouts_say_how_often_it_does(caplog: pytest.LogCaptureFixture) -> None:
    """The student, which knows nothing, looks nothing up: it answers in two calls of at most four."""
    with caplog.at_level(logging.INFO, logger="asyndbt_dspy"):
        kit.optimizer(budget=Budget(metric_calls=50)).compile(kit.make_react(), trainset=kit.examples(60))
    said = [one.getMessage() for one in caplog.records if "may take" in one.getMessage()]
    assert [" ".join(one.split()[:5]) for one in said] == [
        "This compile may take 50",
        "By its first rollouts, this",
    ]
    assert "50 metric calls, about 200 LM calls" in said[0]
    assert "50 metric calls, about 100 LM calls" in said[1]


def test_an_image_is_neither_priced_nor_measured_as_text(caplog: pytest.LogCaptureFixture) -> None:
    class Look(dspy.Signature):
        image: dspy.Image = dspy.InputField()
        label: str = dspy.OutputField()

    file = "data:image/png;base64," + "A" * 100_000
    data = [
        dspy.Example(image=dspy.Image(f"{file}{number:04d}"), label="red").with_inputs("image")
        for number in range(24)
    ]
    dspy.settings.lm.context_tokens = 8_192
    found = estimate_of(dspy.Predict(Look), data, budget=Budget(metric_calls=50), mode="instructions")
    assert 50 * 1_024 < found.tokens < 50 * 1_500
    assert "cannot be answered" not in caplog.text
