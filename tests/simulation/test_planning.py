"""The planning tool: figures that can be checked by hand, its arguments, and what it takes from a journal."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from asyndbt_dspy import AsynDBT
from asyndbt_dspy.cli import main
from asyndbt_dspy.compilation import make_config
from asyndbt_dspy.core.messages import Evaluate
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.runs.journal import JournalWriter
from asyndbt_dspy.simulation.calibration import calibrated, read_run
from asyndbt_dspy.simulation.plan import Plan, mean_forecast, simulate
from asyndbt_dspy.simulation.provider import Latency, SimulatedProvider

SMALL = Plan(workers=4, latency=Latency(1.0), metric_calls=800, price=(1.0, 10.0))


def provider(**changes: Any) -> SimulatedProvider:
    settings: dict[str, Any] = {
        "concurrency": 4,
        "factors": {},
        "requests_per_minute": math.inf,
        "calls_per_rollout": 1,
        "seed": 0,
    }
    return SimulatedProvider(Latency(2.0), **(settings | changes))


def evaluation(rollouts: int, worker: str = "w0") -> Evaluate:
    return Evaluate(worker, 1, ((0,),), (tuple(range(rollouts)),), held_out=False)


@pytest.mark.parametrize(
    ("changes", "rollouts", "took_s"),
    [
        ({}, 4, 2.0),
        ({}, 9, 6.0),
        ({"calls_per_rollout": 3}, 4, 6.0),
        ({"factors": {"w0": 5.0}}, 4, 10.0),
        ({"factors": {"w1": 5.0}}, 4, 2.0),
        ({"requests_per_minute": 6.0, "concurrency": 9}, 4, 32.0),
        ({"hanging": 0.999999, "timeout_s": 7.0}, 4, 7.0),
        ({"factors": {"w0": 1e9}, "timeout_s": 7.0}, 4, 7.0),
    ],
)
def test_an_evaluation_takes_what_its_slots_and_the_limit_allow(
    changes: dict[str, Any], rollouts: int, took_s: float
) -> None:
    assert provider(**changes)(evaluation(rollouts)) == pytest.approx(took_s)


def test_workers_share_one_rate_limit_and_what_nobody_used_is_gone() -> None:
    shared = provider(requests_per_minute=60.0, concurrency=9)
    assert shared(evaluation(3)) == 4.0
    assert shared(evaluation(3, "w1")) == 7.0
    shared.clock = lambda: 100.0
    assert shared(evaluation(1)) == 2.0


def test_a_plan_without_chance_costs_what_one_reckons() -> None:
    found = simulate(SMALL)
    assert 680 < found.metric_calls <= 800
    assert found.lm_calls == found.metric_calls
    assert found.dollars == pytest.approx(found.lm_calls * (600 * 1.0 + 40 * 10.0) / 1e6)
    # 8 calls at a time on 4 workers, a second each; steps of 12 rollouts take two seconds.
    assert 800 / 32 < found.seconds < 2.2 * 800 / 32
    assert 0.8 < found.utilisation <= 1.0
    assert found.largest_staleness < 15


def test_stragglers_limits_and_hanging_calls_cost_time() -> None:
    usual = simulate(SMALL).seconds
    assert simulate(dataclasses.replace(SMALL, stragglers=0.25, slowdown=10.0)).seconds > usual
    limited = simulate(dataclasses.replace(SMALL, requests_per_minute=120.0))
    assert limited.seconds >= 0.5 * (limited.lm_calls - 1)
    assert simulate(dataclasses.replace(SMALL, hanging=0.02, timeout_s=30.0)).seconds > usual


def test_keeping_everybody_busy_helps_where_workers_are_unequal() -> None:
    plan = dataclasses.replace(
        SMALL, workers=20, metric_calls=8_000, latency=Latency(1.0, 1.0), stragglers=0.15, slowdown=8.0
    )
    waiting = simulate(dataclasses.replace(plan, active_workers=10))
    for busy in (
        {"active_workers": 10, "keep_busy": True},
        {"max_staleness": "auto", "active_workers": "auto"},
        {},
    ):
        found = simulate(dataclasses.replace(plan, **busy))
        assert found.seconds - found.race_s < 0.85 * (waiting.seconds - waiting.race_s)
        assert found.utilisation > 1.05 * waiting.utilisation


@pytest.mark.parametrize("max_staleness", [None, 7, "auto"])
@pytest.mark.parametrize("active_workers", [None, 2, "auto"])
def test_a_plan_has_the_constants_that_a_compile_would_have(
    active_workers: int | Literal["auto"] | None, max_staleness: int | Literal["auto"] | None
) -> None:
    said = {"active_workers": active_workers, "max_staleness": max_staleness}
    compiled = make_config(AsynDBT(lambda gold, pred, trace=None: 1.0, **said), 4)
    assert dataclasses.replace(SMALL, **said).config() == compiled


def test_equal_seeds_give_equal_forecasts() -> None:
    plan = dataclasses.replace(SMALL, latency=Latency(1.0, 0.8))
    assert simulate(plan) == simulate(plan)
    assert simulate(plan) != simulate(dataclasses.replace(plan, seed=1))
    one, two = simulate(plan), simulate(dataclasses.replace(plan, seed=1))
    assert mean_forecast([one, two])["seconds"] == pytest.approx((one.seconds + two.seconds) / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"workers": 0},
        {"metric_calls": 0},
        {"stragglers": 1.5},
        {"slowdown": 0.5},
        {"requests_per_minute": 0.0},
        {"hanging": 1.0},
        {"timeout_s": math.inf},
        {"held_out": -1},
    ],
)
def test_plans_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(changes))):
        dataclasses.replace(SMALL, **changes)


def test_latencies_that_cannot_be_are_refused() -> None:
    for median, sigma in ((0.0, 1.0), (math.inf, 1.0), (1.0, -1.0)):
        with pytest.raises(ConfigurationError, match="must be > 0"):
            Latency(median, sigma)


def test_the_command_line_prints_what_the_plan_takes(capsys: pytest.CaptureFixture[str]) -> None:
    line = "simulate --workers 30 --latency lognormal:1.2s,0.8 --stragglers 5%x10 --rate-limit 500/min --price 0.15,0.6"
    assert main([*line.split(), "--metric-calls", "3000", "--seeds", "2"]) == 0
    text = capsys.readouterr().out
    assert "30 workers, 5% of them 10 times slower; median call 1.2 s" in text
    assert "dollars" in text and "staleness" in text and "utilisation" in text
    assert main([*line.split(), "--metric-calls", "3000", "--seeds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] >= 60 * found["lm_calls"] / 500 * 0.99
    assert found["dollars"] == pytest.approx(found["lm_calls"] * (600 * 0.15 + 40 * 0.6) / 1e6)


@pytest.mark.parametrize(
    "arguments",
    [
        "--latency soon",
        "--latency lognormal:1s,-1",
        "--stragglers 5%",
        "--stragglers many",
        "--rate-limit 500",
        "--price 1",
        "--active-workers some",
        "--hanging lots",
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", *arguments.split()])
    assert stopped.value.code == 2
    assert "write" in capsys.readouterr().err or "active" in arguments


def test_a_plan_that_cannot_be_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--active-workers", "9", "--workers", "3"]) == 2
    assert "active_workers=9" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ calibration


def recorded_run(folder: Path, *, slow: float = 6.0) -> None:
    """A run_dir as a compile writes it: three workers, one of them slow, log-normal seconds."""
    rng = np.random.default_rng(3)
    workers = folder / "runs" / "0002" / "workers"
    workers.mkdir(parents=True)
    (folder / "runs" / "0001").mkdir()
    for name, factor in (("a", 1.0), ("b", 1.0), ("c", slow)):
        journal = JournalWriter(workers / f"{name}.jsonl", heading={"run": 2, "of": name, "private": False})
        for number in range(200):
            entry: dict[str, Any] = {"kind": "rollout", "usage": [2, 400, 60], "score": 1.0}
            entry["seconds"] = 2 * factor * float(rng.lognormal(0.0, 0.5))
            journal.append(entry if number % 50 else {**entry, "score": None, "usage": [0, 0, 0]})
        journal.append({"kind": "rollout", "usage": [2, 9, 9], "score": 1.0, "seconds": 9.0, "shared": True})
        journal.close()


def test_a_recorded_run_gives_latencies_tokens_and_stragglers(tmp_path: Path) -> None:
    recorded_run(tmp_path)
    plan = calibrated(dataclasses.replace(SMALL, workers=3), read_run(tmp_path))
    assert plan.latency.median_s == pytest.approx(1.0, rel=0.1)
    assert (plan.prompt_tokens, plan.completion_tokens, plan.calls_per_rollout) == (200.0, 30.0, 2)
    assert plan.stragglers == pytest.approx(1 / 3)
    assert plan.slowdown == pytest.approx(6.0, rel=0.15)
    slower = calibrated(dataclasses.replace(SMALL, workers=3), read_run(tmp_path))
    assert simulate(slower).seconds > simulate(dataclasses.replace(slower, stragglers=0.0)).seconds


def test_the_command_line_plans_from_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded_run(tmp_path, slow=1.0)
    assert main(["simulate", "--from-journal", str(tmp_path), "--json", "--seeds", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 500 < found["metric_calls"] <= 600
    assert found["lm_calls"] == 2 * found["metric_calls"]
    assert main(["simulate", "--from-journal", str(tmp_path / "none")]) == 2
    assert "holds no run with answered LM calls" in capsys.readouterr().err
