"""Programs of every kind, data, and an LM that gets better with the right instructions and demos."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import dspy

from asyndbt_dspy.lms.scripted import scripted_lm

LABELS = ("red", "green", "blue")
MAGIC = "Look at the number."
"""An instruction with which the scripted LM answers right."""


class Sort(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField()
    label: Literal["red", "green", "blue"] = dspy.OutputField()


class Topic(dspy.Signature):
    """Name the topic."""

    message: str = dspy.InputField()
    topic: str = dspy.OutputField()


class TwoSteps(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.topic = dspy.Predict(Topic)
        self.sort = dspy.Predict(Sort)

    def forward(self, message: str) -> dspy.Prediction:
        return self.sort(message=self.topic(message=message).topic)


class Nested(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoSteps()
        self.check = dspy.ChainOfThought(Sort)

    def forward(self, message: str) -> dspy.Prediction:
        self.inner(message=message)
        return self.check(message=message)


class AsyncOnly(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(Sort)

    async def aforward(self, message: str) -> dspy.Prediction:
        return await self.sort.acall(message=message)


def look_up(key: str) -> str:
    """Look a key up."""
    return f"found {key}"


def right_label(message: str) -> str:
    return LABELS[int(re.findall(r"\d+", message)[-1]) % 3]


def examples(count: int, start: int = 0) -> list[dspy.Example]:
    return [
        dspy.Example(message=f"item {number}", label=right_label(f"{number}")).with_inputs("message")
        for number in range(start, start + count)
    ]


def metric(gold: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(gold.label == prediction.label)


def script(messages: list[dict[str, str]]) -> str:
    """Right with the magic sentence or with demos (assistant turns) of all three classes; else mostly ``red``."""
    system, last = messages[0]["content"], messages[-1]["content"]
    shown = {
        label for one in messages[:-1] if one["role"] == "assistant" for label in LABELS if label in one["content"]
    }
    numbers = re.findall(r"item (\d+)", last)
    number = int(numbers[-1]) if numbers else 0
    knows = MAGIC in system or len(shown) == 3 or (len(shown) == 2 and number % 2 == 0)
    answer: dict[str, Any] = {}
    for field in re.findall(r"`?(\w+)`?", last.rsplit("Respond with", 1)[-1]) if "Respond with" in last else []:
        if field in ("topic", "reasoning", "next_thought"):
            answer[field] = f"item {number}"
        elif field == "next_tool_name":
            answer[field] = "finish"
        elif field == "next_tool_args":
            answer[field] = {}
        elif field == "label":
            answer[field] = LABELS[number % 3] if knows else "red"
    return json.dumps(answer)


def color_lm(name: str = "colors", **options: Any) -> dspy.LM:
    return scripted_lm(script, name=name, **options)
