"""Few examples and no valset: how many of them the final race should have.

    python benchmarks/small_data.py --data DIR [--tasks sst2,trec,ag_news] [--lms smollm2-135m,gemma3-270m]
                                    [--examples 20,40] [--calls 300] [--seeds 1] [--out FILE]

A trainset of so many examples, drawn evenly over the labels, and nothing else. Arms: ``quarter`` (a quarter is kept back for the
race, and there are three workers wherever each has a minibatch then) and ``shipped`` (up to half where a quarter is less than 24
examples; fewer workers where that leaves one without a minibatch). A run that the file already holds is skipped.

Prints one JSON line: per number of examples the mean test scores, how often the student was returned, and how often the program
is more than two paired standard errors below the student.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import time
from collections.abc import Hashable, Sequence
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dspy
from quality_bench import cells, compiles, lms, tasks
from quality_bench.counting import CountedMetric
from quality_bench.statistics import mean

from asyndbt_dspy import AsynDBT, Budget

OUT = pathlib.Path(__file__).parent / "results" / "small_data.jsonl"
Row = dict[str, Any]
ARMS: dict[str, Row] = {"quarter": {"race_examples": 0}, "shipped": {}}
"""Constants of each."""
Key = tuple[str, str, int, str, int]


def key_of(row: Row) -> Key:
    return row["task"], row["lm"], row["examples"], row["arm"], row["seed"]


def run(key: Key, loaded: lms.Lms, folder: pathlib.Path, calls: int) -> Row:
    """One compile, and the test scores of its program and of the student."""
    name, lm, count, arm, seed = key
    task = tasks.TASKS[name]
    data = tasks.load(folder, task)
    trainset = tasks.balanced(data.train + data.valid, count, seed)
    loaded.book.start(seed)
    started = time.perf_counter()
    with dspy.context(lm=loaded.task, adapter=dspy.JSONAdapter()), cells.quiet():
        optimizer = AsynDBT(
            CountedMetric(feedback=False),
            budget=Budget(metric_calls=calls),
            seed=seed,
            deterministic=True,
            progress=False,
            config=ARMS[arm],
        )
        program = optimizer.compile(task.build(), trainset=trainset)
        seconds = round(time.perf_counter() - started, 1)
        found = compiles.scored(optimizer, program, task.build(), data.test)
    result = optimizer.result
    assert result is not None
    return {
        "task": name,
        "lm": lm,
        "examples": count,
        "arm": arm,
        "seed": seed,
        "calls": calls,
        "workers": len(result.workers),
        "held_out": result.candidates[0].examples,
        "seconds": seconds,
        **found,
    }


def summary(rows: Sequence[Row]) -> Row:
    """Means over the cells that both arms have."""
    found: Row = {"benchmark": "small_data"}
    for count in sorted({row["examples"] for row in rows}):
        arms = {arm: {key_of(row)[:2]: [] for row in rows} for arm in ARMS}
        for row in rows:
            if row["examples"] == count:
                arms[row["arm"]][key_of(row)[:2]].append(row)
        both = [cell for cell in next(iter(arms.values())) if all(arms[arm][cell] for arm in arms)]
        found[str(count)] = {
            arm: {
                "runs": sum(len(arms[arm][cell]) for cell in both),
                "test": round(mean([mean([one["test"] for one in arms[arm][cell]]) for cell in both]), 2),
                "student": round(mean([arms[arm][cell][0]["student"] for cell in both]), 2),
                "returned_student": sum(one["is_student"] for cell in both for one in arms[arm][cell]),
                "harmed": sum(one["verdict"] < 0 for cell in both for one in arms[arm][cell]),
            }
            for arm in ARMS
            if both
        }
    return found


def main() -> None:
    options = compiles.parser(
        __doc__ or "",
        OUT,
        tasks="sst2,trec,ag_news",
        lms="smollm2-135m,gemma3-270m",
        examples="20,40",
        calls=300,
        seeds=1,
    ).parse_args()
    names, models, counts = (one.split(",") for one in (options.tasks, options.lms, options.examples))
    wanted = [
        (lm, (task, lm, int(count), arm, seed))
        for seed, lm, count, task, arm in itertools.product(range(options.seeds), models, counts, names, ARMS)
    ]

    def one(key: Key, loaded: lms.Lms, _: dict[Hashable, Row]) -> Row:
        return run(key, loaded, options.data, options.calls)

    print(json.dumps(summary(compiles.fill(options.out, wanted, key_of, one))))


if __name__ == "__main__":
    main()
