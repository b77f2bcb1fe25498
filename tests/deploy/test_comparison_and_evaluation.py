"""What differs between two artifacts, and how a saved program scores."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from pathlib import Path
from typing import Any

import artifact_kit as kit
import dspy
import pydantic
import pytest
from dspy.lm15 import AuthError, Message, RateLimitError, TextPart

from asyndbt_dspy.deploy import diff, evaluate_artifact, save_artifact
from asyndbt_dspy.deploy.comparison import word_changes
from asyndbt_dspy.deploy.evaluation import mean_interval
from asyndbt_dspy.errors import ArtifactError, ConfigurationError, MetricError


def test_diff_says_which_words_demos_and_scores_differ(tmp_path: Path) -> None:
    old, new = kit.tuned("two_steps"), kit.tuned("two_steps")
    old.summarize.signature = old.summarize.signature.with_instructions("Write one short sentence.")
    new.summarize.signature = new.summarize.signature.with_instructions("Write one clear, short sentence.")
    first, second, third = new.decide.predict.demos
    new.decide.predict.demos = [
        second,
        first,
        dspy.Example(summary="s", message="m", reasoning="r", answer="a"),
    ]
    a = save_artifact(old, tmp_path / "a", result={"score": 0.5})
    b = save_artifact(new, tmp_path / "b", result={"score": 0.75}, adapter=dspy.JSONAdapter())
    found = diff(a, b)
    assert str(found.instructions[0]) == "Write one {+clear, +}short sentence."
    (demos,) = found.demos
    assert demos.predictor == "decide.predict"
    assert [demo["answer"] for demo in demos.added] == ["a"]
    assert [demo["answer"] for demo in demos.removed] == [third["answer"]]
    assert demos.reordered
    assert found.scores == {"score": (0.5, 0.75)}
    assert any(line.startswith("adapter:") for line in found.other)
    assert "{+clear, +}" in str(found)
    assert "order changed" in str(found)
    assert not diff(a, a)
    assert str(diff(a, a)) == "no difference"


@pytest.mark.parametrize(
    ("old", "new"), [("", "a b"), ("a  b\nc", "a b\nd"), ("x y z", "z y x"), ("same", "same")]
)
def test_the_pieces_of_a_word_diff_make_both_texts(old: str, new: str) -> None:
    pieces = word_changes(old, new)
    assert "".join(text for kind, text in pieces if kind != "added") == old
    assert "".join(text for kind, text in pieces if kind != "removed") == new


def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> float:
    return float(prediction.label == "low")


async def async_metric(gold: dspy.Example, prediction: dspy.Prediction) -> dspy.Prediction:
    await asyncio.sleep(0)
    return dspy.Prediction(score=metric(gold, prediction))


def test_evaluation_scores_what_the_program_in_memory_scores(tmp_path: Path) -> None:
    program, data = kit.tuned("single"), kit.examples("single", 30)
    path = save_artifact(program, tmp_path / "a")
    with dspy.context(lm=kit.hash_lm()):
        expected = [metric(example, program(**example.inputs().toDict())) for example in data]
    for chosen in (metric, async_metric):
        found = evaluate_artifact(path, data, chosen, lm=kit.hash_lm())
        assert list(found.scores) == expected
        assert found.score == pytest.approx(sum(expected) / len(expected))
        assert found.interval[0] < found.score < found.interval[1]
        assert found.calls == len(data)
        assert found.seconds_per_call["p95"] >= found.seconds_per_call["median"] > 0
        assert found.tokens_per_call["input"] > 100
        assert (found.failures, found.missing, found.dollars_per_call) == (0, 0, None)


class FlakyEngine(kit.HashEngine):
    """Cannot be reached for one example, and answers nonsense for another."""

    def complete(self, request: Any) -> Any:
        said = request.messages[-1].text
        if "message 3 " in said:
            raise RateLimitError("slow down")
        if "message 4 " in said:
            raise ValueError("a broken program")
        return super().complete(request)


def test_an_unreachable_lm_is_missing_and_a_broken_program_scores_zero(tmp_path: Path) -> None:
    path = save_artifact(kit.tuned("single"), tmp_path / "a")
    lm = dspy.LM("test/flaky", engine=FlakyEngine(), cache=False, num_retries=0)
    found = evaluate_artifact(path, kit.examples("single"), metric, student=kit.single(), lm=lm)
    assert found.scores[3] is None
    assert found.scores[4] == 0.0
    assert (found.failures, found.missing) == (1, 1)
    with pytest.raises(ArtifactError, match="could not be reached"):
        evaluate_artifact(path, kit.examples("single")[3:4], metric, lm=lm)


class Order(pydantic.BaseModel):
    item: str


class TypedInputs(dspy.Module):
    """Uses its inputs as what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("text -> label")

    def forward(self, order: Order, history: dspy.History, earlier: dspy.Example) -> dspy.Prediction:
        return self.predict(text=f"{order.item} {len(history.messages)} {earlier.label}")


def test_inputs_reach_the_program_as_they_are(tmp_path: Path) -> None:
    path = save_artifact(TypedInputs(), tmp_path / "a")
    inputs = {
        "order": Order(item="lamp"),
        "history": dspy.History(messages=[{"text": "hello"}]),
        "earlier": dspy.Example(label="low"),
    }
    data = [dspy.Example(**inputs).with_inputs(*inputs)]
    found = evaluate_artifact(path, data, lambda *_: True, student=TypedInputs(), lm=kit.hash_lm())
    assert (found.score, found.failures, found.calls) == (1.0, 0, 1)


class JudgedBy(dspy.Module):
    """A metric whose forward has a trace of its own."""

    def forward(self, example: Any, pred: Any, trace: Any = None) -> float:
        return metric(example, pred)


@pytest.mark.parametrize(
    "form",
    [
        lambda gold, prediction, trace: metric(gold, prediction) if trace is None else 0.0,
        lambda gold, prediction, *, trace: metric(gold, prediction) if trace is None else 0.0,
        JudgedBy(),
    ],
)
def test_a_metric_takes_what_a_compile_gives_it(form: Any, tmp_path: Path) -> None:
    path, data = save_artifact(kit.tuned("single"), tmp_path / "a"), kit.examples("single")
    expected = evaluate_artifact(path, data, metric, lm=kit.hash_lm()).scores
    assert 1.0 in expected
    assert evaluate_artifact(path, data, form, lm=kit.hash_lm()).scores == expected


class RefusingEngine(kit.HashEngine):
    def __init__(self, error: Exception, where: str = "message") -> None:
        super().__init__()
        self.error = error
        self.where = where

    def complete(self, request: Any) -> Any:
        if self.where in request.messages[-1].text:
            raise self.error
        return super().complete(request)


@pytest.mark.parametrize("error", [AuthError("401 bad key"), TimeoutError("late"), ConnectionError("cut")])
def test_an_lm_that_refuses_its_key_or_is_not_there_gives_no_score(error: Exception, tmp_path: Path) -> None:
    path, data = save_artifact(kit.tuned("single"), tmp_path / "a"), kit.examples("single")
    lm = dspy.LM("test/off", engine=RefusingEngine(error), cache=False, num_retries=0)
    with pytest.raises(ArtifactError, match="none of 12 examples could be run"):
        evaluate_artifact(path, data, metric, lm=lm)
    lm = dspy.LM("test/once", engine=RefusingEngine(error, "message 3 "), cache=False, num_retries=0)
    found = evaluate_artifact(path, data, metric, lm=lm)
    assert (found.scores[3], found.failures, found.missing) == (None, 0, 1)


class ToolOff(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.predict = dspy.Predict("message -> label")

    def forward(self, message: str) -> dspy.Prediction:
        if "message 0 " in message:
            return self.predict(message=message)
        raise ConnectionError("the program's own tool")


def test_a_tool_that_cannot_be_reached_is_the_programs_failure(tmp_path: Path) -> None:
    path = save_artifact(ToolOff(), tmp_path / "a")
    data = kit.examples("two_steps", 4)
    found = evaluate_artifact(path, data, lambda *_: 1.0, student=ToolOff(), lm=kit.hash_lm())
    assert (found.scores, found.failures, found.missing) == ((1.0, 0.0, 0.0, 0.0), 3, 0)
    assert found.errors == (None, *['ConnectionError("the program\'s own tool")'] * 3)


def test_a_program_that_always_raises_is_no_measured_zero(tmp_path: Path) -> None:
    path = save_artifact(ToolOff(), tmp_path / "a")
    data = kit.examples("two_steps", 4)[1:]
    with pytest.raises(ArtifactError, match=r"each of the 3 examples.*the program's own tool"):
        evaluate_artifact(path, data, metric, student=ToolOff(), lm=kit.hash_lm())


def test_answers_that_never_parse_are_a_measured_zero(tmp_path: Path) -> None:
    class Babbling(kit.HashEngine):
        def complete(self, request: Any) -> Any:
            return dataclasses.replace(
                super().complete(request), message=Message.assistant([TextPart("I would rather not")])
            )

    path = save_artifact(kit.tuned("single"), tmp_path / "a")
    lm = dspy.LM("test/babbling", engine=Babbling(), cache=False)
    found = evaluate_artifact(path, kit.examples("single"), metric, lm=lm)
    assert (found.score, found.failures, found.missing) == (0.0, 12, 0)
    assert all("AdapterParseError" in str(error) for error in found.errors)


def test_without_an_lm_nothing_is_measured_unless_the_program_brings_one(tmp_path: Path) -> None:
    path, data = save_artifact(kit.tuned("single"), tmp_path / "a"), kit.examples("single")
    with pytest.raises(ConfigurationError, match=r"no LM for the predictors \['self'\].*lm="):
        evaluate_artifact(path, data, metric)
    path = save_artifact(BringsAnLM(), tmp_path / "b")
    assert evaluate_artifact(path, data, metric, student=BringsAnLM()).failures == 0


def test_calls_of_every_lm_of_the_program_count_and_those_of_the_metric_do_not(tmp_path: Path) -> None:
    path, data = save_artifact(BringsAnLM(), tmp_path / "a"), kit.examples("single")
    judge = kit.hash_lm()

    def judged(gold: dspy.Example, prediction: dspy.Prediction) -> float:
        dspy.Predict("label -> answer")(label=prediction.label)
        return 1.0

    with dspy.context(disable_history=True, max_history_size=0):
        found = evaluate_artifact(path, data, judged, student=BringsAnLM(), lm=judge)
    assert len(judge.engine.prompts) == len(data), "the metric's own"
    assert found.calls == len(data)
    assert found.tokens_per_call["input"] > 100
    assert found.seconds_per_call["p95"] >= found.seconds_per_call["median"] > 0


def test_calls_count_beyond_the_longest_history(tmp_path: Path) -> None:
    path, data = save_artifact(kit.tuned("two_steps"), tmp_path / "a"), kit.examples("two_steps")
    lm = kit.hash_lm()
    with dspy.context(max_history_size=3):
        found = evaluate_artifact(path, data, lambda *_: 1.0, student=kit.TwoSteps(), lm=lm)
    assert (found.calls, len(lm.history)) == (2 * len(data), 3)


class BringsAnLM(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classify = kit.single()

    def forward(self, message: str, tags: list[str]) -> dspy.Prediction:
        with dspy.context(lm=kit.hash_lm()):
            return self.classify(message=message, tags=tags)


def test_a_metric_that_always_raises_is_no_measured_zero(tmp_path: Path) -> None:
    path, data = save_artifact(kit.tuned("single"), tmp_path / "a"), kit.examples("single")

    def broken(gold: dspy.Example, prediction: dspy.Prediction) -> float:
        return float(gold.no_such_field == prediction.label)

    with pytest.raises(MetricError, match=r"'broken' raised for each of the 12 .*no_such_field"):
        evaluate_artifact(path, data, broken, lm=kit.hash_lm())

    def breaks_once(gold: dspy.Example, prediction: dspy.Prediction) -> float:
        return broken(gold, prediction) if "message 3 " in gold.message else 1.0

    found = evaluate_artifact(path, data, breaks_once, lm=kit.hash_lm())
    assert (found.scores[3], found.failures, found.missing) == (0.0, 1, 0)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    path = save_artifact(kit.tuned("single"), tmp_path / "a")
    with pytest.raises(ConfigurationError):
        evaluate_artifact(path, [], metric, lm=kit.hash_lm())
    with pytest.raises(ConfigurationError, match="with_inputs"):
        evaluate_artifact(path, [dspy.Example(message="a", tags=[])], metric, lm=kit.hash_lm())
    with pytest.raises(ConfigurationError, match="must take"):
        evaluate_artifact(path, kit.examples("single"), lambda gold: 1.0, lm=kit.hash_lm())
    with pytest.raises(MetricError, match="None"):
        evaluate_artifact(path, kit.examples("single"), lambda gold, prediction: None, lm=kit.hash_lm())


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_an_interval_of_rates_lies_within_0_and_1(score: float) -> None:
    for count in range(1, 300):
        low, high = mean_interval([score] * count)
        assert 0.0 <= low <= score <= high <= 1.0


def test_intervals() -> None:
    low, high = mean_interval([1.0] * 8 + [0.0] * 2)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = mean_interval([0.2, 0.4, 0.6])
    assert (low + high) / 2 == pytest.approx(0.4)
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / math.sqrt(3), rel=1e-3)
