"""Many sets of demos, all on the same examples: what picks the set that is best on other examples?

    python benchmarks/crossed.py --data DIR [--tasks sst2,trec,ag_news,support_desk] [--lms smollm2-135m,gemma3-270m] [--sets 16]
        [--out TABLE.jsonl]
    python benchmarks/crossed.py --read TABLE.jsonl

Each random set (with one demo per class or two, about four in all, in random order) is shown as the adapter shows it and with
demos that end like the turn that is to be answered; each of these candidates meets the same examples. The table keeps
score and margin of every rollout. ``--read`` draws a few examples, picks the best candidate by a value (metric, clipped
margin, or both) on these, and reports its accuracy on the others, over many draws: how good a value is at picking, with and
without the choice of the ending; and whether sets that are good in one way are good in the other. ``support_desk`` is the
demo's task (``examples/``); it needs no data folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dspy
import numpy as np
from demo_endings import demo_set, reminder
from quality_bench import lms, tasks

from asyndbt_dspy.programs.rollout import RolloutRunner

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXAMPLES, IN_FLIGHT = 90, 32
PICKED_ON = (6, 12, 24)
DRAWS = 2000
RANGES = {"now": (-3.0, 0.5), "even": (-1.5, 1.5), "narrow": (-1.0, 0.5), "wide": (-5.0, 2.0)}
WEIGHTS = (0.0, 0.3, 0.6, 1.0)


def load(name: str, folder: pathlib.Path | None) -> tuple[tasks.Task, tasks.Examples]:
    """A task of the grid, or the demo's."""
    if name != "support_desk":
        if folder is None:
            raise SystemExit("no data: give --data DIR or set ASYNDBT_DATA")
        return tasks.TASKS[name], tasks.load(folder, tasks.TASKS[name])
    sys.path.insert(0, str(ROOT / "examples"))
    import support_desk as demo

    class SupportDesk(tasks.Task):
        labels = tuple(dict.fromkeys(demo.TEAMS.values()))  # type: ignore[assignment]

    task = SupportDesk(name, "", demo.Route, ("message",), lambda: dspy.Predict(demo.Route), "", tuning=True)
    examples = [one.copy(label=one.team).with_inputs("message") for one in demo.load("train")]
    return task, tasks.Examples(examples, [], [])


async def rows(task: tasks.Task, examples: tasks.Examples, sets: int, lm: Any) -> list[dict[str, Any]]:
    """Every candidate on every example."""
    (field,) = list(task.signature.output_fields)[-1:]
    runner = RolloutRunner(lambda gold, got, trace=None: float(gold.label == got[field]))
    gate = asyncio.Semaphore(IN_FLIGHT)
    shown = tasks.balanced(examples.train, len(examples.train), 1)
    met, rest = shown[:EXAMPLES], shown[EXAMPLES:]

    async def one(program: dspy.Module, example: dspy.Example) -> list[Any]:
        async with gate:
            found = await runner.run(program, example, lm=lm)
        margin = None if found.margin is None else round(found.margin, 3)
        return [found.score, margin]

    table = []
    for seed in range(sets):
        demos = demo_set(task, tasks.Examples(rest, [], []), seed)
        ending, last = reminder(task, demos[0]), task.inputs[-1]
        alike = [demo.copy(**{last: demo[last] + ending}) for demo in demos]
        for is_alike, kept in ((False, demos), (True, alike)):
            program = task.build()
            program.named_predictors()[0][1].demos = kept
            outcomes = await asyncio.gather(*(one(program, example) for example in met))
            table.append(
                {
                    "set": seed,
                    "alike": is_alike,
                    "classes": [demo.label for demo in demos],
                    "labels": [example.label for example in met],
                    "outcomes": outcomes,
                }
            )
    runner.close()
    return table


def values(scores: np.ndarray, margins: np.ndarray, weight: float, bounds: tuple[float, float]) -> np.ndarray:
    """What is picked by, ``[candidates, examples]``; the metric alone where there is no margin."""
    low, high = bounds
    soft = (np.clip(margins, low, high) - low) / (high - low)
    return np.where(np.isnan(soft), scores, (1.0 - weight) * scores + weight * soft)


def picked(value: np.ndarray, scores: np.ndarray, count: int, generator: np.random.Generator) -> float:
    """Mean accuracy on the other examples of what is best on ``count`` drawn ones, in percent."""
    found = []
    for _ in range(DRAWS):
        order = generator.permutation(scores.shape[1])
        few, others = order[:count], order[count:]
        # Ties to a random one, not to the first.
        best = np.argmax(value[:, few].mean(axis=1) + 1e-9 * generator.random(len(value)))
        found.append(scores[best][others].mean())
    return 100.0 * float(np.mean(found))


def read(table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per cell and way of showing demos: accuracy of what each value picks."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        cells.setdefault(f"{row['task']}, {row['lm']}", []).append(row)
    report: dict[str, Any] = {}
    for cell, found in cells.items():
        for way in ("as shown", "alike", "both"):
            kept = [one for one in found if way == "both" or one["alike"] == (way == "alike")]
            outcomes = np.array([one["outcomes"] for one in kept], dtype=float)
            scores, margins = np.nan_to_num(outcomes[..., 0]), outcomes[..., 1]
            generator = np.random.default_rng(0)
            accuracies = 100.0 * scores.mean(axis=1)
            figures: dict[str, Any] = {
                "mean": round(float(accuracies.mean()), 1),
                "best": round(float(accuracies.max()), 1),
            }
            for name, bounds in RANGES.items():
                for weight in WEIGHTS if name == "now" else WEIGHTS[1:]:
                    value = values(scores, margins, weight, bounds)
                    figures[f"{name} {weight:g}"] = [
                        round(picked(value, scores, count, generator), 1) for count in PICKED_ON
                    ]
            report.setdefault(cell, {})[way] = figures
        report[cell]["correlation"] = correlation(found)
    return report


def correlation(found: Sequence[dict[str, Any]]) -> float:
    """Between the sets' mean values as shown and those of the same sets shown alike."""
    means: dict[bool, list[float]] = {False: [], True: []}
    for row in sorted(found, key=lambda one: one["set"]):
        outcomes = np.array(row["outcomes"], dtype=float)
        value = values(np.nan_to_num(outcomes[:, 0]), outcomes[:, 1], 0.6, RANGES["now"])
        means[row["alike"]].append(float(value.mean()))
    return round(float(np.corrcoef(means[False], means[True])[0, 1]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=os.environ.get("ASYNDBT_DATA"), required=False)
    parser.add_argument("--tasks", default="sst2,trec,ag_news,support_desk")
    parser.add_argument("--lms", default=",".join(lms.LMS))
    parser.add_argument("--sets", type=int, default=16)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--read", type=pathlib.Path)
    options = parser.parse_args()
    if options.read:
        lines = options.read.read_text(encoding="utf-8").splitlines()
        print(json.dumps({"benchmark": "crossed", "cells": read([json.loads(line) for line in lines])}))
        return
    folder = None if options.data is None else pathlib.Path(options.data)
    for name in options.lms.split(","):
        lm = lms.load(name).task
        for one in options.tasks.split(","):
            task, examples = load(one, folder)
            with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
                found = asyncio.run(rows(task, examples, options.sets, lm))
            text = "".join(json.dumps({"task": one, "lm": name, **row}) + "\n" for row in found)
            if options.out:
                with options.out.open("a", encoding="utf-8") as sink:
                    sink.write(text)
            else:
                print(text, end="")


if __name__ == "__main__":
    main()
