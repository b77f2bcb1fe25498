"""Demos as the adapter shows them, against demos that end like the turn that is to be answered.

    python benchmarks/demo_endings.py --data DIR [--tasks sst2,trec,ag_news] [--lms smollm2-135m,gemma3-270m] [--out FILE]

No optimizer: random sets with one demo per class or two (about four in all), each set shown in both ways to the same LM
through ``JSONAdapter`` on the same validation examples. Prints one JSON object: accuracies per set, in percent.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dspy
from quality_bench import cells, lms, tasks

SETS = 3
EXAMPLES = 36


def reminder(task: tasks.Task, demo: dspy.Example) -> str:
    """What the adapter adds to the last turn alone."""
    messages = dspy.settings.adapter.format(task.signature, [demo], demo.inputs())
    shown, asked = (one["content"] for one in messages if one["role"] == "user")
    assert asked.startswith(shown)
    return str(asked[len(shown) :])


def demo_set(task: tasks.Task, examples: tasks.Examples, seed: int) -> list[dspy.Example]:
    """A random set, as many of every class, in random order."""
    generator = random.Random(seed)
    each = max(1, round(4 / len(task.labels)))
    chosen = [
        generator.choice([one for one in examples.train if one.label == label])
        for label in task.labels * each
    ]
    generator.shuffle(chosen)
    return chosen


def accuracy(task: tasks.Task, demos: list[dspy.Example], examples: list[dspy.Example]) -> float:
    program = task.build()
    program.named_predictors()[0][1].demos = demos
    return cells.percent(cells.correct(program, examples))


def measure(task: tasks.Task, examples: tasks.Examples) -> list[dict[str, Any]]:
    valid = tasks.balanced(examples.valid, EXAMPLES, 0)
    rows = []
    for seed in range(SETS):
        demos = demo_set(task, examples, seed)
        ending, last = reminder(task, demos[0]), task.inputs[-1]
        alike = [one.copy(**{last: one[last] + ending}) for one in demos]
        rows.append(
            {
                "as_shown": accuracy(task, demos, valid),
                "ending_alike": accuracy(task, alike, valid),
                "classes": [one.label for one in demos],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=os.environ.get("ASYNDBT_DATA"), required=False)
    parser.add_argument("--tasks", default="sst2,trec,ag_news")
    parser.add_argument("--lms", default=",".join(lms.LMS))
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.data is None:
        parser.error("no data: give --data DIR or set ASYNDBT_DATA")
    found: dict[str, Any] = {}
    for name in options.lms.split(","):
        with dspy.context(lm=lms.load(name).task, adapter=dspy.JSONAdapter(), max_errors=1_000_000):
            for task in (tasks.TASKS[one] for one in options.tasks.split(",")):
                found[f"{task.name}, {name}"] = measure(task, tasks.load(pathlib.Path(options.data), task))
    text = json.dumps({"benchmark": "demo_endings", "examples": EXAMPLES, "cells": found})
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
