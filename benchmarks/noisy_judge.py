"""A judge that is wrong at 15 % of its verdicts: what it costs, and what ``noisy=True`` gets back.

    python benchmarks/noisy_judge.py [--data DIR] [--tasks sst2,trec,ag_news] [--lm smollm2-135m] [--calls 600] [--seeds 4]
                                     [--error 0.15] [--valid 60] [--out FILE]

The metric is right or wrong about an answer by a toss of its own at every call, so that repeated scores of one program on
one example differ. Arms: ``clean`` (the exact metric), ``once`` (the judge, each rollout once), ``noisy`` (the judge, and
``noisy=True``: what is asked again is new evidence, and an undecided race asks again). All with ``loss="metric"``, as an LM
behind an API reports no distribution over labels. Test scores are exact. A run that the file already holds is skipped.

Prints one JSON line: mean test scores, share of the loss to noise that ``noisy`` gets back, and how often it is ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import statistics
import sys
import time
from typing import Any

import dspy
from quality_bench import cells, lms, tasks

from asyndbt_dspy import AsynDBT, Budget

ARMS = ("clean", "once", "noisy")


def judge(error: float, seed: int) -> Any:
    """Exact match, wrong with probability ``error`` at every call."""
    rng = random.Random(seed)

    def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        return bool(gold.label == getattr(prediction, "label", None)) != (rng.random() < error)

    return metric


def run(arm: str, name: str, loaded: lms.Lms, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One compile and its exact score on the test part."""
    task = tasks.TASKS[name]
    examples = tasks.load(options.data, task)
    loaded.book.start(seed)
    started = time.perf_counter()
    with dspy.context(lm=loaded.task, adapter=dspy.JSONAdapter()), cells.quiet():
        optimizer = AsynDBT(
            judge(0.0 if arm == "clean" else options.error, seed),
            workers=3,
            budget=Budget(metric_calls=options.calls),
            seed=seed,
            deterministic=True,
            loss="metric",
            noisy=arm == "noisy",
            progress=False,
        )
        valset = random.Random(seed).sample(examples.valid, min(options.valid, len(examples.valid)))
        program = optimizer.compile(task.build(), trainset=examples.train, valset=valset)
        seconds = time.perf_counter() - started
        test = cells.percent(cells.correct(program, examples.test))
    assert optimizer.result is not None
    return {
        "arm": arm,
        "task": name,
        "lm": options.lm,
        "calls": options.calls,
        "error": options.error,
        "seed": seed,
        "test": test,
        "metric_calls": optimizer.result.metric_calls,
        "seconds": round(seconds, 1),
    }


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over tasks and seeds that all arms have."""
    found = {(row["arm"], row["task"], row["seed"]): row["test"] for row in rows}
    places = sorted({key[1:] for key in found if all((arm, *key[1:]) in found for arm in ARMS)})
    if not places:
        return {"benchmark": "noisy_judge", "runs": 0, "rows": rows}
    tests = {arm: [found[(arm, *place)] for place in places] for arm in ARMS}
    means = {arm: statistics.fmean(values) for arm, values in tests.items()}
    gains = [noisy - once for noisy, once in zip(tests["noisy"], tests["once"], strict=True)]
    spread = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    return {
        "benchmark": "noisy_judge",
        "runs": len(places),
        "mean_test": {arm: round(mean, 2) for arm, mean in means.items()},
        "noisy_minus_once": round(statistics.fmean(gains), 2),
        "standard_error": None if spread is None else round(spread, 2),
        "ahead": sum(gain > 0 for gain in gains),
        "behind": sum(gain < 0 for gain in gains),
        "rows": rows,
    }


def main() -> int:
    """Run what is missing and print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=os.environ.get("ASYNDBT_DATA"))
    parser.add_argument("--tasks", default="sst2,trec,ag_news")
    parser.add_argument("--lm", default="smollm2-135m")
    parser.add_argument("--calls", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--error", type=float, default=0.15, help="share of wrong verdicts, in [0, 0.5)")
    parser.add_argument("--valid", type=int, default=60, help="examples of the final race")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the folder of the benchmark data with --data or ASYNDBT_DATA")
    if not 0.0 <= options.error < 0.5:
        parser.error(
            f"--error {options.error} must be in [0, 0.5): a judge that is wrong more often is to be inverted"
        )
    rows: list[dict[str, Any]] = []
    if options.out is not None and options.out.exists():
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
    done = {(row["arm"], row["task"], row["seed"]) for row in rows}
    loaded = lms.load(options.lm)
    for seed in range(options.seeds):
        for name in options.tasks.split(","):
            for arm in ARMS:
                if (arm, name, seed) in done:
                    continue
                rows.append(run(arm, name, loaded, seed, options))
                sys.stderr.write(json.dumps(rows[-1]) + "\n")
                if options.out is not None:
                    options.out.write_text(json.dumps(report(rows)) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(report(rows)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
