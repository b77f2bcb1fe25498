"""What the actors of these tests hold: importable by name on every node."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any, Literal

import dspy

from asyndbt_dspy import RolloutHost, scripted_lm
from asyndbt_dspy.core.messages import decode, encode
from asyndbt_dspy.testing.toys import TableEvaluator, additive_score

MAGIC = "Say the color."
COLORS = ("red", "green", "blue")


class Sort(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField()
    label: Literal["red", "green", "blue"] = dspy.OutputField()


def examples(count: int, start: int = 0) -> list[dspy.Example]:
    return [
        dspy.Example(message=f"item {number}", label=COLORS[number % 3]).with_inputs("message")
        for number in range(start, start + count)
    ]


def metric(gold: Any, prediction: Any, trace: Any = None) -> bool:
    return bool(gold.label == prediction.label)


def answer(messages: list[dict[str, str]]) -> str:
    """Right with the magic words, else by a third more with every class that the demos show."""
    number = int(messages[-1]["content"].split("item ")[1].split()[0])
    shown = {json.loads(one["content"])["label"] for one in messages if one["role"] == "assistant"}
    worth = 0.3 + 0.15 * len(shown) + 0.2 * (MAGIC in messages[0]["content"])
    right = (number * 0.37) % 1 < worth
    return json.dumps({"label": COLORS[(number + (not right)) % 3]})


class TableHost:
    """Scores evaluations of the toy problem."""

    async def evaluate(self, payload: str) -> str:
        return json.dumps(encode(await TableEvaluator(additive_score).evaluate(decode(json.loads(payload)))))


def make_table(worker: str) -> TableHost:
    return TableHost()


def make(worker: str, log: str = "", count: int = 0, start: int = 0) -> RolloutHost:
    """A host whose LM writes a line per call to a file."""

    def script(messages: list[dict[str, str]]) -> str:
        if log:
            with open(log, "a") as out:
                out.write(f"{worker} {os.getpid()} {time.time()}\n")
        return answer(messages)

    return RolloutHost(
        dspy.Predict(Sort),
        metric,
        lm=scripted_lm(script, name="colors"),
        examples=examples(count, start),
        adapter=dspy.JSONAdapter(),
    )


def make_with_gpu(worker: str, log: str) -> RolloutHost:
    """A plain host that notes which GPU a model built here would find."""
    with open(log, "a") as out:
        out.write(f"{worker} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}\n")
    return make(worker)


def make_broken(worker: str) -> RolloutHost:
    raise FileNotFoundError("no weights here")


def make_other(worker: str) -> RolloutHost:
    return RolloutHost(dspy.Predict("question -> answer"), metric, lm=scripted_lm(answer))


def make_slow(worker: str, log: str) -> RolloutHost:
    """A plain host whose rollouts take a moment of real time, so that a node can die under them."""
    host = make(worker, log)
    quick = host.rollout

    async def rollout(payload: str) -> str:
        await asyncio.sleep(0.02)
        return await quick(payload)

    host.rollout = rollout  # type: ignore[method-assign]
    return host


def make_late(worker: str, log: str) -> RolloutHost:
    """A plain host whose answers are paid for a moment before anybody hears of them."""
    host = make(worker, log)
    quick = host.rollout

    async def rollout(payload: str) -> str:
        found = await quick(payload)
        await asyncio.sleep(0.05)
        return found

    host.rollout = rollout  # type: ignore[method-assign]
    return host


def make_with_settings(worker: str, settings: dict[str, int]) -> RolloutHost:
    return make(worker, count=settings["count"])
