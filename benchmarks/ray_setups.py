"""What the actors of ``ray_cluster.py`` hold."""

from __future__ import annotations

import json
import pathlib
from typing import Any, Literal

import dspy
from first_look import TASKS, load

from asyndbt_dspy import RolloutHost, local_lm, scripted_lm

COLORS = ("red", "green", "blue")


class Sort(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField()
    label: Literal["red", "green", "blue"] = dspy.OutputField()


def metric(gold: Any, prediction: Any, trace: Any = None) -> bool:
    """Exact match."""
    return bool(gold.label == prediction.label)


def program() -> dspy.Module:
    """The classifier of film reviews."""
    return dspy.Predict(TASKS["sst2"][0])


def shard(worker: str, data: str) -> list[dspy.Example]:
    """A third of the examples, by the worker's number."""
    rows = [row for part in ("train", "pool") for row in load(pathlib.Path(data), "sst2", part)]
    return rows[int(worker[1:]) :: 3]


def model() -> Any:
    """SmolLM2, the same answers whatever else is computed with them."""
    return local_lm("smollm2-135m", deterministic=True)


def make(worker: str, data: str) -> RolloutHost:
    """A worker with its own weights and its own shard."""
    return RolloutHost(
        program(), metric, lm=model(), examples=shard(worker, data), adapter=dspy.JSONAdapter()
    )


def sorter() -> dspy.Module:
    """The program of the overhead."""
    return dspy.Predict(Sort)


def items(count: int, start: int) -> list[dspy.Example]:
    """Examples of the overhead."""
    return [
        dspy.Example(message=f"item {number}", label=COLORS[number % 3]).with_inputs("message")
        for number in range(start, start + count)
    ]


def answer(messages: list[dict[str, str]]) -> str:
    """More often right with every class that the demos show."""
    number = int(messages[-1]["content"].split("item ")[1].split()[0])
    shown = {json.loads(one["content"])["label"] for one in messages if one["role"] == "assistant"}
    right = (number * 0.37) % 1 < 0.3 + 0.2 * len(shown)
    return json.dumps({"label": COLORS[(number + (not right)) % 3]})


def scripted() -> Any:
    """Answers at once."""
    return scripted_lm(answer, name="colors")


def make_scripted(worker: str) -> RolloutHost:
    """A worker that costs next to nothing."""
    return RolloutHost(
        sorter(),
        metric,
        lm=scripted(),
        examples=items(200, 1000 * int(worker[1:])),
        adapter=dspy.JSONAdapter(),
    )
