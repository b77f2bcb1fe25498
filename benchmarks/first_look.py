"""A first look at quality on real data: trec and sst2 with two small local LMs.

    python benchmarks/first_look.py --data DIR [--tasks trec sst2] [--lms smollm2-135m gemma3-270m] [--seeds 3]
                                    [--calls 600] [--out benchmarks/results/first_look.jsonl]

Compared: the student, ``LabeledFewShot``, ``BootstrapFewShotWithRandomSearch`` with as many metric calls, and AsynDBT with
three workers. trainset = train + pool, valset = valid, test only at the end. One JSON line per run; runs that the file
already holds are skipped. The data folder is never copied (``--data`` or ``ASYNDBT_DATA``).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import dspy

from asyndbt_dspy import AsynDBT, Budget, local_lm


class Trec(dspy.Signature):
    """Classify the type of answer that the question asks for.

    abbreviation: an abbreviation or what it stands for. description: a definition, a reason or a manner.
    entity: a thing, an animal, a product or a work. human: a person or a group. location: a place.
    number: a count, a date or another number.
    """

    question: str = dspy.InputField()
    label: Literal["abbreviation", "description", "entity", "human", "location", "number"] = (
        dspy.OutputField()
    )


class Sst2(dspy.Signature):
    """Classify the sentiment of the sentence from a film review as positive or negative."""

    sentence: str = dspy.InputField()
    label: Literal["positive", "negative"] = dspy.OutputField()


TASKS: dict[str, tuple[type[dspy.Signature], str, int]] = {
    "trec": (Trec, "question", 6),
    "sst2": (Sst2, "sentence", 2),
}
"""Signature, input field, number of classes."""


def load(folder: pathlib.Path, task: str, part: str) -> list[dspy.Example]:
    field = TASKS[task][1]
    lines = (folder / task / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [dspy.Example(**{field: row[field]}, label=row["label"]).with_inputs(field) for row in rows]


class CountedMetric:
    """Accuracy, counting its calls: every method is charged by the same counter."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        self.calls += 1
        return bool(gold.label == prediction.label)


def accuracy(program: dspy.Module, examples: list[dspy.Example]) -> float:
    parallel = dspy.Parallel(num_threads=32, disable_progress_bar=True)
    found = parallel([(program, one.inputs()) for one in examples])
    return sum(getattr(a, "label", None) == one.label for a, one in zip(found, examples, strict=True)) / len(
        examples
    )


Method = Callable[
    [dspy.Module, list[dspy.Example], list[dspy.Example], CountedMetric, int, int, int], dspy.Module
]


def student(program: dspy.Module, *_: Any) -> dspy.Module:
    return program


def labeled_few_shot(
    program: dspy.Module,
    train: list[dspy.Example],
    valid: Any,
    metric: Any,
    calls: int,
    classes: int,
    seed: int,
) -> dspy.Module:
    shuffled = random.Random(seed).sample(train, len(train))
    return dspy.LabeledFewShot(k=max(4, classes)).compile(program, trainset=shuffled, sample=False)


def bootstrap_rs(
    program: dspy.Module,
    train: list[dspy.Example],
    valid: list[dspy.Example],
    metric: CountedMetric,
    calls: int,
    classes: int,
    seed: int,
) -> dspy.Module:
    shuffled = random.Random(seed).sample(train, len(train))
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=metric,
        max_bootstrapped_demos=2,
        max_labeled_demos=max(4, classes),
        num_candidate_programs=max(1, calls // len(valid) - 3),
        num_threads=16,
    )
    return optimizer.compile(program, trainset=shuffled, valset=valid)


def asyndbt(
    program: dspy.Module,
    train: list[dspy.Example],
    valid: list[dspy.Example],
    metric: CountedMetric,
    calls: int,
    classes: int,
    seed: int,
) -> dspy.Module:
    optimizer = AsynDBT(metric, workers=3, budget=Budget(metric_calls=calls), seed=seed, progress=False)
    return optimizer.compile(program, trainset=train, valset=valid)


METHODS: dict[str, Method] = {
    "student": student,
    "labeled_few_shot": labeled_few_shot,
    "bootstrap_rs": bootstrap_rs,
    "asyndbt": asyndbt,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=os.environ.get("ASYNDBT_DATA"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--lms", nargs="+", default=["smollm2-135m", "gemma3-270m"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=600)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/first_look.jsonl")
    )
    arguments = parser.parse_args()
    if arguments.data is None or not pathlib.Path(arguments.data).is_dir():
        sys.exit("no data: give --data DIR or set ASYNDBT_DATA to the folder with trec/ and sst2/")
    held = (
        [json.loads(line) for line in arguments.out.read_text().splitlines()]
        if arguments.out.exists()
        else []
    )
    done = {(row["lm"], row["task"], row["method"], row["seed"], row["budget"]) for row in held}
    for name in arguments.lms:
        lm = local_lm(name)
        dspy.configure(lm=lm, adapter=dspy.JSONAdapter())
        for task in arguments.tasks:
            for method in arguments.methods:
                for seed in range(1 if method == "student" else arguments.seeds):
                    if (name, task, method, seed, arguments.calls) not in done:
                        row = run(name, task, method, seed, arguments.calls, pathlib.Path(arguments.data))
                        print(json.dumps(row), flush=True)
                        with arguments.out.open("a", encoding="utf-8") as out:
                            out.write(json.dumps(row) + "\n")


def run(lm: str, task: str, method: str, seed: int, calls: int, folder: pathlib.Path) -> dict[str, Any]:
    signature, _, classes = TASKS[task]
    train = load(folder, task, "train") + load(folder, task, "pool")
    valid, test = load(folder, task, "valid"), load(folder, task, "test")
    metric = CountedMetric()
    started = time.perf_counter()
    program = METHODS[method](dspy.Predict(signature), train, valid, metric, calls, classes, seed)
    seconds = time.perf_counter() - started
    return {
        "lm": lm,
        "task": task,
        "method": method,
        "seed": seed,
        "budget": calls,
        "metric_calls": metric.calls,
        "seconds": round(seconds, 1),
        "test_accuracy": round(100 * accuracy(program, test), 2),
        "test_examples": len(test),
    }


if __name__ == "__main__":
    main()
