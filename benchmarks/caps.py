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

import argparse
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dspy
from quality_bench import cells, lms, tasks
from quality_bench.counting import CountedMetric
from quality_bench.statistics import mean, verdict

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
        own, others = (cells.correct(one, data.test) for one in (program, task.build()))
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
        "is_student": result.winner == "student",
        "test": cells.percent(own),
        "student": cells.percent(others),
        "verdict": verdict(list(map(float, own)), list(map(float, others))),
        "seconds": seconds,
        "versions": cells.versions(),
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        default=os.environ.get("ASYNDBT_DATA"),
        required="ASYNDBT_DATA" not in os.environ,
    )
    parser.add_argument("--tasks", default="sst2,trec,ag_news")
    parser.add_argument("--lms", default="smollm2-135m")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--label", default="shipped")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    known = {key_of(row): row for row in cells.read(options.out)}
    names, models, arms = (str(one).split(",") for one in (options.tasks, options.lms, options.arms))
    loaded: lms.Lms | None = None
    for lm, seed, task, arm in itertools.product(models, range(options.seeds), names, arms):
        key = (options.label, arm, task, lm, options.calls, seed)
        if key in known:
            continue
        if loaded is None or loaded.name != lm:
            loaded = lms.load(lm)
        cap = float(options.calls)
        if arm in ("tokens", "seconds"):
            cap = known[("shipped", "metric_calls", task, lm, options.calls, seed)][arm]
        row = run(key, loaded, pathlib.Path(options.data), cap)
        known[key] = row
        cells.append(options.out, row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps(summary(cells.read(options.out))))


if __name__ == "__main__":
    main()
