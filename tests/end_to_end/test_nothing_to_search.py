"""Where the student is the only program: settings that say so are refused, and where the setup finds out nothing follows it."""

from __future__ import annotations

from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import Budget, ConfigurationError, Worker

NO_DEMOS = {"demo_slots": 0, "demos_per_class": 0}


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "instructions", "instruction_candidates": 0}, ["instruction_candidates=0", "1 or more"]),
        (
            {"mode": "instructions", "instructions": {"self": [" ", "Sort the message."]}},
            ["no text but the student's own", "instructions={'self': [texts]}"],
        ),
        ({"mode": "demos", **NO_DEMOS}, ["demo_slots=0", "demos_per_class=0", "mode='both'"]),
        ({"instruction_candidates": 0, **NO_DEMOS}, ["instruction_candidates=0", "demo_slots=0"]),
    ],
)
def test_settings_that_leave_nothing_are_refused_before_any_call(
    options: dict[str, Any], said: list[str], noisy: bool
) -> None:
    lm = kit.color_lm(cache=False)
    with dspy.context(lm=lm), pytest.raises(ConfigurationError, match="nothing to search") as caught:
        kit.optimizer(noisy=noisy, **options).compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    for part in said:
        assert part in str(caught.value)
    assert kit.calls_of(lm) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "instructions", "instruction_candidates": 0, "instructions": {"self": [kit.MAGIC]}},
        {"mode": "instructions", "instruction_candidates": 1},
        {"mode": "demos"},
        {"instruction_candidates": 0},
        {"mode": "instructions", "instruction_candidates": 0, "fragments": 1},
    ],
)
def test_one_choice_is_enough(options: dict[str, Any]) -> None:
    optimizer = kit.optimizer(budget=Budget(metric_calls=60), **options)
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    assert len(optimizer.result.candidates) > 1


def test_instructions_that_join_later_are_a_choice() -> None:
    asked: list[int] = []

    def write(messages: list[dict[str, str]]) -> str:
        asked.append(1)
        return kit.answer(messages, new_instructions=kit.MAGIC)

    optimizer = kit.optimizer(
        mode="instructions",
        instruction_candidates=0,
        later_instructions=1,
        proposer=kit.make_lm(write, "proposer"),
        deterministic=True,
        budget=Budget(metric_calls=200),
    )
    with dspy.context(lm=kit.color_lm()):
        program = optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    assert asked == [1]
    assert program.signature.instructions == kit.MAGIC


@pytest.mark.parametrize("deterministic", [False, True])
def test_without_a_demo_the_student_comes_back_after_the_setup(deterministic: bool, caplog: Any) -> None:
    unlabelled = [dspy.Example(message=f"item {number}").with_inputs("message") for number in range(100)]
    lm, student = kit.color_lm(), dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(
        metric=lambda gold, prediction: 0.3,
        mode="demos",
        deterministic=deterministic,
        budget=Budget(metric_calls=300),
    )
    with dspy.context(lm=lm):
        program = optimizer.compile(student, trainset=unlabelled)
    result = optimizer.result
    assert kit.state_of(program) == kit.state_of(student) and result.winner == "student"
    assert result.stopped == "there is nothing to search"
    assert result.metric_calls == kit.calls_of(lm) and not any(one.steps for one in result.workers)
    (said,) = [one.getMessage() for one in caplog.records if "nothing to search" in one.getMessage()]
    assert "no demo was found" in said and "max_demo_tokens=400" in said


def test_demos_that_may_not_leave_their_workers_are_no_choice(caplog: Any) -> None:
    lm = kit.color_lm()
    workers = [
        Worker(name, kit.examples(30, first), share_demos=False) for name, first in (("p", 0), ("q", 30))
    ]
    optimizer = kit.optimizer(workers=workers, mode="demos", budget=Budget(metric_calls=300))
    with dspy.context(lm=lm):
        optimizer.compile(dspy.Predict(kit.Sort))
    assert kit.calls_of(lm) == 2, "the first example of each worker"
    assert "share_demos=False" in caplog.text


def test_a_private_worker_among_others_draws_their_demos() -> None:
    workers = [Worker("p", kit.examples(30), share_demos=False), Worker("q", kit.examples(30, 30))]
    optimizer = kit.optimizer(workers=workers, mode="demos", budget=Budget(metric_calls=120))
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(dspy.Predict(kit.Sort))
    assert all(one.steps for one in optimizer.result.workers)
