"""Programs of every kind that the package promises to optimize, and the answers a scripted LM gives them."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import dspy
import pytest
from dspy.utils.dummies import DummyLM


class Queue(enum.Enum):
    BILLING = "billing"
    ACCESS = "access"


class Triage(dspy.Signature):
    """Sort the message into a queue."""

    message: str = dspy.InputField()
    label: Literal["billing", "access", "other"] = dspy.OutputField()


class Urgency(dspy.Signature):
    """Say whether the message is urgent."""

    message: str = dspy.InputField()
    urgent: bool = dspy.OutputField()


class Nested(dspy.Module):
    """Predictors in a sub-module, a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = dspy.ChainOfThought(Triage)
        self.listed = [dspy.Predict("message -> topic")]
        self.named = {"urgency": dspy.Predict(Urgency)}

    def forward(self, message: str) -> dspy.Prediction:
        topic = self.listed[0](message=message).topic
        urgent = self.named["urgency"](message=message).urgent
        return dspy.Prediction(topic=topic, urgent=urgent, label=self.inner(message=message).label)


class Shared(dspy.Module):
    """One predictor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = dspy.Predict(Triage)
        self.second = self.first

    def forward(self, message: str) -> dspy.Prediction:
        self.first(message=message)
        return self.second(message=message)


class AsyncOnly(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict(Triage)

    async def aforward(self, message: str) -> dspy.Prediction:
        return await self.classify.acall(message=message)


class Plain(dspy.Module):
    """Has `forward` only."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = dspy.Predict(Triage)

    def forward(self, message: str) -> dspy.Prediction:
        return self.classify(message=message)


def lookup(order: str) -> str:
    """Look an order up."""
    return f"order {order} is paid"


def own_lm() -> dspy.Module:
    program = Plain()
    program.classify.lm = DummyLM([{"label": "other"}] * 50)
    return program


@dataclass(frozen=True)
class Kind:
    """A kind of program.

    Attributes:
        make: Makes a student.
        answers: What the LM says in one run, call by call.
        last: Name of the predictor that gives the final answer.
    """

    make: Callable[[], dspy.Module]
    answers: list[dict[str, Any]]
    last: str


KINDS = {
    "predict": Kind(lambda: dspy.Predict(Triage), [{"label": "billing"}], "self"),
    "chain_of_thought": Kind(
        lambda: dspy.ChainOfThought(Triage),
        [{"reasoning": "It is about money.", "label": "billing"}],
        "predict",
    ),
    "react": Kind(
        lambda: dspy.ReAct(Triage, tools=[lookup]),
        [
            {"next_thought": "Look.", "next_tool_name": "lookup", "next_tool_args": {"order": "7"}},
            {"next_thought": "Done.", "next_tool_name": "finish", "next_tool_args": {}},
            {"reasoning": "It is paid.", "label": "billing"},
        ],
        "extract.predict",
    ),
    "nested": Kind(
        Nested,
        [{"topic": "money"}, {"urgent": "True"}, {"reasoning": "It is about money.", "label": "billing"}],
        "inner.predict",
    ),
    "shared": Kind(Shared, [{"label": "access"}, {"label": "billing"}], "first"),
    "async_only": Kind(AsyncOnly, [{"label": "billing"}], "classify"),
    "plain": Kind(Plain, [{"label": "billing"}], "classify"),
}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def kinds() -> dict[str, Kind]:
    return KINDS


@pytest.fixture
def triage() -> type[dspy.Signature]:
    return Triage


@pytest.fixture
def plain() -> dspy.Module:
    return Plain()


@pytest.fixture
def with_own_lm() -> dspy.Module:
    return own_lm()


@pytest.fixture
def queue() -> type[enum.Enum]:
    return Queue


@pytest.fixture
def examples() -> list[dspy.Example]:
    texts = [
        ("My card was charged twice", "billing"),
        ("I cannot sign in", "access"),
        ("Do you sell mugs?", "other"),
        ("Refund my order", "billing"),
        ("The reset mail never came", "access"),
        ("Where is your office?", "other"),
    ]
    return [dspy.Example(message=text, label=label).with_inputs("message") for text, label in texts]
