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


class Listed(Latency):
    """Calls that take what is listed, in this order."""

    def __init__(self, *listed: float) -> None:
        super().__init__(1.0)
        object.__setattr__(self, "left", list(listed))

    def draw(self, rng: np.random.Generator, count: int) -> list[float]:
        return [self.left.pop(0) for _ in range(count)]  # type: ignore[attr-defined]


def test_a_unit_leaves_its_stragglers_behind_as_in_a_compile_and_they_hold_their_slots() -> None:
    one = provider(concurrency=12, straggler_factor=8.0)
    one.latency = Listed(*[1.0] * 9, *[100.0] * 3, *[1.0] * 36)
    assert one(evaluation(12)) == 8.0, "eight times the usual second"
    for now, took in ((8.0, 2.0), (31.0, 2.0), (32.0, 1.0)):  # given up after 24 more
        one.clock = lambda now=now: now  # type: ignore[misc]
        assert one(evaluation(12)) == took
    one.latency = Listed(*[1.0] * 7, *[100.0] * 5)
    assert one(evaluation(12)) == 100.0, "where more are slow, the endpoint is slow"
    patient = provider(concurrency=12)
    patient.latency = Listed(*[1.0] * 9, *[100.0] * 3)
    assert patient(evaluation(12)) == 100.0


def test_a_compile_over_http_took_as_long_as_its_forecast() -> None:
    """Of the committed wall-clock figures; setup, which is not simulated, took three to ten seconds of them."""
    figures = Path(__file__).parents[2] / "benchmarks" / "results" / "wallclock.json"
    rows = [row for row in json.loads(figures.read_text())["rows"] if row["arm"] == "asyndbt"]
    plan = Plan(
        workers=8,
        latency=Latency(0.3, 1.0),
        metric_calls=1_000,
        concurrency=4,
        stragglers=1 / 8,
        slowdown=10.0,
        hanging=0.02,
        timeout_s=30.0,
        held_out=8,
    )
    found = mean_forecast([simulate(dataclasses.replace(plan, seed=seed)) for seed in range(3)])
    real = [row["seconds"] for row in rows]
    assert min(real) - 10 < found["seconds"] < max(real)
    assert found["utilisation"] == pytest.approx(np.mean([row["utilisation"] for row in rows]), abs=0.05)
    for careless in ({"straggler_factor": None}, {"shared_data": False}):
        worse = simulate(dataclasses.replace(plan, **careless))
        assert worse.seconds > 1.3 * found["seconds"], "what a compile does about stragglers shows"


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


def test_a_small_share_of_few_workers_is_one_of_them() -> None:
    plan = dataclasses.replace(SMALL, stragglers=0.01, slowdown=10.0)
    one = dataclasses.replace(plan, stragglers=1 / plan.workers)
    assert (
        plan.slow_workers == one.slow_workers == 1
        and dataclasses.replace(plan, stragglers=0.0).slow_workers == 0
    )
    assert simulate(plan).seconds == simulate(one).seconds > simulate(SMALL).seconds


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
        {"straggler_factor": 1.0},
        {"prompt_tokens": -600.0},
        {"completion_tokens": math.nan},
        {"price": (math.nan, 1.0)},
        {"price": (0.1, -1.0)},
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
    assert "30 workers, 2 of them 10 times slower; median call 1.2 s" in text
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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--active-workers 9 --workers 3", "active_workers=9"),
        ("--workers 0", "workers=0"),
        ("--metric-calls 0", "metric_calls=0"),
        ("--seeds 0", "seeds=0"),
        ("--tokens=-600,40", "prompt_tokens=-600"),
        ("--price=nan,1", "price=(nan"),
        ("--straggler-factor 0.5", "straggler_factor=0.5"),
        ("--hanging 99%", "hanging=0.99"),
        ("--hanging 55% --metric-calls 30000", "after about 263 rollouts of the 10000"),
        ("--hanging 20% --predictors 6", "calls_per_rollout=6"),
    ],
)
def test_a_plan_that_cannot_be_is_told_in_one_line(
    arguments: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments.split()]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--latency 0", "argument --latency: '0': latency with median 0.0 s"),
        ("--latency 1.2.3s", "'1.2.3s' is no time; write 1.2s or 300ms"),
        ("--latency lognormal:x", "'x' is no time"),
        ("--timeout ...", "argument --timeout: '...' is no time; write 1.2s or 300ms"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said(
    arguments: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", *arguments.split()])
    assert told in capsys.readouterr().err


def test_a_forecast_of_hanging_calls_is_given_where_workers_would_last() -> None:
    few = simulate(dataclasses.replace(SMALL, hanging=0.2, timeout_s=30.0))
    assert few.metric_calls > 600
    with pytest.raises(ConfigurationError, match=r"8 missing rollouts in a row"):
        simulate(dataclasses.replace(SMALL, hanging=0.999999999999))
    with pytest.raises(ConfigurationError, match=r"8 missing rollouts in a row"):
        simulate(dataclasses.replace(SMALL, hanging=1 - 1e-16, calls_per_rollout=40))


def test_arguments_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    line = "simulate --workers 6 --metric-calls 300 --latency 1s --hanging 3% --timeout 60s --stragglers 20%x9 --seeds 1 --json"
    plan = Plan(6, Latency(1.0), 300, hanging=0.03, timeout_s=60.0, stragglers=0.2, slowdown=9.0)
    changes: dict[str, dict[str, Any]] = {
        "": {},
        "--straggler-factor 0": {"straggler_factor": None},
        "--straggler-factor 3": {"straggler_factor": 3.0},
        "--own-data": {"shared_data": False},
    }
    seconds = set()
    for said, change in changes.items():
        assert main([*line.split(), *said.split()]) == 0
        found = json.loads(capsys.readouterr().out)["seconds"]
        assert found == simulate(dataclasses.replace(plan, **change)).seconds
        seconds.add(found)
    assert len(seconds) == len(changes)


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


@pytest.mark.parametrize("workers", [2, 4])
def test_where_half_of_the_workers_were_slow_they_are_the_stragglers(tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "runs" / "0001" / "workers"
    folder.mkdir(parents=True)
    for number in range(workers):
        journal = JournalWriter(
            folder / f"w{number}.jsonl", heading={"run": 1, "of": f"w{number}", "private": False}
        )
        for _ in range(20):
            entry = {
                "kind": "rollout",
                "usage": [1, 9, 9],
                "score": 1.0,
                "seconds": 10.0 if number % 2 else 1.0,
            }
            journal.append(entry)
        journal.close()
    plan = calibrated(dataclasses.replace(SMALL, workers=workers), read_run(tmp_path))
    assert (plan.latency.median_s, plan.stragglers, plan.slowdown) == (1.0, 0.5, 10.0)
    told = dataclasses.replace(SMALL, workers=workers, stragglers=0.5, slowdown=10.0)
    assert simulate(dataclasses.replace(plan, prompt_tokens=1.0)).seconds == simulate(told).seconds


def test_calls_that_hung_in_a_recorded_run_hang_in_its_plan_and_refused_ones_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "0001" / "workers"
    folder.mkdir(parents=True)
    journal = JournalWriter(folder / "a.jsonl", heading={"run": 1, "of": "a", "private": False})
    for number in range(100):
        entry: dict[str, Any] = {"kind": "rollout", "usage": [2, 9, 9], "score": 1.0, "seconds": 2.0}
        missing = {"usage": [0, 0, 0], "score": None, "seconds": 30.0 if number % 2 else 0.1}
        journal.append(entry if number < 90 else entry | missing)
    journal.close()
    measured = read_run(tmp_path)
    assert (measured.missing, measured.hung_s) == (0.1, (30.0,) * 5)
    plan = calibrated(SMALL, measured)
    assert (plan.hanging, plan.timeout_s) == (pytest.approx(0.025), 30.0)
    assert calibrated(dataclasses.replace(SMALL, hanging=0.2), measured).hanging == 0.2, (
        "more than was recorded"
    )


def test_the_command_line_plans_from_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded_run(tmp_path, slow=1.0)
    assert main(["simulate", "--from-journal", str(tmp_path), "--json", "--seeds", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 500 < found["metric_calls"] <= 600
    assert found["lm_calls"] == 2 * found["metric_calls"]
    assert main(["simulate", "--from-journal", str(tmp_path / "none")]) == 2
    assert "holds no run with answered LM calls" in capsys.readouterr().err


def test_what_is_said_beside_a_journal_is_as_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded_run(tmp_path)
    plan = calibrated(
        Plan(3, Latency(1.0), 600, price=(1.0, 1.0)), read_run(tmp_path)
    )  # two calls of 200 and 30 tokens
    changes: dict[str, dict[str, Any]] = {
        "": {},
        "--latency 5s": {"latency": Latency(5.0)},
        "--stragglers 70%x9": {"stragglers": 0.7, "slowdown": 9.0},
        "--stragglers 0%x1": {"stragglers": 0.0, "slowdown": 1.0},
        "--predictors 4": {"calls_per_rollout": 4},
        "--tokens 1,2": {"prompt_tokens": 1.0, "completion_tokens": 2.0},
        "--hanging 5% --timeout 40s": {"hanging": 0.05, "timeout_s": 40.0},
    }
    figures = set()
    for said, change in changes.items():
        line = f"simulate --from-journal {tmp_path} --price 1,1 --seeds 1 --json {said}"
        assert main(line.split()) == 0
        found = json.loads(capsys.readouterr().out)
        expected = simulate(dataclasses.replace(plan, **change))
        assert (found["seconds"], found["dollars"]) == (expected.seconds, expected.dollars)
        figures.add((found["seconds"], found["dollars"]))
    assert len(figures) == len(changes)


def test_the_newest_run_that_asked_an_lm_counts(tmp_path: Path) -> None:
    recorded_run(tmp_path)
    asked = read_run(tmp_path)
    for number in (3, 10_000):
        workers = tmp_path / "runs" / f"{number:04d}" / "workers"
        workers.mkdir(parents=True)
        journal = JournalWriter(workers / "a.jsonl", heading={"run": number, "of": "a", "private": False})
        entry = {"kind": "rollout", "usage": [0, 0, 0], "score": 1.0, "seconds": 0.1, "shared": True}
        journal.append(entry)
        if number == 3:
            assert read_run(tmp_path) == asked
            journal.append(entry | {"usage": [1, 7, 5], "shared": False})
        journal.close()
    assert read_run(tmp_path).prompt_tokens == 7.0, "run 3, not 2; and 10000 was answered from the cache"


@pytest.mark.parametrize(
    ("workers", "changes"), [(60, {}), (100, {}), (100, {"active_workers": "auto", "max_staleness": "auto"})]
)
def test_stragglers_among_many_workers_hold_nobody_up(workers: int, changes: dict[str, Any]) -> None:
    """One in twenty is ten times slower: the whole search is over before these have answered three times."""
    slow = Plan(workers, Latency(1.2, 0.8), 30 * workers, stragglers=0.05, slowdown=10.0, **changes)
    even = dataclasses.replace(slow, stragglers=0.0, slowdown=1.0)
    assert simulate(slow).seconds < 1.25 * simulate(even).seconds
