"""Small budgets by the cap that sets them: metric calls, LM calls, tokens, seconds.

    python benchmarks/caps.py --data DIR [--tasks sst2,trec,ag_news] [--lms smollm2-135m] [--calls 100] [--seeds 2]
                              [--arms metric_calls,lm_calls,tokens,seconds] [--label shipped] [--out FILE]

One-predictor programs, so that a cap of so many LM calls is one of so many metric calls. The caps on tokens and seconds are what
the run of as many metric calls on the same cell took (``metric_calls`` runs first). A run that the file already holds is
skipped; ``--label`` tells versions of the package apart.

Prints one JSON line: per arm and label the mean test scores, how often the student was returned, on how many examples the student
was raced, and how often the program is more than two paired standard errors below the student.
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

from asyndbt_dspy import AsynDBT, Budget, Price

OUT = pathlib.Path(__file__).parent / "results" / "caps.jsonl"
ARMS = ("metric_calls", "lm_calls", "tokens", "seconds")
Row = dict[str, Any]
Key = tuple[str, str, str, str, int, int]


def key_of(row: Row) -> Key:
    return row["label"], row["arm"], row["task"], row["lm"], row["calls"], row["seed"]


def run(key: Key, loaded: lms.Lms, folder: pathlib.Path, cap: float) -> Row:
    """One compile, and the test scores of its program and of the student."""
    label, arm, name, lm, calls, seed = key
    task, asked = tasks.TASKS[name], loaded.task.copy(max_tokens=40)  # a cap on tokens needs a bound
    data = tasks.load(folder, task)
    loaded.book.start(seed)
    started = time.perf_counter()
    with dspy.context(lm=asked, adapter=dspy.JSONAdapter()), cells.quiet():
        optimizer = AsynDBT(
            CountedMetric(feedback=False),
            workers=3,
            budget=Budget(**{arm: cap}),
            prices={asked.model: Price(0.0, 0.0)},  # so that every arm counts its tokens
            seed=seed,
            progress=False,
        )
        program = optimizer.compile(task.build(), trainset=data.train, valset=data.valid)
        seconds = round(time.perf_counter() - started, 1)
        found = compiles.scored(optimizer, program, task.build(), data.test)
    result = optimizer.result
    assert result is not None
    lines = result.spending.values()
    return {
        "label": label,
        "arm": arm,
        "task": name,
        "lm": lm,
        "calls": calls,
        "seed": seed,
        "cap": cap,
        "metric_calls": result.metric_calls,
        "tokens": sum(line["prompt_tokens"] + line["completion_tokens"] for line in lines),
        "raced_on": result.candidates[0].examples,
        "challengers": len(result.candidates) - 1,
        "seconds": seconds,
        **found,
    }


def summary(rows: Sequence[Row]) -> Row:
    """Means over all runs of an arm."""
    found: Row = {"benchmark": "caps"}
    for label, arm in dict.fromkeys((row["label"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["label"], row["arm"]) == (label, arm)]
        found[f"{arm}, {label}"] = {
            "runs": len(own),
            "metric_calls": round(mean([row["metric_calls"] for row in own]), 1),
            "test": round(mean([row["test"] for row in own]), 2),
            "student": round(mean([row["student"] for row in own]), 2),
            "raced_on": round(mean([row["raced_on"] for row in own]), 1),
            "returned_student": sum(row["is_student"] for row in own),
            "harmed": sum(row["verdict"] < 0 for row in own),
        }
    return found


def main() -> None:
    options = compiles.parser(
        __doc__ or "",
        OUT,
        tasks="sst2,trec,ag_news",
        lms="smollm2-135m",
        arms=",".join(ARMS),
        calls=100,
        seeds=2,
        label="shipped",
    ).parse_args()
    names, models, arms = (one.split(",") for one in (options.tasks, options.lms, options.arms))
    wanted = [
        (lm, (options.label, arm, task, lm, options.calls, seed))
        for lm, seed, task, arm in itertools.product(models, range(options.seeds), names, arms)
    ]

    def one(key: Key, loaded: lms.Lms, known: dict[Hashable, Row]) -> Row:
        arm, cap = key[1], float(options.calls)
        if arm in ("tokens", "seconds"):
            cap = known[("shipped", "metric_calls", *key[2:])][arm]
        return run(key, loaded, options.data, cap)

    print(json.dumps(summary(compiles.fill(options.out, wanted, key_of, one))))


if __name__ == "__main__":
    main()
