"""The promised speed over the synchronous algorithm, in runs of a quarter of the size that ``benchmarks/stragglers.py`` has."""

from __future__ import annotations

import math
import statistics

import pytest

from asyndbt_dspy.simulation import Case, Outcome, run_case

SIZE = {"steps": 600, "held_out": 108}


@pytest.mark.parametrize(
    ("case", "contributions"),
    [
        (Case(18, 9), 2.9),
        (Case(18, 9, stragglers=3), 4.0),
        (Case(24, 12, stragglers=3), 4.0),
        (Case(3, 2), 1.4),
        (Case(3, 2, stragglers=1), 2.2),
    ],
    ids=str,
)
def test_contributions_per_second_and_time_to_the_target(case: Case, contributions: float) -> None:
    runs = [run_case(case, seed, synchronous=False, **SIZE) for seed in range(3)]
    synchronous = [run_case(case, seed, synchronous=True, **SIZE) for seed in range(3)]
    assert _mean(runs, "rate") >= contributions * _mean(synchronous, "rate")
    assert max(one.largest_staleness for one in runs) < case.max_staleness
    assert all(math.isfinite(one.target_s) for one in (*runs, *synchronous))
    if case.stragglers:
        assert _mean(runs, "target_s") <= _mean(synchronous, "target_s") / 3


def _mean(runs: list[Outcome], name: str) -> float:
    return statistics.fmean(getattr(one, name) for one in runs)
