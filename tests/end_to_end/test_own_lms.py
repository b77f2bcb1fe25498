"""Caps and rates hold for the predictors' own LMs; calls that no cap counts are told of, and do not go on without end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from arrivals import assert_rate

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Price, Worker
from asyndbt_dspy.testing.provider import Provider


@pytest.fixture(autouse=True)
def nothing_around() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


class Keeps(dspy.Module):
    """Asks an LM that is no predictor's, kept as ``keep`` says."""

    def __init__(self, lm: Any, keep: str) -> None:
        super().__init__()
        self.sort = dspy.Predict(kit.Sort)
        self.keep = keep
        if keep == "attribute":
            self.judge = lm
        elif keep == "containers":
            self.box = {"all": [lm]}
        else:
            self.find = lambda: lm

    def forward(self, message: str) -> dspy.Prediction:
        kept = {
            "attribute": lambda: self.judge,
            "containers": lambda: self.box["all"][0],
            "closure": lambda: self.find(),
        }
        with dspy.context(lm=kept[self.keep]()):
            return self.sort(message=message)


def compiled(program: dspy.Module, budget: Budget, **options: Any) -> tuple[AsynDBT, dspy.Module]:
    optimizer = AsynDBT(kit.metric, budget=budget, progress=False, **options)
    return optimizer, optimizer.compile(program, trainset=kit.examples(60))


@pytest.mark.parametrize("keep", ["attribute", "containers", "closure"])
def test_caps_that_no_call_counts_against_end_the_compile(keep: str) -> None:
    lm = kit.color_lm()
    with pytest.raises(
        ConfigurationError, match=r"caps lm_calls, tokens alone.*no LM call was counted.*set_lm"
    ):
        compiled(Keeps(lm, keep), Budget(lm_calls=60, tokens=10**9))
    assert 30 <= kit.calls_of(lm) <= 30 + 3 * 8


def test_a_first_call_that_comes_to_nothing_changes_nothing_of_that() -> None:
    numbers = iter(range(10**9))

    def script(messages: list[dict[str, str]]) -> Any:
        if next(numbers) < 3:
            raise dspy.lm15.ServerError("down")
        return kit.stairs(1)(messages)

    lm = kit.make_lm(script)
    with pytest.raises(ConfigurationError, match="no LM call was counted"):
        compiled(Keeps(lm, "closure"), Budget(lm_calls=60))
    assert kit.calls_of(lm) <= 3 + 30 + 3 * 8


def test_where_another_cap_ends_the_run_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    lm = kit.color_lm()
    with caplog.at_level(logging.WARNING):
        compiled(Keeps(lm, "closure"), Budget(lm_calls=60, metric_calls=40))
    assert 30 < kit.calls_of(lm) <= 40
    told = [one.getMessage() for one in caplog.records if "do not count against" in one.getMessage()]
    assert len(told) == 1
    assert "scripted/colors" in told[0]


class Judge(dspy.BaseLM):
    """An LM of the user's own class, with a method of its own."""

    def __init__(self) -> None:
        super().__init__(model="mine/judge", cache=False)

    def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        raise AssertionError("nobody calls it so")

    def rate(self, label: str) -> bool:
        return bool(label)


class Judges(dspy.Module):
    """Its predictor's calls count; it keeps an LM beside, calls another one, and is sure of some items without any."""

    def __init__(self, beside: Any) -> None:
        super().__init__()
        self.sort = dspy.Predict(kit.Sort)
        self.judge = Judge()
        self.beside = [beside]

    def forward(self, message: str) -> dspy.Prediction:
        number = kit.number_in([{"content": message}])
        if number % 5 == 0:
            return dspy.Prediction(label=kit.right_label(number))
        if number % 5 == 1:
            raise ValueError("a bad row")
        found = self.sort(message=message)
        assert self.judge.rate(found.label)
        with dspy.context(lm=self.beside[0]):
            dspy.Predict(kit.Sort)(message=message)
        return found


@pytest.mark.parametrize("deterministic", [False, True])
def test_what_counts_is_capped_and_what_does_not_is_told_and_left_as_it_is(
    deterministic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lm, beside = kit.color_lm("own"), kit.color_lm("beside")
    program = Judges(beside)
    program.sort.lm = lm
    calls = {"metric_calls": 400} if deterministic else {}
    with caplog.at_level(logging.WARNING):
        optimizer, better = compiled(program, Budget(lm_calls=60, **calls), deterministic=deterministic)
    assert 30 < kit.calls_of(lm) <= 60
    assert sum(line["attempts"] for line in optimizer.result.spending.values()) == kit.calls_of(lm)
    told = [one.getMessage() for one in caplog.records if "do not count against" in one.getMessage()]
    assert len(told) == 1
    assert "scripted/beside" in told[0]
    assert better.sort.lm is lm
    assert better.beside[0] is beside


def test_rollouts_that_an_earlier_run_paid_for_are_no_sign_of_unseen_calls(tmp_path: Path) -> None:
    for _ in range(2):
        student = dspy.Predict(kit.Sort)
        student.set_lm(kit.greedy_lm(kit.stairs(1)))
        optimizer, _ = compiled(student, Budget(lm_calls=60), run_dir=tmp_path)
    assert sum(one.reused for one in optimizer.result.workers) >= 3  # all of the first ones


@pytest.mark.parametrize("is_surrounded", [False, True])
@pytest.mark.parametrize("workers", [None, [Worker("w", requests_per_minute=720)]])
def test_a_rate_holds_for_the_predictors_own_lms(is_surrounded: bool, workers: Any) -> None:
    with Provider(answer=kit.stairs(1)) as provider:
        lm = dspy.LM("openai/m", api_base=provider.url, api_key="k", cache=False)
        student = dspy.Predict(kit.Sort)
        student.set_lm(lm)
        rate = {} if workers else {"requests_per_minute": 720}
        with dspy.context(lm=kit.color_lm() if is_surrounded else None):
            _, better = compiled(student, Budget(metric_calls=80), workers=workers, **rate)
        assert better.lm is lm
        assert_rate([call.at_s for call in provider.seen()], 12)


def test_a_rate_is_the_surrounding_lms_where_that_answers_too() -> None:
    """A predictor's own LM may be a local one; what the endpoint of the others allows is none of its business."""
    with Provider(answer=kit.stairs(2)) as around, Provider(answer=kit.stairs(2)) as beside:
        lms = [dspy.LM("openai/m", api_base=one.url, api_key="k", cache=False) for one in (around, beside)]
        student = kit.TwoSteps()
        student.topic.lm = lms[1]
        with dspy.context(lm=lms[0]):
            compiled(student, Budget(metric_calls=40), requests_per_minute=360)
        assert_rate([call.at_s for call in around.seen()], 6)
        assert beside.most_in_window(2.0) >= 20  # with the other's rate at most 18


def test_a_workers_price_is_that_of_the_predictors_lms_where_these_answer_for_it() -> None:
    student = dspy.Predict(kit.Sort)
    student.set_lm(kit.color_lm(max_tokens=50))
    budget = Budget(metric_calls=40, dollars=10.0)
    with pytest.raises(ConfigurationError, match="price"):
        compiled(student, budget, workers=[Worker("w")])
    optimizer, _ = compiled(student, budget, workers=[Worker("w", price=Price(1.0, 2.0))])
    assert float(optimizer.result.spending["w"]["dollars"]) > 0


@pytest.mark.parametrize("workers", [None, 2])
def test_nothing_is_told_where_every_call_counts(workers: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Also not of what stands in front of several LMs, which is no LM of anybody's."""
    lms = [kit.color_lm("first"), kit.color_lm("second")]
    own = workers and [Worker(name, lm=list(lms), hedge_after_s=60.0) for name in "ab"]
    with dspy.context(lm=None if own else lms[0]), caplog.at_level(logging.WARNING):
        compiled(dspy.Predict(kit.Sort), Budget(lm_calls=120), workers=own)
    assert kit.calls_of(lms[0]) > 30, "so many rollouts without a counted call would be told of"
    assert [one.getMessage() for one in caplog.records if "do not count" in one.getMessage()] == []
