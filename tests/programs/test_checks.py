"""Bad input is refused in words that name the value, the bound and the remedy, before any LM call."""

from __future__ import annotations

import logging
from typing import Any

import dspy
import pytest

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs.checks import (
    check_context,
    check_examples,
    check_inputs,
    check_overlap,
    check_student,
)


class Empty(dspy.Module):
    def forward(self, message: str) -> dspy.Prediction:
        return dspy.Prediction(label="other")


def example(**fields: Any) -> dspy.Example:
    return dspy.Example(**fields)


def test_good_input_of_every_kind_passes(
    kind: Any, examples: list[dspy.Example], caplog: pytest.LogCaptureFixture
) -> None:
    assert check_inputs(kind.make(), examples[:4], valset=examples[4:], context_tokens=2048) == 0
    assert not caplog.records


def test_a_student_without_predictors() -> None:
    with pytest.raises(ConfigurationError, match=r"Empty has 0 predictors.*at least one dspy\.Predict"):
        check_student(Empty())
    with pytest.raises(ConfigurationError, match=r"must be a dspy\.Module, got function"):
        check_student(lambda message: message)


def test_a_frozen_student_says_so(plain: dspy.Module) -> None:
    plain._compiled = True
    outer = Empty()
    outer.inner = plain
    with pytest.raises(ConfigurationError, match=r"frozen.*self\.inner"):
        check_student(outer)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], r"trainset has 0 examples; it needs at least 1"),
        ([{"message": "m"}], r"trainset\[0\] is a dict; make it a dspy\.Example"),
        (
            [example(message="m", label="other")],
            r"trainset\[0\] does not say.*with_inputs.*'message', 'label'",
        ),
        ([example(message="m", label="other").with_inputs()], r"does not say which fields are inputs"),
        (
            [example(message="m", label="other").with_inputs("message", "label")],
            r"trainset\[0\] lists \['label'\] in with_inputs.*leave labels out",
        ),
    ],
)
def test_bad_examples(plain: dspy.Module, examples: list[Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_inputs(plain, examples)


def test_a_bad_valset_is_called_a_valset(plain: dspy.Module, examples: list[dspy.Example]) -> None:
    with pytest.raises(ConfigurationError, match="valset of worker 'eu' has 0 examples"):
        check_inputs(plain, examples, valset=[], name="trainset of worker 'eu'")


def test_an_output_that_another_predictor_takes_may_be_an_input() -> None:
    class Refine(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criticize = dspy.Predict("draft -> remarks")
            self.rewrite = dspy.Predict("remarks -> draft")

    check_examples(Refine(), [example(draft="d").with_inputs("draft")])


def test_unknown_labels_are_reported(plain: dspy.Module, caplog: pytest.LogCaptureFixture) -> None:
    given = [example(message="m", label=label).with_inputs("message") for label in ("other", "Acess", None)]
    check_examples(plain, given, name="trainset")
    (record,) = caplog.records
    message = record.getMessage()
    assert "1 of 3 examples, the first trainset[1]" in message and "'access'" in message
    assert "Acess" not in message, "values may be private"


def test_an_overlapping_valset_is_counted(
    plain: dspy.Module, examples: list[dspy.Example], caplog: pytest.LogCaptureFixture
) -> None:
    relabelled = example(message=examples[0].message, label="other").with_inputs("message")
    assert check_overlap(examples[:3], [relabelled, examples[2], examples[4]]) == 2
    assert "2 of 3 examples of the valset" in caplog.records[0].getMessage()
    caplog.clear()
    assert check_overlap(examples[:3], examples[3:]) == 0 and not caplog.records
    unhashable = [example(tags=["a"]).with_inputs("tags")]
    assert check_overlap(unhashable, unhashable) == 1


class TestContext:
    def test_a_demo_longer_than_the_context(self, plain: dspy.Module) -> None:
        long = [example(message="word " * 1000, label="other").with_inputs("message")]
        with pytest.raises(
            ConfigurationError, match=r"max_demo_tokens=4000 .*1304.*context is 512.*well below 512"
        ):
            check_context(plain, long, context_tokens=512, max_demo_tokens=4000)

    def test_an_example_longer_than_the_context(
        self, plain: dspy.Module, caplog: pytest.LogCaptureFixture
    ) -> None:
        long = [example(message="word " * 1000, label="other").with_inputs("message")]
        check_context(plain, long, context_tokens=lambda: 512)
        assert "about 1304 tokens, the LM's context is 512" in caplog.records[0].getMessage()

    def test_the_students_own_demos(self, plain: dspy.Module, examples: list[dspy.Example]) -> None:
        plain.classify.demos = [example(message="word " * 1000, label="other")]
        with pytest.raises(ConfigurationError, match=r"'classify'.*demos of the student.*context is 512"):
            check_context(plain, examples, context_tokens=512)

    def test_full_slots(
        self, plain: dspy.Module, examples: list[dspy.Example], caplog: pytest.LogCaptureFixture
    ) -> None:
        long = [example(message="word " * 100, label="other").with_inputs("message")]
        check_context(plain, long, context_tokens=512, slots={"classify": (None,) * 2})
        assert not caplog.records
        check_context(plain, long, context_tokens=512, slots={"classify": (None,) * 4})
        assert "max_demo_tokens=400" in caplog.records[0].getMessage()

    def test_an_unknown_context_is_not_checked(self, plain: dspy.Module) -> None:
        long = [example(message="word " * 1000, label="other").with_inputs("message")]
        check_context(plain, long, context_tokens=None, max_demo_tokens=4000)
        check_context(plain, long, context_tokens=lambda: None, max_demo_tokens=4000)

    def test_the_lms_own_tokenizer_is_used(
        self, plain: dspy.Module, caplog: pytest.LogCaptureFixture
    ) -> None:
        long = [example(message="word " * 1000, label="other").with_inputs("message")]
        with caplog.at_level(logging.WARNING):
            check_context(plain, long, context_tokens=512, max_demo_tokens=4000, count_tokens=lambda _: 7)
        assert not caplog.records
