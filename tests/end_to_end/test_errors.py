"""A program or metric that does nothing but raise ends the compile before its budget is spent; what an LM does wrong does not."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from dspy.utils.exceptions import AdapterParseError

from asyndbt_dspy import Budget, ProgramFailedError, ResumeError, Worker

IN_FLIGHT = 16
"""Two workers, eight rollouts each."""


def misspelt(gold: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(gold.lable == prediction.label)


class Broken(dspy.Module):
    """``forward`` raises, whatever the LM answers."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.ChainOfThought(kit.Sort)

    async def aforward(self, message: str) -> dspy.Prediction:
        found = await self.sort.acall(message=message)
        return dspy.Prediction(label=found.colour)


class Strict(dspy.Module):
    """Raises unless the LM was told what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(kit.Sort)

    def forward(self, message: str) -> dspy.Prediction:
        found = self.sort(message=message)
        if kit.MAGIC not in self.sort.signature.instructions:
            raise ValueError(f"no sense in {found.label}")
        return found


def with_magic(student: dspy.Module, **options: Any) -> Any:
    options = {"mode": "instructions", "instructions": kit.texts_for(student), **options}
    return kit.optimizer(**options)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_misspelt_field_in_the_metric_is_paid_for_thirty_times(deterministic: bool) -> None:
    optimizer = kit.optimizer(metric=misspelt, budget=Budget(metric_calls=300), deterministic=deterministic)
    lm = kit.color_lm()
    with dspy.context(lm=lm), pytest.raises(ProgramFailedError) as caught:
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    told = re.search(
        r"raised in (\d+) rollouts.*: (\d+) times metric 'misspelt' raised .*'lable'.*max_errors",
        str(caught.value),
    )
    assert told is not None
    assert told[1] == told[2]  # answers that came at the same time are told of together
    assert 30 <= kit.calls_of(lm) <= 30 + IN_FLIGHT


def test_a_program_that_always_raises_ends_in_the_setup_already() -> None:
    lm = kit.color_lm()
    optimizer = kit.optimizer(max_errors=10, bootstrap=True, budget=Budget(metric_calls=300))
    with dspy.context(lm=lm), pytest.raises(ProgramFailedError, match=r"times AttributeError.*'colour'"):
        optimizer.compile(Broken(), trainset=kit.examples(60))
    assert 10 <= kit.calls_of(lm) <= 10 + IN_FLIGHT
    assert optimizer.result is None


def test_errors_that_another_instruction_mends_are_searched_on_where_that_is_wanted() -> None:
    student = Strict()
    with dspy.context(lm=kit.color_lm()):
        with pytest.raises(ProgramFailedError, match="ValueError: no sense in red"):
            with_magic(student, max_errors=2).compile(student, trainset=kit.examples(60))
        better = with_magic(student, max_errors=None).compile(student, trainset=kit.examples(60))
        assert kit.score(better, kit.examples(30, start=100)) == 1.0


@pytest.mark.parametrize("label", [None, "purple"])
def test_answers_that_cannot_be_read_do_not_end_it(label: str | None) -> None:
    """A base model answers in a form that can be read once it is shown one; so does this one once it is told."""

    def script(messages: list[dict[str, str]]) -> str:
        if kit.MAGIC in messages[0]["content"]:
            return kit.stairs(1)(messages)
        return "I would say so" if label is None else kit.answer(messages, label=label)

    student = dspy.Predict(kit.Sort)
    with dspy.context(lm=kit.make_lm(script)):
        optimizer = with_magic(student, max_errors=1)
        better = optimizer.compile(student, trainset=kit.examples(60))
        assert kit.score(better, kit.examples(30, start=100)) == 1.0
    assert optimizer.result.workers[0].failed > 1


def test_a_private_worker_is_not_quoted() -> None:
    def quoting(gold: Any, prediction: Any) -> bool:
        raise KeyError(gold.message)

    workers = [Worker(name, kit.examples(36), share_demos=False) for name in ("left", "right")]
    optimizer = kit.optimizer(workers=workers, metric=quoting)
    with dspy.context(lm=kit.color_lm()), pytest.raises(ProgramFailedError) as caught:
        optimizer.compile(dspy.Predict(kit.Sort))
    assert re.search(r"times metric 'quoting' raised KeyError\. Mend", str(caught.value))
    assert "item" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_resumed_run_pays_nothing_to_end_again(tmp_path: Path, deterministic: bool) -> None:
    paid = []
    for seed in range(3):
        lm = kit.shuffled_lm(seed)  # answers come in another order each time
        optimizer = kit.optimizer(
            metric=misspelt, workers=3, run_dir=tmp_path, resume=True, deterministic=deterministic
        )
        with dspy.context(lm=lm), pytest.raises(ProgramFailedError):
            optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
        paid.append(kit.calls_of(lm))
    assert 30 <= paid[0] <= 30 + 3 * 8
    assert paid[1:] == [0, 0]


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_was_paid_for_is_kept_where_the_search_goes_on_after_all(
    tmp_path: Path, deterministic: bool
) -> None:
    student = Strict()

    def compiled(**options: Any) -> tuple[Any, int]:
        lm = kit.color_lm()
        optimizer = with_magic(student, run_dir=tmp_path, resume=True, deterministic=deterministic, **options)
        with dspy.context(lm=lm):
            try:
                return optimizer.compile(student, trainset=kit.examples(60)), kit.calls_of(lm)
            except ProgramFailedError as error:
                return error, kit.calls_of(lm)

    ended, paid = compiled(max_errors=2)
    assert isinstance(ended, ProgramFailedError)
    assert paid >= 2
    better, rest = compiled(max_errors=None)
    with dspy.context(lm=kit.color_lm()):
        assert kit.score(better, kit.examples(30, start=100)) == 1.0
    assert paid + rest <= 120


class Handles(dspy.Module):
    """Does something about answers that cannot be read: says so in its own words, or makes a mistake."""

    def __init__(self, is_wrong: bool) -> None:
        super().__init__()
        self.sort = dspy.Predict(kit.Sort)
        self.is_wrong = is_wrong

    def forward(self, message: str) -> dspy.Prediction:
        try:
            return self.sort(message=message)
        except Exception as error:
            if self.is_wrong:
                return self.fallbak(message)
            raise ValueError("could not sort") from error


def told_how(messages: list[dict[str, str]]) -> str:
    """Can be read once the LM is told how to answer."""
    return kit.stairs(1)(messages) if kit.MAGIC in messages[0]["content"] else "red, I would say"


def test_an_answer_that_the_program_itself_could_not_read_is_none_of_its_errors() -> None:
    student = Handles(is_wrong=False)
    with dspy.context(lm=kit.make_lm(told_how)):
        better = with_magic(student, max_errors=1).compile(student, trainset=kit.examples(60))
        assert kit.score(better, kit.examples(30, start=100)) == 1.0


def test_a_mistake_in_what_handles_such_an_answer_is_one() -> None:
    lm = kit.make_lm(lambda messages: "red, I would say")
    with dspy.context(lm=lm), pytest.raises(ProgramFailedError, match="fallbak"):
        kit.optimizer().compile(Handles(is_wrong=True), trainset=kit.examples(60))


@pytest.mark.parametrize(
    "error", [KeyError("AdapterParseError"), AdapterParseError("JSONAdapter", kit.Sort, "red, I would say")]
)
def test_a_metric_is_excused_neither_by_what_its_error_says_nor_by_its_judge(error: Exception) -> None:
    def quoting(gold: Any, prediction: Any) -> bool:
        raise error

    optimizer = kit.optimizer(metric=quoting)
    with dspy.context(lm=kit.color_lm()), pytest.raises(ProgramFailedError):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))


def test_a_metric_that_was_mended_is_another_run(tmp_path: Path) -> None:
    with dspy.context(lm=kit.color_lm()):
        with pytest.raises(ProgramFailedError):
            kit.optimizer(metric=misspelt, run_dir=tmp_path).compile(
                dspy.Predict(kit.Sort), trainset=kit.examples(60)
            )
        with pytest.raises(ResumeError, match="metric"):
            kit.optimizer(run_dir=tmp_path, resume=True).compile(
                dspy.Predict(kit.Sort), trainset=kit.examples(60)
            )
