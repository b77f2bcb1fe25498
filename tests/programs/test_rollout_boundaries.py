"""Where a run meets the user's code: inputs, tools, and whose failure an error is."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from typing import Any

import dspy
import pydantic
import pytest
from one_rollout import EXAMPLE, Raising, exact, run

from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.lms.scripted import scripted_lm
from asyndbt_dspy.programs.rollout import RolloutRunner, has_plain_tools


class NotFoundError(Exception):
    """A program's own, with the name of a provider's."""


class WithStatus(Exception):
    status = 404


@pytest.mark.parametrize(
    "error",
    [NotFoundError("no such row"), WithStatus(), TimeoutError("the tool"), ConnectionError("the tool")],
)
def test_what_a_program_or_metric_raises_by_itself_is_its_failure_whatever_it_is_called(
    plain: dspy.Module, error: Exception
) -> None:
    def metric(gold: Any, prediction: Any) -> float:
        raise error

    for rollout in (run(Raising(error)), run(plain, metric)):
        assert (rollout.score, rollout.failure) == (0.0, FailureKind.PROGRAM)


@pytest.mark.parametrize("error", [NotFoundError("no such model"), WithStatus(), TimeoutError("late")])
def test_the_same_errors_of_an_lm_are_the_lms(error: Exception) -> None:
    def script(messages: Any) -> str:
        raise error

    class Own(dspy.BaseLM):
        """A client of somebody's own."""

        def forward(self, *arguments: Any, **options: Any) -> Any:
            raise error

        async def aforward(self, *arguments: Any, **options: Any) -> Any:
            raise error

    program = dspy.Predict("message -> label")
    for lm in (scripted_lm(script), Own("own")):
        rollout = asyncio.run(RolloutRunner(exact).run(program, EXAMPLE, lm=lm))
        assert rollout.score is None and rollout.failure in (FailureKind.ENDPOINT, FailureKind.TRANSIENT)


class Point(pydantic.BaseModel):
    x: int


def test_inputs_reach_the_program_as_they_are() -> None:
    class Looks(dspy.Module):
        def forward(self, point: Point, history: dspy.History) -> dspy.Prediction:
            return dspy.Prediction(label=f"{point.x} {len(history.messages)}")

    example = dspy.Example(point=Point(x=3), history=dspy.History(messages=[{"a": "b"}]), label="3 1")
    example = example.with_inputs("point", "history")
    runner = RolloutRunner(lambda gold, prediction: gold.label == prediction.label)
    assert asyncio.run(runner.run(Looks(), example)).score == 1.0


def test_a_tool_that_blocks_does_not_hold_up_the_event_loop() -> None:
    """Two rollouts whose tools wait for each other."""
    meet = threading.Barrier(2, timeout=10)

    def look(key: str) -> str:
        """Look up."""
        meet.wait()
        return key

    async def later(key: str) -> str:
        """Look up elsewhere."""
        await asyncio.sleep(0)
        return key

    def script(messages: list[dict[str, str]]) -> str:
        done = messages[-1]["content"].count("observation")
        name = ("look", "later", "finish")[min(done, 2)]
        arguments = {} if name == "finish" else {"key": "k"}
        return json.dumps(
            {
                "next_thought": "hm",
                "next_tool_name": name,
                "next_tool_args": arguments,
                "reasoning": "",
                "label": "a",
            }
        )

    async def both() -> Any:
        runner = RolloutRunner(lambda gold, prediction: gold.label == prediction.label)
        program = dspy.ReAct("message -> label", tools=[look, later], max_iters=3)
        example = dspy.Example(message="m", label="a").with_inputs("message")
        lm = scripted_lm(script)
        return await asyncio.gather(
            *(runner.run(program, example, lm=lm, adapter=dspy.JSONAdapter()) for _ in range(2))
        )

    assert has_plain_tools(dspy.ReAct("message -> label", tools=[look]))
    assert not has_plain_tools(dspy.ReAct("message -> label", tools=[later]))
    first, second = asyncio.run(both())
    assert (first.score, second.score) == (1.0, 1.0), (first.error, second.error)
    assert not meet.broken


def test_a_program_that_raises_is_told_of_once_and_answers_that_do_not_parse_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = RolloutRunner(lambda gold, prediction: 1.0)
    example = dspy.Example(message="secret", label="a").with_inputs("message")
    garbled = dspy.Predict("message -> label: int")
    with caplog.at_level(logging.WARNING):
        asyncio.run(
            runner.run(garbled, example, lm=scripted_lm(lambda _: "no JSON"), adapter=dspy.JSONAdapter())
        )
        assert "The program raised" not in caplog.text
        for _ in range(2):
            asyncio.run(runner.run(Raising(KeyError("secret")), example))
    assert caplog.text.count("The program raised KeyError") == 1
    assert "secret" not in caplog.text
