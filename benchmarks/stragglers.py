"""Asynchronous against synchronous workers of unequal speed, on a simulated clock; plane refreshes and race included.

    python benchmarks/stragglers.py [--seeds 5] [--target-seeds 30] [--out FILE]

Protocol: one log-normal delay (median 30 ms, sigma 1) per round trip, tau = 15, some workers four times slower, equal
budgets of LM calls in all arms; S workers active against all of them (S = R, tau = 1) on the same problem. Ratios are
means over seeds divided by each other: contributions (steps and race units that came back) per second of the whole run,
rollouts per second, and seconds to one target loss under the consensus. The target is reached in the first twentieth of a
run, at a time that varies by a half of itself from seed to seed: it is measured on more seeds, in runs of a fifth of
the budget (of the whole, where that was not enough). Prints one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from asyndbt_dspy.simulation import Case, Outcome, run_case

CASES = {
    "(18,9,0)": (Case(18, 9), 2.9),
    "(18,9,3)": (Case(18, 9, stragglers=3), 4.0),
    "(24,12,3)": (Case(24, 12, stragglers=3), 4.0),
    "(3,2,0)": (Case(3, 2), 1.4),
    "(3,2,1)": (Case(3, 2, stragglers=1), 2.2),
    "(18,9,0) waiting": (Case(18, 9, keep_busy=False), None),
    "(18,9,3) waiting": (Case(18, 9, stragglers=3, keep_busy=False), None),
    "(3,2,1) waiting": (Case(3, 2, stragglers=1, keep_busy=False), None),
    "(3,1,1)": (Case(3, 1, stragglers=1), None),
    "(18,auto,3)": (Case(18, 9, stragglers=3, automatic=True), None),
    "(3,auto,1)": (Case(3, 2, stragglers=1, automatic=True), None),
    "(18,9,0) equal delays": (Case(18, 9, sigma=0.0), None),
    "(18,9,3) equal delays": (Case(18, 9, stragglers=3, sigma=0.0), None),
    "(3,2,1) equal delays": (Case(3, 2, stragglers=1, sigma=0.0), None),
    "(18,9,3) two drop out": (Case(18, 9, stragglers=3, lost=2), None),
}
"""(R, S, stragglers) and the ratio of contributions per second that it must reach."""
TARGET_RATIO = 1 / 3
"""With stragglers, the target must be reached in so much of the synchronous time."""
TO_TARGET = {"steps": 500, "held_out": 48}


def mean(runs: Sequence[Outcome], name: str) -> float:
    return statistics.fmean(getattr(one, name) for one in runs)


def compare(case: Case, seeds: int, target_seeds: int) -> dict[str, Any]:
    fast, slow = (
        [run_case(case, seed, synchronous=synchronous) for seed in range(seeds)]
        for synchronous in (False, True)
    )
    fast_to_target, slow_to_target = (
        [to_target(case, seed, synchronous) for seed in range(target_seeds)] for synchronous in (False, True)
    )
    return {
        "contributions_ratio": round(mean(fast, "rate") / mean(slow, "rate"), 3),
        "rollouts_ratio": round(mean(fast, "rollout_rate") / mean(slow, "rollout_rate"), 3),
        "target_seconds_ratio": round(mean(fast_to_target, "target_s") / mean(slow_to_target, "target_s"), 3),
        "asynchronous": summary(fast, fast_to_target),
        "synchronous": summary(slow, slow_to_target),
    }


def to_target(case: Case, seed: int, synchronous: bool) -> Outcome:
    """A run of a fifth of the budget; of the whole, where that did not reach the target."""
    short = run_case(case, seed, synchronous=synchronous, **TO_TARGET)
    return short if math.isfinite(short.target_s) else run_case(case, seed, synchronous=synchronous)


def summary(runs: Sequence[Outcome], to_target: Sequence[Outcome]) -> dict[str, Any]:
    plain = [dataclasses.asdict(one) for one in runs]
    names = ("contributions", "seconds", "search_s", "mean_staleness", "utilisation")
    figures = {name: round(statistics.fmean(one[name] for one in plain), 3) for name in names}
    return {
        **figures,
        "target_s": round(mean(to_target, "target_s"), 3),
        "target_calls": round(mean(to_target, "target_calls"), 1),
        "contributions_per_s": round(mean(runs, "rate"), 1),
        "largest_staleness": max(one.largest_staleness for one in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--target-seeds", type=int, default=30)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    arms = {}
    for name, (case, needed) in CASES.items():
        arms[name] = compare(case, options.seeds, options.target_seeds)
        if needed is not None:
            reached = arms[name]["contributions_ratio"] >= needed
            if case.stragglers:
                arms[name]["needed_target"] = round(TARGET_RATIO, 3)
                reached = reached and arms[name]["target_seconds_ratio"] <= TARGET_RATIO
            arms[name] |= {"needed": needed, "reached": reached}
    text = json.dumps(
        {
            "benchmark": "stragglers",
            "seeds": options.seeds,
            "target_seeds": options.target_seeds,
            "arms": arms,
        }
    )
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
