"""A run of one example, as the tests of rollouts make it."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
from dspy.utils.dummies import DummyLM

from asyndbt_dspy.programs.rollout import Rollout, RolloutRunner

EXAMPLE = dspy.Example(message="My card was charged twice", label="billing").with_inputs("message")


def exact(gold: dspy.Example, prediction: Any) -> bool:
    return gold.label == prediction.label


def run(program: dspy.Module, metric: Any = exact, answers: Any = None, **options: Any) -> Rollout:
    lm = DummyLM(answers or [{"label": "billing"}] * 10)
    return asyncio.run(RolloutRunner(metric).run(program, EXAMPLE, lm=lm, **options))


class Raising(dspy.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, message: str) -> Any:
        raise self.error
