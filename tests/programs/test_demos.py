"""Demo arms from labelled examples and from traces."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Any, Literal

import dspy
import numpy as np
import pytest
from dspy.utils.dummies import DummyLM

from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs.demos import bootstrapped_demos, demo_tokens, estimate_tokens, labelled_demos
from asyndbt_dspy.programs.rollout import Rollout, RolloutRunner
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


def test_fields_may_have_the_name_of_an_argument() -> None:
    student = dspy.Predict("base, quote -> rate: float")
    example = dspy.Example({"base": "EUR", "quote": "USD", "rate": 1.1})
    (item,) = labelled_demos(student, [example], worker="w")
    assert dict(item.demo.items()) == {"base": "EUR", "quote": "USD", "rate": 1.1}


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


def test_arrays_are_lists_in_demos_and_repeats_of_them_are_dropped() -> None:
    student = dspy.Predict("passages: list[str], found: dict -> note")
    nested = np.array([{"at": np.arange(2)}, np.float32(0.5)], dtype=object)
    examples = [
        dspy.Example(passages=np.array(["a", last]), found={"more": nested}, note="n")
        for last in ("b", "c", "b")
    ]
    items = labelled_demos(student, examples, worker="eu")
    assert [item.demo.passages for item in items] == [["a", "b"], ["a", "c"]]
    assert items[0].demo.found == {"more": [{"at": [0, 1]}, 0.5]}
    rollout = Rollout(1.0, trace=[(student, dict(examples[0].items()), dspy.Prediction(note="n"))])
    (item,) = bootstrapped_demos(rollout, examples[0], program=student, worker="eu", example_index=0)
    assert item.demo.passages == ["a", "b"] and item.text == items[0].text


@pytest.mark.parametrize("size", [30, 300_000])
def test_images_count_alike_whatever_the_size_of_their_file(size: int) -> None:
    image = dspy.Image("data:image/png;base64," + "A" * size)
    shown = "image: \nlabel: a"
    assert demo_tokens(dspy.Example(image=image, label="a")) == 1024 + estimate_tokens(shown)
    pages = dspy.Example(pages=[image, image], label="a", augmented=True)
    assert demo_tokens(pages, lambda _: 7) == 2048 + 7
    student = dspy.Predict("image: dspy.Image -> label")
    examples = [dspy.Example(image=image, label="a")]
    assert not labelled_demos(student, examples, worker="eu")
    assert labelled_demos(student, examples, worker="eu", max_demo_tokens=1_100)


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
    items = bootstrapped_demos(rollout, example, program=program, worker="eu", example_index=3)
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
    items = bootstrapped_demos(rollout, example, program=program, worker="eu", example_index=0)
    assert [(item.predictor, item.stratum) for item in items] == [
        ("react", "lookup"),
        ("react", "finish"),
        ("extract.predict", "billing"),
    ]
    assert "order 7 is paid" in items[1].demo.trajectory


def test_bad_or_missing_runs_give_no_demos(plain: dspy.Module) -> None:
    example, rollout = traced(plain, [{"label": "billing"}])
    arguments: dict[str, Any] = {"program": plain, "worker": "eu", "example_index": 0}
    for score in (None, 0.0, 0.49):
        assert not bootstrapped_demos(replace(rollout, score=score), example, **arguments)
    assert len(bootstrapped_demos(replace(rollout, score=0.3), example, **arguments, threshold=0.3)) == 1
    # A failure score may be as high as that of a good run.
    failed = replace(rollout, score=0.6, failure=FailureKind.PROGRAM)
    assert not bootstrapped_demos(failed, example, **arguments)


def test_partial_answers_and_foreign_predictors_are_skipped(plain: dspy.Module, kinds: Any) -> None:
    stranger = kinds["plain"].make().classify
    trace = [
        (plain.classify, {"message": "partial"}, dspy.Prediction(other=1)),
        (plain.classify, {"message": "not parsed"}, None),
        (stranger, {"message": "stranger"}, dspy.Prediction(label="other")),
        (plain.classify, {"message": "whole", "extra": 1}, dspy.Prediction(label="other")),
        (plain.classify, {"message": "whole"}, dspy.Prediction(label="other")),
    ]
    rollout = Rollout(1.0, trace=trace)
    items = bootstrapped_demos(rollout, dspy.Example(), program=plain, worker="eu", example_index=0)
    assert [item.demo.toDict() for item in items] == [
        {"augmented": True, "message": "whole", "label": "other"}
    ]


def test_long_bootstrapped_demos_are_reported(plain: dspy.Module, caplog: pytest.LogCaptureFixture) -> None:
    trace = [(plain.classify, {"message": "word " * 300}, dspy.Prediction(label="other"))]
    lengths: list[int] = []
    arguments: dict[str, Any] = {"program": plain, "worker": "eu", "example_index": 0, "max_demo_tokens": 50}
    rollout = Rollout(1.0, trace=trace)
    assert bootstrapped_demos(rollout, dspy.Example(), on_too_long=lengths.append, **arguments) == []
    assert len(lengths) == 1 and lengths[0] > 50 and not caplog.records
    assert bootstrapped_demos(rollout, dspy.Example(), **arguments) == []
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


def demos_of(
    program: dspy.Module, answers: list[dict[str, Any]], student: dspy.Module | None = None, **labels: Any
) -> dict[str, dict[str, Any]]:
    """Fields by key of the demos of a run that scored 0."""
    _, rollout = traced(program, answers, score=0.0)
    example = dspy.Example(message=MESSAGE, **labels)
    items = bootstrapped_demos(
        rollout, example, program=program, student=student, worker="eu", example_index=0
    )
    assert all(item.source == "corrected" for item in items)
    return {item.key: {name: one for name, one in item.demo.items() if name != "augmented"} for item in items}


def test_a_wrong_answer_is_shown_with_the_label_in_its_place() -> None:
    program = TwoSteps()
    example, rollout = traced(program, WRONG, score=0.0)
    (item,) = bootstrapped_demos(
        rollout, example, program=program, worker="eu", example_index=4, shared=False
    )
    # What the first predictor wrote is as it was, so nothing says that it is worth showing; the guess is not explained.
    assert item.demo.toDict() == {"augmented": True, "wish": "money back", "label": "billing"}
    assert (item.predictor, item.stratum, item.source) == ("classify.predict", "billing", "corrected")
    assert (item.key, item.example_index, item.shared) == ("c:eu:classify.predict:4:1", 4, False)


@pytest.mark.parametrize("fields", [{}, {"label": None}, {"label": "billing", "wish": "given"}])
def test_nothing_is_corrected_without_a_label_or_where_the_example_is_a_demo(fields: dict[str, Any]) -> None:
    assert demos_of(TwoSteps(), WRONG, **fields) == {}


def test_each_answer_that_the_program_returned_is_corrected() -> None:
    """Two predictors with reasoning, each with a label of its own."""

    class Both(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.restate = dspy.Predict(Restate)
            self.topic = dspy.ChainOfThought("wish -> topic")
            self.classify = dspy.ChainOfThought("wish, topic -> label")

        def forward(self, message: str) -> dspy.Prediction:
            wish = self.restate(message=message).wish
            topic = self.topic(wish=wish).topic
            return dspy.Prediction(topic=topic, label=self.classify(wish=wish, topic=topic).label)

    answers = [{"wish": "w"}, {"reasoning": "r", "topic": "t"}, {"reasoning": "r", "label": "access"}]
    assert demos_of(Both(), answers, topic="money", label="billing") == {
        "c:eu:topic.predict:0:1": {"wish": "w", "topic": "money"},
        "c:eu:classify.predict:0:2": {"wish": "w", "topic": "t", "label": "billing"},
    }


def test_a_step_on_the_way_is_not_corrected() -> None:
    """The labels are of what the program returned, not of what happens to have the same field."""

    class Draft(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.restate = dspy.Predict(Restate)
            self.draft = dspy.Predict("wish -> label")
            self.refine = dspy.Predict("wish, draft -> label")

        def forward(self, message: str) -> dspy.Prediction:
            wish = self.restate(message=message).wish
            return self.refine(wish=wish, draft=self.draft(wish=wish).label)

    same = [{"wish": "w"}, {"label": "access"}, {"label": "access"}]
    assert list(demos_of(Draft(), same, label="billing")) == ["c:eu:refine:0:2"]

    class Changed(Draft):
        def forward(self, message: str) -> dspy.Prediction:
            return dspy.Prediction(label=f"{super().forward(message).label}!")

    assert demos_of(Changed(), same, label="billing") == {}


def test_votes_are_not_corrected() -> None:
    class Votes(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.restate = dspy.Predict(Restate)
            self.vote = dspy.Predict("wish, part -> label")

        def forward(self, message: str) -> dspy.Prediction:
            wish = self.restate(message=message).wish
            return [self.vote(wish=wish, part=one) for one in ("a", "b")][-1]

    answers = [{"wish": "w"}, {"label": "access"}, {"label": "access"}]
    assert demos_of(Votes(), answers, label="billing") == {}


def test_a_run_whose_last_answer_cannot_be_read_is_not_corrected() -> None:
    """DSPy's trace ends before the call that failed: its last entry is a step on the way."""

    class Hops(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = dspy.Predict("message -> wish")
            self.second = dspy.Predict("wish -> label")
            self.third = dspy.Predict("wish, hint -> label: int")

        def forward(self, message: str) -> dspy.Prediction:
            wish = self.first(message=message).wish
            return self.third(wish=wish, hint=self.second(wish=wish).label)

    _, rollout = traced(Hops(), [{"wish": "w"}, {"label": "x"}, {"label": "no number"}], score=0.0)
    assert rollout.failure is FailureKind.PROGRAM and rollout.prediction is None and len(rollout.trace) == 2
    assert demos_of(Hops(), [{"wish": "w"}, {"label": "x"}, {"label": "no number"}], label=1) == {}


def test_a_teacher_s_traces_are_demos_of_the_student_s_fields() -> None:
    class Plain(dspy.Module):
        def __init__(self, wanted: str) -> None:
            super().__init__()
            self.restate = dspy.Predict(Restate)
            self.classify = dspy.Predict(wanted)

        def forward(self, message: str) -> dspy.Prediction:
            return self.classify(wish=self.restate(message=message).wish)

    teacher, student = Plain("wish -> why, label"), Plain("wish -> label")
    answers = [{"wish": "w"}, {"why": "y", "label": "access"}]
    labels = {"label": "billing", "why": "z"}
    assert demos_of(teacher, answers, student, **labels) == {
        "c:eu:classify:0:1": {"wish": "w", "label": "billing"}
    }
    # The student asks for what neither the teacher nor the example tells.
    assert (
        demos_of(
            Plain("wish -> label"),
            [{"wish": "w"}, {"label": "access"}],
            Plain("wish -> team, label"),
            label="b",
        )
        == {}
    )
    example, rollout = traced(teacher, answers)
    items = bootstrapped_demos(
        rollout, example, program=teacher, student=student, worker="eu", example_index=0
    )
    assert items[-1].demo.toDict() == {"augmented": True, "wish": "w", "label": "access"}
