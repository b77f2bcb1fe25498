"""What the setup may take of a budget: the search and the race come after it, whatever is capped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import dspy
import kit
import pytest
from dspy.lm15 import Usage

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Price, Worker
from asyndbt_dspy.lms.scripted import AsyncScriptedEngine
from asyndbt_dspy.setup_rollouts import SetupRollouts

TRAIN = kit.examples(240)
MOST_BEFORE = 120
"""Traces that fit a thousand metric calls."""


class Steps(dspy.Module):
    """Asks its first predictor ``asked`` times, then sorts by what it says."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self.asked = asked
        self.topic = dspy.Predict(kit.Topic)
        self.sort = dspy.Predict(kit.Sort)

    async def aforward(self, message: str) -> dspy.Prediction:
        for _ in range(self.asked):
            found = await self.topic.acall(message=message)
        return await self.sort.acall(message=found.topic)


class Billed(AsyncScriptedEngine):
    """Bills as many tokens for each call."""

    def answer(self, request: Any) -> Any:
        return replace(super().answer(request), usage=Usage(input_tokens=200, output_tokens=20))


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    script = kit.stairs(2)
    lm = kit.lm_over(script, Billed(script, supports_schema=True)).copy(max_tokens=50)
    with dspy.context(adapter=dspy.JSONAdapter(), lm=lm):
        yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rollouts that came in, by stage of the setup."""
    found: Counter[str] = Counter()
    run = SetupRollouts.run

    async def noted(setup: SetupRollouts, stage: str, *arguments: Any) -> Any:
        rollouts = await run(setup, stage, *arguments)
        found[stage] += sum(one is not None for one in rollouts)
        return rollouts

    monkeypatch.setattr(SetupRollouts, "run", noted)
    return found


def compiled(student: dspy.Module, budget: Budget, teacher: dspy.Module | None = None) -> AsynDBT:
    optimizer = kit.optimizer(
        workers=[
            Worker(name, part, max_concurrency=2) for name, part in (("a", TRAIN[::2]), ("b", TRAIN[1::2]))
        ],
        deterministic=False,
        budget=budget,
        prices={"scripted/m": Price(prompt=1.0, completion=1.0)},
    )
    optimizer.compile(student, teacher=teacher)
    return optimizer


@pytest.mark.parametrize(
    ("asked", "budget"),
    [
        (1, Budget(lm_calls=300)),
        (5, Budget(lm_calls=900)),
        (5, Budget(metric_calls=1_000, lm_calls=900)),
        (1, Budget(tokens=60_000)),
        (1, Budget(dollars=0.06)),
    ],
)
def test_traces_leave_the_search_its_share_of_every_cap(
    made: Counter[str], asked: int, budget: Budget
) -> None:
    optimizer = compiled(Steps(asked), budget)
    assert made["probes"] == 2 and 0 < made["traces"] <= 0.15 * optimizer.result.metric_calls < MOST_BEFORE
    assert len(optimizer.result.curve) > 1
    assert any(one.name != "student" and one.examples for one in optimizer.result.candidates), "a race"


def test_a_teacher_that_costs_many_times_as_much_ends_before_the_search_is_paid_for_it(
    made: Counter[str],
) -> None:
    optimizer = compiled(Steps(1), Budget(lm_calls=400), teacher=Steps(14))
    before = made["traces"] * 15
    assert 0.3 * 400 - 15 <= before <= 0.3 * 400 + 4 * 15, "what is in flight at the end of its share goes on"
    assert len(optimizer.result.curve) > 1


@pytest.mark.parametrize("whose", ["proposer", "teacher", "predictor", "surrounding"])
def test_an_lm_that_no_cap_can_bound_is_refused_before_any_call(whose: str) -> None:
    bounded, unbounded = kit.color_lm(max_tokens=50), kit.color_lm("unbounded")
    student, teacher = dspy.Predict(kit.Sort), dspy.Predict(kit.Sort)
    for program, name in ((student, "predictor"), (teacher, "teacher")):
        program.lm = unbounded if whose == name else None
    optimizer = kit.optimizer(
        workers=[Worker("w", TRAIN, lm=bounded)],
        budget=Budget(tokens=10**6, metric_calls=120),
        proposer=unbounded if whose == "proposer" else None,
    )
    match = "'scripted/unbounded'.* has no max_tokens"
    if whose == "surrounding":
        match += r".*No worker has this LM.*compile within dspy\.context\(lm=None\)"
    with (
        dspy.context(lm=unbounded if whose == "surrounding" else None),
        pytest.raises(ConfigurationError, match=match),
    ):
        optimizer.compile(student, teacher=teacher)
    assert kit.calls_of(bounded) == kit.calls_of(unbounded) == 0
    with dspy.context(lm=None):
        if whose == "surrounding":
            optimizer.compile(student, teacher=teacher)
