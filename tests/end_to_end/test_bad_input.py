"""What cannot work is refused before the LM is asked, with the value and the remedy in the message."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import kit
import numpy as np
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, ProgramFailedError, Worker
from asyndbt_dspy.programs.demos import bootstrapped_demos
from asyndbt_dspy.programs.rollout import RolloutRunner


class Empty(dspy.Module):
    def forward(self, message: str) -> dspy.Prediction:
        return dspy.Prediction(label="red")


def no_inputs(count: int) -> list[dspy.Example]:
    return [dspy.Example(message=f"item {number}", label="red") for number in range(count)]


def labels_as_inputs(count: int) -> list[dspy.Example]:
    return [one.with_inputs("message", "label") for one in kit.examples(count)]


def compiled(
    trainset: Any = None, student: Any = None, valset: Any = None, teacher: Any = None, **options: Any
) -> AsynDBT:
    optimizer = kit.optimizer(budget=Budget(metric_calls=40), **options)
    student = dspy.Predict(kit.Sort) if student is None else student
    optimizer.compile(student, trainset=trainset, valset=valset, teacher=teacher)
    return optimizer


def long_examples(count: int) -> list[dspy.Example]:
    return [
        dspy.Example(message="word " * 400 + f"item {number}", label="red").with_inputs("message")
        for number in range(count)
    ]


def shard(name: str = "w", count: int = 20) -> Worker:
    return Worker(name, kit.examples(count))


CASES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "empty trainset": (lambda: compiled([]), ["0 examples", "at least 1"]),
    "no trainset": (lambda: compiled(None), ["0 examples", "at least 1"]),
    "empty shard": (lambda: Worker("w", []), ["'w'", "0 training examples", "give it at least"]),
    "empty valset of a worker": (
        lambda: compiled(workers=[Worker("w", kit.examples(20), valset=[])], student=None),
        ["valset of worker 'w'", "0 examples"],
    ),
    "shard below the minibatch": (
        lambda: compiled(workers=[shard("big"), shard("small", 5)], config={"minibatch": 6}),
        ["'small'", "of 5 in its shard", "minibatch of 6", "give it more examples"],
    ),
    "trainset below the minibatch": (
        lambda: compiled(kit.examples(9), config={"minibatch": 6}),
        ["minibatch of 6", "use fewer workers"],
    ),
    "more workers than examples": (lambda: compiled(kit.examples(2), workers=3), ["2 examples", "3 workers"]),
    "no predictors": (
        lambda: compiled(kit.examples(40), Empty()),
        ["Empty", "0 predictors", "at least one dspy.Predict"],
    ),
    "no program": (lambda: compiled(kit.examples(40), "prompt"), ["must be a dspy.Module", "str"]),
    "two workers of one name": (lambda: compiled(workers=[shard("eu"), shard("eu")]), ["'eu'"]),
    "worker named server": (lambda: shard("server"), ["'server'", "choose another"]),
    "no workers in the list": (lambda: compiled(workers=[]), ["workers", "at least one"]),
    "zero workers": (lambda: compiled(kit.examples(40), workers=0), ["workers=0", "at least 1"]),
    "tau below 1": (lambda: compiled(kit.examples(40), max_staleness=0), ["max_staleness=0", ">= 1"]),
    "S above R": (
        lambda: compiled(kit.examples(40), active_workers=3),
        ["active_workers=3", "number of workers, 2"],
    ),
    "S below 1": (lambda: compiled(kit.examples(40), active_workers=0), ["active_workers=0", "between 1"]),
    "negative calls": (lambda: Budget(metric_calls=-5), ["metric_calls=-5", "positive"]),
    "no calls": (lambda: Budget(metric_calls=0), ["metric_calls=0", "positive"]),
    "negative seconds": (lambda: Budget(seconds=-1.0), ["seconds=-1.0", "positive"]),
    "NaN seconds": (lambda: Budget(seconds=float("nan")), ["seconds=nan", "finite"]),
    "no cap": (lambda: Budget(), ["no cap", "metric_calls"]),
    "half a call": (lambda: Budget(metric_calls=2.5), ["metric_calls=2.5", "whole number"]),  # type: ignore[arg-type]
    "labels in with_inputs": (
        lambda: compiled(labels_as_inputs(40)),
        ["['label'] in with_inputs", "leave labels out"],
    ),
    "no inputs declared": (lambda: compiled(no_inputs(40)), ["trainset[0]", "call .with_inputs"]),
    "no examples but dicts": (
        lambda: compiled([{"message": "item 1"}] * 40),
        ["trainset[0] is a dict", "dspy.Example"],
    ),
    "trainset besides workers": (
        lambda: compiled(kit.examples(40), workers=[shard()]),
        ["40 examples", "workers=<number>"],
    ),
    "valset besides valsets": (
        lambda: compiled(
            workers=[Worker("w", kit.examples(20), valset=kit.examples(6, start=50))],
            valset=kit.examples(9, start=70),
        ),
        ["valset with 9 examples", "1 workers that all bring their own"],
    ),
    "a number for a budget": (lambda: kit.optimizer(budget=100), ["budget=100", "Budget(metric_calls="]),
    "workers that are none": (lambda: kit.optimizer(workers=["eu"]), ["workers=['eu']", "list of Worker"]),
    "negative seed": (lambda: kit.optimizer(seed=-1), ["seed=-1", ">= 0"]),
    "timeout that is no time": (
        lambda: kit.optimizer(rollout_timeout_s=math.nan),
        ["rollout_timeout_s=nan", "> 0 seconds"],
    ),
    "straggler factor of 1": (
        lambda: kit.optimizer(straggler_factor=1),
        ["straggler_factor=1", "> 1, or None"],
    ),
    "no failures allowed": (lambda: kit.optimizer(max_failures=0), ["max_failures=0", "at least 1"]),
    "two teachers": (
        lambda: compiled(kit.examples(40), teacher=[dspy.Predict(kit.Sort)] * 2),
        ["a list of 2 programs", "pass the one"],
    ),
    "no teacher but a text": (lambda: compiled(kit.examples(40), teacher="gpt"), ["dspy.Module, got str"]),
    "no errors allowed": (lambda: kit.optimizer(max_errors=0), ["max_errors=0", "at least 1, or None"]),
    "half an error": (lambda: kit.optimizer(max_errors=1.5), ["max_errors=1.5", "whole number"]),
    "half a demo": (lambda: kit.optimizer(demo_candidates=2.5), ["demo_candidates=2.5", "whole number"]),
    "negative word slots": (lambda: kit.optimizer(fragments=-1), ["fragments=-1", ">= 0"]),
    "instructions without a text": (
        lambda: compiled(kit.examples(40), instructions={"self": [None]}),
        ["'self'", "must be texts, got None"],
    ),
    "later instructions that nobody tries": (
        lambda: kit.optimizer(mode="demos", later_instructions=1, proposer=kit.color_lm()),
        ["later_instructions=1", "mode='demos'"],
    ),
    "unknown preset": (lambda: kit.optimizer(preset="papers"), ["preset='papers'", "'paper'"]),
    "unknown mode": (lambda: kit.optimizer(mode="all"), ["mode='all'", "'both'"]),
    "unknown auto": (lambda: kit.optimizer(auto="tiny", budget=None), ["auto='tiny'", "'light'"]),
    "unknown constant": (lambda: kit.optimizer(config={"minibach": 3}), ["minibach", "minibatch"]),
    "constant out of range": (lambda: kit.optimizer(config={"minibatch": 0}), ["minibatch=0", ">= 1"]),
    "no concurrency": (
        lambda: Worker("w", kit.examples(9), max_concurrency=0),
        ["max_concurrency=0", "at least 1"],
    ),
    "unknown predictor": (
        lambda: compiled(kit.examples(40), student=kit.TwoSteps(), instructions={"label": ["Hm."]}),
        ["'label'", "['topic', 'sort']"],
    ),
    "instructions without a predictor": (
        lambda: compiled(kit.examples(40), instructions=["Sort."]),
        ["Sort.", "instructions={'self': [texts]}"],
    ),
    "a set of texts": (
        lambda: compiled(kit.examples(40), instructions={"self": {"Sort."}}),
        ["a set", "{'self': [texts]}"],
    ),
    "a NUL in run_dir": (lambda: compiled(kit.examples(40), run_dir="a\0b"), ["run_dir='a\\x00b'", "NUL"]),
    "too long a name for run_dir": (
        lambda: compiled(kit.examples(40), run_dir="/tmp/" + "x" * 5000),
        ["run_dir=", "cannot be written", "choose a folder"],
    ),
    "a failure_score beyond all scores": (
        lambda: kit.optimizer(failure_score=-1e300),
        ["failure_score=-1e+300", "±1e+100"],
    ),
    "one text for a list of texts": (
        lambda: compiled(kit.examples(40), instructions={"self": "Hm."}),
        ["'self'", "list of texts"],
    ),
    "negative demo slots": (
        lambda: compiled(kit.examples(40), demos_per_class=-1),
        ["demos_per_class", "-1"],
    ),
    "metric of one argument": (lambda: compiled(kit.examples(40), metric=lambda gold: 1), ["1 arguments"]),
    "metric that is none": (lambda: compiled(kit.examples(40), metric=0.5), ["metric must be a function"]),
    "too few keys": (
        lambda: compiled(kit.examples(40), shard_key=lambda one: "only"),
        ["1 distinct keys", "2 workers"],
    ),
    "seconds of a deterministic run": (
        lambda: kit.optimizer(budget=Budget(seconds=3.0)),
        ["deterministic=True", "seconds=3", "metric_calls"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_any_call(case: str) -> None:
    build, said = CASES[case]
    lm = kit.color_lm()
    with dspy.context(lm=lm), pytest.raises(ConfigurationError) as caught:
        build()
    for part in said:
        assert part in str(caught.value)
    assert kit.calls_of(lm) == 0


def test_every_refusal_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="metric_calls"):
        Budget(metric_calls=-5)


def test_a_refusal_stands_alone() -> None:
    """Not as what happened "during handling of" something that is no business of the user."""
    with pytest.raises(ConfigurationError) as caught:
        compiled(trainset=no_inputs(8))
    error: BaseException | None = caught.value
    while error is not None:
        assert "event loop" not in str(error)
        error = error.__context__


def test_a_valset_that_overlaps_the_trainset_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    lm = kit.color_lm()
    calls_at_warning: list[int] = []
    caplog.handler.addFilter(lambda record: calls_at_warning.append(kit.calls_of(lm)) or True)
    with dspy.context(lm=lm), caplog.at_level(logging.WARNING):
        compiled(kit.examples(40), valset=kit.examples(10, start=35))
    said = [one.message for one in caplog.records if "valset" in one.message]
    assert len(said) == 1
    assert "5 of 10 examples of the valset" in said[0]
    assert "Remove them from one of the two" in said[0]
    assert calls_at_warning[0] == 0


def test_a_valset_of_a_worker_that_overlaps_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    others = Worker("us", kit.examples(20, start=100))
    workers = [Worker("eu", kit.examples(20), valset=kit.examples(6, start=18)), others]
    with dspy.context(lm=kit.color_lm()):
        compiled(workers=workers)
    assert any("2 of 6 examples" in one.message and "'eu'" in one.message for one in caplog.records)
    assert not any("other workers" in one.message for one in caplog.records)


def test_a_valset_that_overlaps_another_workers_trainset_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    workers = [Worker("eu", kit.examples(20), valset=kit.examples(6, start=38)), shard("us", 40)]
    with dspy.context(lm=kit.color_lm()):
        compiled(workers=workers)
    said = [one.message for one in caplog.records if "other workers than 'eu'" in one.message]
    assert len(said) == 1 and "2 of 6 examples" in said[0]


def test_without_overlap_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with dspy.context(lm=kit.color_lm()):
        compiled(kit.examples(40), valset=kit.examples(10, start=100))
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


@pytest.mark.parametrize("where", ["lm", "engine"])
def test_a_demo_longer_than_the_context_is_refused(where: str) -> None:
    lm = kit.color_lm()
    (lm if where == "lm" else lm.engine).context_tokens = 300
    with (
        dspy.context(lm=lm),
        pytest.raises(ConfigurationError, match=r"max_demo_tokens=1000 .* context is 300"),
    ):
        compiled(long_examples(40), max_demo_tokens=1000)
    assert kit.calls_of(lm) == 0


def test_the_context_of_a_hosted_model_is_known() -> None:
    hosted = dspy.LM("openai/gpt-3.5-turbo", api_key="none")
    workers = [Worker("w", long_examples(20), lm=hosted)]
    for one in workers[0].trainset:
        one["message"] = one["message"] * 60
    with pytest.raises(ConfigurationError, match=r"context is \d+ tokens; set max_demo_tokens well below"):
        compiled(workers=workers, max_demo_tokens=100_000)


def test_an_example_longer_than_the_context_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    lm = kit.color_lm()
    lm.context_tokens = 300
    with dspy.context(lm=lm):
        compiled([*kit.examples(40), *long_examples(1)], max_demo_tokens=200)
    said = [one.message for one in caplog.records if "context is 300" in one.message]
    assert said
    assert "Shorten it" in said[0]


def test_labels_that_the_program_cannot_answer_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    odd = dspy.Example(message="item 5", label="purple").with_inputs("message")
    with dspy.context(lm=kit.color_lm()):
        compiled([*kit.examples(40), odd])
    said = [one.message for one in caplog.records if "1 of 41 examples" in one.message]
    assert said
    assert "purple" not in said[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"demo_candidates": 0}, "demo_candidates=0 must be >= 1"),
        ({"failure_score": math.nan}, "failure_score=nan must be a finite number"),
        ({"failure_score": "0"}, "failure_score='0' must be a finite number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        kit.optimizer(**options)
    with pytest.raises(ConfigurationError, match="worker name 3 must be a str"):
        Worker(3, kit.examples(9))  # type: ignore[arg-type]
    assert kit.optimizer(tips="Be brief.").options.tips == ("Be brief.",)


def test_a_teacher_that_can_show_the_student_nothing_is_refused_before_any_call() -> None:
    lm = kit.color_lm()
    for teacher in (kit.TwoSteps(), [kit.TwoSteps()]):
        with pytest.raises(ConfigurationError, match="have none of the names"), dspy.context(lm=lm):
            kit.optimizer().compile(dspy.Predict(kit.Sort), trainset=kit.examples(60), teacher=teacher)
    assert kit.calls_of(lm) == 0


def test_a_teacher_of_one_predictor_teaches_a_student_of_one_whatever_they_are_called() -> None:
    student, teacher = dspy.Predict(kit.Sort), dspy.ChainOfThought(kit.Sort)
    runner = RolloutRunner(lambda gold, prediction: 1.0)
    with dspy.context(lm=kit.color_lm(), adapter=dspy.JSONAdapter()):
        run = asyncio.run(runner.run(teacher, kit.example(3), trace=True))
    [item] = bootstrapped_demos(
        run, kit.example(3), program=teacher, worker="w", example_index=0, student=student
    )
    assert (item.predictor, dict(item.demo.items())["label"]) == ("self", "red")
    assert "reasoning" not in item.demo


def test_a_student_that_fails_on_every_first_example_is_told_of_and_its_failures_are_in_the_table(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Typo(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sort = dspy.Predict(kit.Sort)

        def forward(self, message: str) -> dspy.Prediction:
            return self.sort(mesage=message).lable

    made = kit.optimizer(max_errors=None)
    with caplog.at_level(logging.WARNING), dspy.context(lm=kit.color_lm(), adapter=dspy.JSONAdapter()):
        made.compile(Typo(), trainset=kit.examples(60))
    assert "The student failed on the first example of every worker (AttributeError)" in caplog.text
    assert "the budget is spent all the same" in caplog.text
    assert "The program raised AttributeError" in caplog.text
    failed = sum(worker.failed for worker in made.result.workers)
    assert failed == made.result.metric_calls
    assert "failed" in str(made.result) and str(made.result.workers[0].failed) in str(made.result)


def test_another_error_than_no_lm_is_not_taken_for_it() -> None:
    class Own(dspy.Module):
        """Brings its LM along, and fails of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.sort = dspy.Predict(kit.Sort)

        def forward(self, message: str) -> dspy.Prediction:
            raise KeyError("label")

    made = kit.optimizer(budget=Budget(metric_calls=30))
    with dspy.context(lm=None), pytest.raises(ProgramFailedError, match="KeyError"):
        made.compile(Own(), trainset=kit.examples(60))


def test_a_valset_may_be_a_generator_and_labels_numpys(tmp_path: Path) -> None:
    class Count(dspy.Signature):
        message: str = dspy.InputField()
        count: int = dspy.OutputField()

    data = [
        dspy.Example(message=f"item {number}", count=np.int64(number % 3)).with_inputs("message")
        for number in range(60)
    ]

    def script(messages: Any) -> str:
        shown = any(one["role"] == "assistant" for one in messages)
        return kit.answer(messages, count=kit.number_in(messages) % 3 if shown else 7)

    made = kit.optimizer(metric=lambda gold, pred, trace=None: gold.count == pred.count, mode="demos")
    with dspy.context(lm=kit.make_lm(script), adapter=dspy.JSONAdapter()):
        program = made.compile(dspy.Predict(Count), trainset=data, valset=(one for one in data[:20]))
    assert program.demos and all(type(demo.count) is int for demo in program.demos)
    program.save(tmp_path / "program.json")


def test_inputs_may_be_arrays(tmp_path: Path) -> None:
    """As `pandas.read_parquet` gives lists; arrays compare by element."""

    class Count(dspy.Signature):
        passages: list[str] = dspy.InputField()
        found: dict[str, Any] = dspy.InputField()
        message: str = dspy.InputField()
        count: int = dspy.OutputField()

    data = [
        dspy.Example(
            passages=np.array([f"p{number // 2}", "q"], dtype=object),
            found={"places": np.arange(3)},
            message=f"item {number}",
            count=number % 3,
        ).with_inputs("passages", "found", "message")
        for number in range(60)
    ]

    def script(messages: Any) -> str:
        shown = any(one["role"] == "assistant" for one in messages)
        return kit.answer(messages, reasoning="so", count=kit.number_in(messages) % 3 if shown else 7)

    made = kit.optimizer(
        metric=lambda gold, pred, trace=None: gold.count == pred.count, mode="demos", bootstrap=True
    )
    with dspy.context(lm=kit.make_lm(script), adapter=dspy.JSONAdapter()):
        program = made.compile(dspy.ChainOfThought(Count), trainset=data)
        program.save(tmp_path / "program.json")
        again = dspy.ChainOfThought(Count)
        again.load(tmp_path / "program.json")
    [demo, *_] = again.predict.demos
    assert demo["passages"][1] == "q" and demo["found"] == {"places": [0, 1, 2]}
