from __future__ import annotations

import asyncio

import dspy
import pytest
from quality_bench import counting, lms, measure, tasks

TASK = tasks.TASKS["sst2"]


@pytest.fixture
def pair() -> lms.Lms:
    return measure.half_right_lms(TASK)


def test_calls_are_counted_by_role(pair: lms.Lms) -> None:
    calls = pair.book.start(0)
    with dspy.context(lm=pair.task, adapter=dspy.JSONAdapter()):
        program = TASK.build()
        program(sentence="example 1")
        asyncio.run(program.acall(sentence="example 2"))
        program.deepcopy()(sentence="example 3")
        with dspy.context(lm=pair.proposer):
            program(sentence="example 4")
    assert (calls.of("task"), calls.of("proposer")) == (3, 1)


def test_copies_of_an_lm_and_several_completions_count_one_by_one(pair: lms.Lms) -> None:
    calls = pair.book.start(0)
    with dspy.context(lm=pair.task.copy(temperature=1.0), adapter=dspy.JSONAdapter()):
        dspy.Predict(tasks.Sst2, n=3)(sentence="example 1")
    assert calls.of("task") == 3


def test_a_new_count_starts_at_zero(pair: lms.Lms) -> None:
    first = pair.book.start(0)
    with dspy.context(lm=pair.task, adapter=dspy.JSONAdapter()):
        TASK.build()(sentence="example 1")
        second = pair.book.start(0)
        TASK.build()(sentence="example 2")
    assert (first.of("task"), second.of("task")) == (1, 1)


def test_sampled_answers_get_seeds_that_a_rerun_repeats() -> None:
    first, second, other = counting.Calls(1), counting.Calls(1), counting.Calls(2)
    drawn = [first.add("task", "a"), first.add("task", "a"), first.add("task", "b")]
    assert drawn == [second.add("task", text) for text in ("a", "a", "b")]
    assert len(set(drawn)) == 3
    assert other.add("task", "a") not in drawn


def test_free_text_is_bounded_and_labels_are_not() -> None:
    schema = {
        "type": "json_schema",
        "schema": {
            "properties": {
                "keywords": {"type": "string"},
                "label": {"type": "string", "enum": ["a", "b"]},
                "words": {"type": "array", "items": {"type": "string"}},
            }
        },
    }
    fields = counting.bounded(schema, 50)["schema"]["properties"]
    assert fields["keywords"]["maxLength"] == 50
    assert "maxLength" not in fields["label"]
    assert fields["words"]["items"]["maxLength"] == 50
    assert "maxLength" not in schema["schema"]["properties"]["keywords"]


def test_the_metric_counts_and_explains() -> None:
    metric = counting.CountedMetric(feedback=True)
    gold = dspy.Example(label="positive")
    assert metric(gold, dspy.Prediction(label="negative")).score == 0
    assert "'positive'" in metric(gold, None, None, None, None).feedback
    assert metric.calls == 2
    assert counting.CountedMetric()(gold, dspy.Prediction(label="positive")) is True
