"""Programs of every kind, data, and an LM that gets better with the right instruction and demos."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import dspy

from asyndbt_dspy import AsynDBT, Budget
from asyndbt_dspy.engines.protocols import Recorded
from asyndbt_dspy.lms.scripted import AsyncScriptedEngine, Script, ScriptedEngine, scripted_lm

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
    """The second predictor reads what the first one wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.topic = dspy.Predict(Topic)
        self.sort = dspy.Predict(Sort)

    def forward(self, message: str) -> dspy.Prediction:
        return self.sort(message=self.topic(message=message).topic)


class Inner(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [dspy.Predict(Topic), dspy.ChainOfThought(Topic)]

    def forward(self, message: str) -> dspy.Prediction:
        for step in self.steps:
            message = step(message=message).topic
        return dspy.Prediction(topic=message)


class Nested(dspy.Module):
    """A list of predictors in a module in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.check = dspy.ChainOfThought(Sort)

    def forward(self, message: str) -> dspy.Prediction:
        return self.check(message=self.inner(message=message).topic)


class AsyncOnly(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.topic = dspy.Predict(Topic)
        self.sort = dspy.Predict(Sort)

    async def aforward(self, message: str) -> dspy.Prediction:
        found = await self.topic.acall(message=message)
        return await self.sort.acall(message=found.topic)


def look_up(key: str) -> str:
    """Look a key up."""
    return f"{key} clear"


def make_react() -> dspy.Module:
    return dspy.ReAct(Sort, tools=[look_up], max_iters=3)


KINDS: Mapping[str, Callable[[], dspy.Module]] = {
    "Predict": lambda: dspy.Predict(Sort),
    "ChainOfThought": lambda: dspy.ChainOfThought(Sort),
    "ReAct": make_react,
    "TwoSteps": TwoSteps,
    "Nested": Nested,
    "AsyncOnly": AsyncOnly,
}


def right_label(number: int) -> str:
    return LABELS[number % 3]


def example(number: int) -> dspy.Example:
    return dspy.Example(message=f"item {number}", label=right_label(number)).with_inputs("message")


def examples(count: int, start: int = 0) -> list[dspy.Example]:
    return [example(number) for number in range(start, start + count)]


def metric(gold: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(gold.label == prediction.label)


def number_in(messages: Sequence[Mapping[str, str]]) -> int:
    """The number of the item that is asked about."""
    found = re.findall(r"item (\d+)", messages[-1]["content"])
    return int(found[-1]) if found else 0


def labels_shown(messages: Sequence[Mapping[str, str]]) -> set[str]:
    """Labels in the answers of the demos."""
    answers = [one["content"] for one in messages[:-1] if one["role"] == "assistant"]
    return {label for label in LABELS if any(f'"{label}"' in text for text in answers)}


def answer(messages: Sequence[Mapping[str, str]], **values: Any) -> str:
    """JSON with those of ``values`` that the prompt asks for."""
    asked = re.findall(r"`(\w+)`", messages[-1]["content"].rsplit("Respond with", 1)[-1])
    return json.dumps({name: values[name] for name in asked})


def stairs(predictors: int) -> Script:
    """A script that is right on one more part of the items for every predictor that knows what to do.

    A predictor knows with the magic sentence, and one that sorts also with demos of two classes. What a predictor before the
    last one knows, it passes on by the word ``clear``. Items on which too few know are ``red``.
    """

    def script(messages: list[dict[str, str]]) -> str:
        last = messages[-1]["content"].rsplit("Respond with", 1)[0]
        number = number_in(messages)
        knows = MAGIC in messages[0]["content"] or len(labels_shown(messages)) >= 2
        level = last.count("clear") + knows
        looks_up = knows and "observation" not in last
        return answer(
            messages,
            topic=f"item {number}" + " clear" * level,
            reasoning="so it is",
            next_thought="hm",
            next_tool_name="look_up" if looks_up else "finish",
            next_tool_args={"key": f"item {number}"} if looks_up else {},
            label=right_label(number) if number // 3 % predictors < level else "red",
        )

    return script


def two_levels(messages: list[dict[str, str]]) -> str:
    """A script for one ``Sort`` predictor: half of the items need the right instruction, the other half demos."""
    number, asked_right = number_in(messages), MAGIC in messages[0]["content"]
    knows = len(labels_shown(messages)) >= 2 if number // 3 % 2 else asked_right
    return answer(messages, label=right_label(number) if knows else "red")


class Recorder:
    """A script that remembers what it was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[list[dict[str, str]]] = []

    def __call__(self, messages: list[dict[str, str]]) -> Any:
        self.requests.append(messages)
        return self.script(messages)


def make_lm(script: Script, name: str = "scripted", **options: Any) -> dspy.LM:
    return scripted_lm(Recorder(script), name=name, **options)


def color_lm(name: str = "colors", predictors: int = 1, **options: Any) -> dspy.LM:
    return make_lm(stairs(predictors), name, **options)


def requests_of(lm: dspy.LM) -> list[list[dict[str, str]]]:
    """What the LM was asked, in order."""
    return list(lm.engine.script.requests)


def calls_of(lm: dspy.LM) -> int:
    """How often the LM was asked."""
    return len(lm.engine.script.requests)


def text_of(lm: dspy.LM) -> str:
    """Everything that the LM was shown."""
    return "\n".join(one["content"] for request in requests_of(lm) for one in request)


def optimizer(**options: Any) -> AsynDBT:
    """An ``AsynDBT`` with settings that fit the data of this module."""
    options = {
        "workers": 2,
        "budget": Budget(metric_calls=120),
        "progress": False,
        "deterministic": True,
        **options,
    }
    return AsynDBT(options.pop("metric", metric), **options)


def texts_for(student: dspy.Module, *texts: str) -> dict[str, list[str]]:
    """Instruction arms ``texts`` (the magic one by default) for every predictor."""
    return {name: list(texts or (MAGIC,)) for name, _ in student.named_predictors()}


def run(program: dspy.Module, message: str) -> Any:
    """What the program answers; ``None`` for an answer that cannot be read."""
    if isinstance(program, AsyncOnly):
        return asyncio.run(program.acall(message=message)).label
    return program(message=message).label


def score(program: dspy.Module, data: Sequence[dspy.Example]) -> float:
    return sum(run(program, one.message) == one.label for one in data) / len(data)


def state_of(program: dspy.Module) -> str:
    """What DSPy would save of a program, but for LMs, as text."""
    state = {
        name: {
            "signature": predictor.signature.dump_state(),
            "fields": {field: repr(one) for field, one in predictor.signature.fields.items()},
            "demos": [dict(demo.items()) for demo in predictor.demos],
            "traces": len(predictor.traces),
        }
        for name, predictor in program.named_predictors()
    }
    return json.dumps(state, sort_keys=True, default=repr)


def events_of(machine: str, recorded: Sequence[Recorded]) -> list[Any]:
    return [one.event for one in recorded if one.machine == machine]


class TurnsEngine:
    """An async engine that answers after a seeded number of turns of the event loop: any order of answers, no clock."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = True

    def __init__(self, inner: Any, seed: int, most: int) -> None:
        self.inner = inner
        self.supported_params = inner.supported_params
        self.random = random.Random(seed)
        self.most = most

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    async def complete(self, request: Any) -> Any:
        for _ in range(self.random.randrange(self.most)):
            await asyncio.sleep(0)
        return await self.inner.complete(request)


def lm_over(script: Script, async_engine: Any, name: str = "m") -> dspy.LM:
    """An LM that answers by ``script``, and in coroutines by an async engine of the test's own."""
    return dspy.LM(
        f"scripted/{name}",
        engine=ScriptedEngine(script, True),
        async_engine=async_engine,
        cache=False,
        num_retries=0,
        temperature=0.0,
    )


def shuffled_lm(seed: int, name: str = "colors", most: int = 40) -> dspy.LM:
    """The color LM, its answers in an order that depends on ``seed``."""
    recorder = Recorder(stairs(1))
    return lm_over(recorder, TurnsEngine(AsyncScriptedEngine(recorder, True), seed, most), name)


class Greedy(ScriptedEngine):
    greedy_by_default = True


class AsyncGreedy(AsyncScriptedEngine):
    greedy_by_default = True


def greedy_lm(script: Any, **options: Any) -> dspy.LM:
    """An LM that answers a repeated request as before, which the rollout cache may know."""
    engines = {"engine": Greedy(script, True), "async_engine": AsyncGreedy(script, True)}
    return dspy.LM("scripted/greedy", cache=False, num_retries=0, **engines, **options)
