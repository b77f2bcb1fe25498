"""Demo arms from labelled examples and from traces."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

import dspy
import pytest
from dspy.utils.dummies import DummyLM

from asyndbt_dspy.programs.demos import bootstrapped_demos, demo_tokens, estimate_tokens, labelled_demos
from asyndbt_dspy.programs.rollout import RolloutRunner
from asyndbt_dspy.programs.slots import build_space, demo_slots

MESSAGE = "My card was charged twice"


def test_labelled_demos_of_every_kind(kinds: Any, examples: list[dspy.Example]) -> None:
    labels = ["billing", "access", "other"] * 2
    expected = {
        "predict": ["self"],
        "chain_of_thought": ["predict"],  # without the reasoning, as DSPy allows
        "react": [],  # no example holds a trajectory
        "nested": ["inner.predict"],  # topics and urgency are not labelled
        "shared": ["first"],
        "async_only": ["classify"],
        "plain": ["classify"],
    }
    for name, predictors in expected.items():
        items = labelled_demos(kinds[name].make(), examples, worker="eu")
        assert [item.key for item in items] == [f"d:eu:{p}:{n}" for p in predictors for n in range(6)], name
        assert [item.stratum for item in items] == labels * len(predictors)
        for item in items:
            assert item.source == "labelled" and item.shared and item.home == "eu"
            assert item.demo.toDict() == examples[item.example_index].toDict()


def test_only_fields_of_the_signature_are_shown(plain: dspy.Module) -> None:
    example = dspy.Example(message="m", label="other", customer="secret").with_inputs("message", "customer")
    (item,) = labelled_demos(plain, [example], worker="lab", shared=False)
    assert item.demo.toDict() == {"message": "m", "label": "other"}
    assert not item.shared


def test_incomplete_examples_give_no_demo(plain: dspy.Module) -> None:
    examples = [
        dspy.Example(message="no label"),
        dspy.Example(label="other"),
        dspy.Example(message="label unknown", label=None),
    ]
    assert labelled_demos(plain, examples, worker="eu") == []


def test_optional_inputs_may_be_absent() -> None:
    class Answer(dspy.Signature):
        question: str = dspy.InputField()
        hint: str | None = dspy.InputField()
        tone: str = dspy.InputField(default="kind")
        verdict: Literal["yes", "no"] | None = dspy.OutputField()

    examples = [dspy.Example(question="q", verdict="yes"), dspy.Example(question="r", verdict=None)]
    items = labelled_demos(dspy.Predict(Answer), examples, worker="eu")
    assert [item.stratum for item in items] == ["yes", None]


def test_repeats_are_dropped(plain: dspy.Module, examples: list[dspy.Example]) -> None:
    items = labelled_demos(plain, [*examples, *examples], worker="eu")
    assert [item.example_index for item in items] == list(range(6))


def test_enum_and_unhashable_values(queue: Any) -> None:
    signature = dspy.Signature("tags: list[str] -> note").append("label", dspy.OutputField(), type_=queue)
    examples = [
        dspy.Example(tags=["a"], note="n", label=value) for value in (queue.BILLING, "access", "ACCESS")
    ]
    items = labelled_demos(dspy.Predict(signature), [*examples, examples[0].copy()], worker="eu")
    assert [item.stratum for item in items] == ["billing", "access", "access"]


def test_long_demos_are_left_out_with_one_warning(
    plain: dspy.Module, caplog: pytest.LogCaptureFixture
) -> None:
    examples = [dspy.Example(message="word " * words, label="other") for words in (5, 300, 400)]
    with caplog.at_level(logging.WARNING):
        items = labelled_demos(plain, examples, worker="eu", max_demo_tokens=50)
    assert [item.example_index for item in items] == [0]
    (record,) = caplog.records
    assert "2 labelled demos" in record.getMessage()
    assert "max_demo_tokens=50" in record.getMessage()
    assert str(demo_tokens(examples[2])) in record.getMessage()
    assert (
        len(labelled_demos(plain, examples, worker="eu", max_demo_tokens=50, count_tokens=lambda _: 1)) == 3
    )


def test_token_estimate() -> None:
    assert estimate_tokens("") == 0
    assert estimate_tokens("one two three four") == 6  # 1.3 per word
    assert estimate_tokens("x" * 100) == 25  # a quarter of the characters


def traced(program: dspy.Module, answers: list[dict[str, Any]], score: float = 1.0) -> Any:
    runner = RolloutRunner(lambda gold, prediction: score)
    example = dspy.Example(message=MESSAGE, label="billing").with_inputs("message")
    return example, asyncio.run(runner.run(program, example, lm=DummyLM(answers), trace=True))


def test_bootstrapped_demos_of_every_kind(kind: Any) -> None:
    student = kind.make()
    program = build_space(student).build([0] * len(student.named_predictors()))
    example, rollout = traced(program, kind.answers)
    assert rollout.failure is None, rollout.error
    items = bootstrapped_demos(
        rollout.trace, example, rollout.score, program=program, worker="eu", example_index=3
    )
    assert {item.predictor for item in items} == {name for name, _ in student.named_predictors()}
    signatures = {name: predictor.signature for name, predictor in student.named_predictors()}
    for item in items:
        assert set(item.demo.keys()) == {"augmented", *signatures[item.predictor].fields}
        assert item.demo.augmented and item.source == "bootstrapped" and item.example_index == 3
        assert item.tokens == demo_tokens(item.demo) > 0
    assert len({item.key for item in items}) == len(items)
    final = [item for item in items if item.predictor == kind.last]
    assert final[-1].stratum == "billing"
    # They can be used as demos of the student.
    made = build_space(student, demos=items, slots=demo_slots(student, demo_slots=1))
    filled = [min(1, len(block.arms) - 1) for block in made.space.upper]
    shown = made.build([0] * len(made.space.lower) + filled)
    assert all(predictor.demos for _, predictor in shown.named_predictors())


def test_each_react_step_is_a_demo_of_its_tool(kinds: Any) -> None:
    program = kinds["react"].make()
    example, rollout = traced(program, kinds["react"].answers)
    items = bootstrapped_demos(rollout.trace, example, 1.0, program=program, worker="eu", example_index=0)
    assert [(item.predictor, item.stratum) for item in items] == [
        ("react", "lookup"),
        ("react", "finish"),
        ("extract.predict", "billing"),
    ]
    assert "order 7 is paid" in items[1].demo.trajectory


def test_bad_or_missing_runs_give_no_demos(plain: dspy.Module) -> None:
    example, rollout = traced(plain, [{"label": "billing"}])
    for score in (None, 0.0, 0.49):
        assert not bootstrapped_demos(
            rollout.trace, example, score, program=plain, worker="eu", example_index=0
        )
    kept = bootstrapped_demos(
        rollout.trace, example, 0.3, program=plain, worker="eu", example_index=0, threshold=0.3
    )
    assert len(kept) == 1


def test_partial_answers_and_foreign_predictors_are_skipped(plain: dspy.Module, kinds: Any) -> None:
    stranger = kinds["plain"].make().classify
    trace = [
        (plain.classify, {"message": "partial"}, dspy.Prediction(other=1)),
        (plain.classify, {"message": "not parsed"}, None),
        (stranger, {"message": "stranger"}, dspy.Prediction(label="other")),
        (plain.classify, {"message": "whole", "extra": 1}, dspy.Prediction(label="other")),
        (plain.classify, {"message": "whole"}, dspy.Prediction(label="other")),
    ]
    items = bootstrapped_demos(trace, dspy.Example(), 1.0, program=plain, worker="eu", example_index=0)
    assert [item.demo.toDict() for item in items] == [
        {"augmented": True, "message": "whole", "label": "other"}
    ]


def test_long_bootstrapped_demos_are_reported(plain: dspy.Module, caplog: pytest.LogCaptureFixture) -> None:
    trace = [(plain.classify, {"message": "word " * 300}, dspy.Prediction(label="other"))]
    lengths: list[int] = []
    arguments: dict[str, Any] = {"program": plain, "worker": "eu", "example_index": 0, "max_demo_tokens": 50}
    assert bootstrapped_demos(trace, dspy.Example(), 1.0, on_too_long=lengths.append, **arguments) == []
    assert len(lengths) == 1 and lengths[0] > 50 and not caplog.records
    assert bootstrapped_demos(trace, dspy.Example(), 1.0, **arguments) == []
    assert "1 bootstrapped demos" in caplog.records[0].getMessage()


class Restate(dspy.Signature):
    """Say it in other words."""

    message: str = dspy.InputField()
    wish: str = dspy.OutputField()


class Classify(dspy.Signature):
    """Choose a queue."""

    wish: str = dspy.InputField()
    label: Literal["billing", "access"] = dspy.OutputField()


class TwoSteps(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.restate = dspy.Predict(Restate)
        self.classify = dspy.ChainOfThought(Classify)

    def forward(self, message: str) -> dspy.Prediction:
        return self.classify(wish=self.restate(message=message).wish)


WRONG = [{"wish": "money back"}, {"reasoning": "a guess", "label": "access"}]


def test_a_wrong_answer_is_shown_with_the_label_in_its_place() -> None:
    program = TwoSteps()
    example, rollout = traced(program, WRONG, score=0.0)
    (item,) = bootstrapped_demos(
        rollout.trace, example, 0.0, program=program, worker="eu", example_index=4, shared=False
    )
    # What the first predictor wrote is as it was, so nothing says that it is worth showing; the guess is not explained.
    assert item.demo.toDict() == {"augmented": True, "wish": "money back", "label": "billing"}
    assert (item.predictor, item.stratum, item.source) == ("classify.predict", "billing", "corrected")
    assert (item.key, item.example_index, item.shared) == ("c:eu:classify.predict:4:1", 4, False)


def test_only_the_last_answer_is_corrected() -> None:
    """The labels are of what the program returned, not of a step on the way that happens to have the same field."""
    program = TwoSteps()
    step = (program.classify.predict, {"wish": "first"}, dspy.Prediction(reasoning="r", label="access"))
    last = (program.classify.predict, {"wish": "second"}, None)  # its answer was not even parsed
    example = dspy.Example(message=MESSAGE, label="billing")
    items = bootstrapped_demos([step, last], example, 0.0, program=program, worker="eu", example_index=0)
    assert [item.demo.wish for item in items] == ["second"]


@pytest.mark.parametrize("fields", [{}, {"label": None}, {"label": "billing", "wish": "given"}])
def test_nothing_is_corrected_without_a_label_or_where_the_example_is_a_demo(fields: dict[str, Any]) -> None:
    program = TwoSteps()
    _, rollout = traced(program, WRONG, score=0.0)
    example = dspy.Example(message=MESSAGE, **fields)
    found = bootstrapped_demos(rollout.trace, example, 0.0, program=program, worker="eu", example_index=0)
    assert found == []
