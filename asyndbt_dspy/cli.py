"""Command line: ``asyndbt simulate`` says what a run will take before anyone pays for it, ``asyndbt status`` how far one is."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyndbt_dspy.errors import AsynDBTError, ConfigurationError
from asyndbt_dspy.recording.status import read_status
from asyndbt_dspy.simulation.calibration import calibrated, read_run
from asyndbt_dspy.simulation.plan import Plan, mean_forecast, simulate
from asyndbt_dspy.simulation.provider import Latency

_UNITS = {"ms": 1e-3, "s": 1.0, "": 1.0}
_PERIODS = {"s": 60.0, "min": 1.0, "h": 1.0 / 60.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``asyndbt``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="asyndbt", description="AsynDBT for DSPy.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_simulate(
        commands.add_parser("simulate", help="expected time, cost, staleness and utilisation of a plan")
    )
    status = commands.add_parser("status", help="how far a run with a run_dir is, and what it spent")
    status.add_argument("run_dir", type=Path)
    status.add_argument("--run", type=int, help="its number; default the newest")
    status.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        return _status(options) if options.command == "status" else _simulate(options)
    except AsynDBTError as error:
        print(f"asyndbt: {error}", file=sys.stderr)
        return 2


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workers", type=int, help="default 3, or as many as the journal has")
    add("--metric-calls", type=int, help="default 100 per worker, or as many as the journal has")
    add(
        "--latency",
        type=latency,
        help="lognormal:MEDIAN,SIGMA or a constant: 1.2s, 300ms; default lognormal:1s,0.5",
    )
    add("--stragglers", type=stragglers, help="SHARExFACTOR, as 5%%x10: one worker at least")
    add("--rate-limit", type=rate, default=math.inf, help="requests of all workers together, as 500/min")
    add("--hanging", type=share, default=0.0, help="share of calls that never come back, as 2%%")
    add("--timeout", type=seconds, help="when a hanging call is given up; default 120s")
    add(
        "--straggler-factor",
        type=float,
        default=8.0,
        help="a call that takes so many times the usual is left behind (default 8, as in a compile); 0: all are waited for",
    )
    add(
        "--own-data",
        action="store_true",
        help="each worker has examples or a model of its own: nobody helps in the race",
    )
    add("--concurrency", type=int, default=8, help="calls that one worker has in flight")
    add("--held-out", type=int, default=10, help="examples per worker for the final race")
    add("--active-workers", type=number_or_auto, help="S: a number, or auto as in a compile (default)")
    add("--max-staleness", type=number_or_auto, help="tau: a number or auto; default 64")
    add("--keep-busy", action="store_true", help="nobody waits for others, also with an S of your own")
    add("--predictors", type=int, help="LM calls of one run of the program; default 1")
    add("--tokens", type=pair, help="PROMPT,COMPLETION tokens of one call; default 600,40")
    add("--price", type=pair, help="PROMPT,COMPLETION dollars per million tokens")
    add(
        "--from-journal",
        type=Path,
        metavar="RUN_DIR",
        help="latencies, tokens, stragglers and calls that hung as the newest run with LM calls recorded them; what is given "
        "here as well is as given (of calls that hang the larger share)",
    )
    add("--seeds", type=int, default=3, help="simulated runs that the figures are means of")
    add("--json", action="store_true", help="print JSON")


def _status(options: argparse.Namespace) -> int:
    found = read_status(options.run_dir, options.run)
    text = json.dumps(found.to_dict()) if options.json else str(found)
    encoding = sys.stdout.encoding or "utf-8"  # errors quote what a terminal may not know
    print(text.encode(encoding, "replace").decode(encoding))
    return 0


def _simulate(options: argparse.Namespace) -> int:
    if options.seeds < 1:
        raise ConfigurationError(f"seeds={options.seeds!r} must be >= 1 simulated runs")
    measured = read_run(options.from_journal) if options.from_journal else None
    workers = _given(options.workers, len(measured.seconds) if measured else 3)
    plan = Plan(
        workers=workers,
        latency=Latency(1.0, 0.5),
        metric_calls=_given(options.metric_calls, measured.rollouts if measured else 100 * workers),
        concurrency=options.concurrency,
        requests_per_minute=options.rate_limit,
        hanging=options.hanging,
        straggler_factor=options.straggler_factor or None,
        held_out=options.held_out,
        shared_data=not options.own_data,
        active_workers=options.active_workers,
        max_staleness=options.max_staleness,
        keep_busy=options.keep_busy,
        price=options.price,
    )
    if measured is not None:
        plan = calibrated(plan, measured)
    plan = dataclasses.replace(plan, **_said(options))
    found = mean_forecast([simulate(dataclasses.replace(plan, seed=seed)) for seed in range(options.seeds)])
    print(json.dumps(found) if options.json else describe(plan, found))
    return 0


def _said(options: argparse.Namespace) -> dict[str, Any]:
    """Parts of the plan that a journal may know and the user said."""
    given: dict[str, Any] = {
        "latency": options.latency,
        "timeout_s": options.timeout,
        "calls_per_rollout": options.predictors,
    }
    for names, pair_of in (
        (("stragglers", "slowdown"), options.stragglers),
        (("prompt_tokens", "completion_tokens"), options.tokens),
    ):
        given |= zip(names, pair_of or (None, None), strict=True)
    return {name: value for name, value in given.items() if value is not None}


def _given(said: int | None, otherwise: int) -> int:
    return otherwise if said is None else said


def describe(plan: Plan, found: dict[str, Any]) -> str:
    """The forecast as a person reads it."""
    slow = f", {plan.slow_workers} of them {plan.slowdown:.3g} times slower" if plan.slow_workers else ""
    low, high = found["seconds_range"]
    dollars = found["dollars"]
    cost = "unknown (give --price)" if dollars is None else f"{dollars:.4g} dollars"
    return "\n".join(
        [
            f"{plan.workers} workers{slow}; median call {plan.latency.median_s:.3g} s",
            f"time         {_duration(found['seconds'])} ({_duration(low)} to {_duration(high)}), "
            f"the race {_duration(found['race_s'])} of it",
            f"cost         {cost}, {found['lm_calls']:,.0f} LM calls, {found['tokens']:,.0f} tokens",
            f"metric calls {found['metric_calls']:,.0f} in {found['iterations']:,.0f} updates",
            f"staleness    {found['mean_staleness']:.2f} on average, at most {found['largest_staleness']}",
            f"utilisation  {found['utilisation']:.0%} of the workers' time spent evaluating",
        ]
    )


def _duration(value: float) -> str:
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


# ------------------------------------------------------------------------------------------- arguments


def seconds(text: str) -> float:
    """``1.2s``, ``300ms`` or a plain number of seconds."""
    found = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(ms|s|)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 1.2s or 300ms")
    return float(found[1]) * _UNITS[found[2]]


def latency(text: str) -> Latency:
    """``lognormal:1.2s,0.8`` or a constant."""
    median, sigma, written = text, "0", "1.2s"
    if text.startswith("lognormal:"):
        median, _, sigma = text.removeprefix("lognormal:").partition(",")
        written = "lognormal:1.2s,0.8"
    try:
        return Latency(seconds(median), float(sigma or 0.5))
    except (argparse.ArgumentTypeError, ValueError, AsynDBTError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}; write {written}") from error


def share(text: str) -> float:
    """``5%`` or ``0.05``."""
    try:
        return float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write 5%") from error


def stragglers(text: str) -> tuple[float, float]:
    """``5%x10``: one in twenty workers ten times slower."""
    part, _, factor = text.partition("x")
    try:
        return share(part), float(factor)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no share with a factor; write 5%x10") from error


def rate(text: str) -> float:
    """Requests per minute from ``500/min``, ``10/s`` or ``2000/h``."""
    count, _, period = text.partition("/")
    try:
        return float(count) * _PERIODS[period]
    except (ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; write 500/min") from error


def number_or_auto(text: str) -> int | str:
    """A number, or ``auto``."""
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from error


def pair(text: str) -> tuple[float, float]:
    """Two numbers: ``600,40``."""
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers; write 0.15,0.60") from error
    return first, second


if __name__ == "__main__":
    sys.exit(main())
