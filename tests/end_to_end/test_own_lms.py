"""Caps and rates hold for the LMs that a program keeps, wherever it keeps them; where no call is seen, that is said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Worker
from asyndbt_dspy.lms.scripted import AsyncScriptedEngine, ScriptedEngine
from asyndbt_dspy.testing.provider import Provider


@pytest.fixture(autouse=True)
def nothing_around() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


class Greedy(ScriptedEngine):
    greedy_by_default = True


class AsyncGreedy(AsyncScriptedEngine):
    greedy_by_default = True


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


@pytest.mark.parametrize("keep", ["attribute", "containers"])
def test_a_cap_is_kept_by_lms_that_modules_hold_and_the_user_gets_them_back(keep: str) -> None:
    lm = kit.color_lm()
    optimizer, better = compiled(Keeps(lm, keep), Budget(lm_calls=60))
    assert 40 < kit.calls_of(lm) <= 60
    assert sum(line["attempts"] for line in optimizer.result.spending.values()) == kit.calls_of(lm)
    kept = better.judge if keep == "attribute" else better.box["all"][0]
    assert kept is lm
    assert better(message="item 4").label is not None  # by an LM whose budget is not over


def test_a_cap_that_no_call_counts_against_is_refused_after_the_first_rollouts() -> None:
    lm = kit.color_lm()
    with pytest.raises(ConfigurationError, match=r"caps lm_calls, tokens, .*no LM call was seen.*set_lm"):
        compiled(Keeps(lm, "closure"), Budget(lm_calls=60, tokens=10**9))
    assert kit.calls_of(lm) == 3


def test_where_another_cap_ends_the_run_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    lm = kit.color_lm()
    with caplog.at_level(logging.WARNING):
        compiled(Keeps(lm, "closure"), Budget(lm_calls=60, metric_calls=40))
    assert 30 < kit.calls_of(lm) <= 40
    told = [one.getMessage() for one in caplog.records if "no LM call was seen" in one.getMessage()]
    assert len(told) == 1


def test_rollouts_that_an_earlier_run_paid_for_are_no_sign_of_unseen_calls(tmp_path: Path) -> None:
    for _ in range(2):
        student = dspy.Predict(kit.Sort)
        student.set_lm(
            dspy.LM(
                "scripted/greedy",
                engine=Greedy(kit.stairs(1), True),
                async_engine=AsyncGreedy(kit.stairs(1), True),
                cache=False,
            )
        )
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
            _, better = compiled(student, Budget(metric_calls=40), workers=workers, **rate)
        assert better.lm is lm
        assert len(provider.calls) > 30
        assert provider.most_in_window(1.0) <= 2 * 12


def test_a_rate_is_the_surrounding_lms_where_that_answers_too() -> None:
    """A predictor's own LM may be a local one; what the endpoint of the others allows is none of its business."""
    with Provider(answer=kit.stairs(2)) as around, Provider(answer=kit.stairs(2)) as beside:
        lms = [dspy.LM("openai/m", api_base=one.url, api_key="k", cache=False) for one in (around, beside)]
        student = kit.TwoSteps()
        student.topic.lm = lms[1]
        with dspy.context(lm=lms[0]):
            compiled(student, Budget(metric_calls=40), requests_per_minute=720)
        assert around.most_in_window(1.0) <= 2 * 12
        assert beside.most_in_window(1.0) >= 24
