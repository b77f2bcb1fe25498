"""What a run would take: simulated before anyone pays for it."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import statistics
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from asyndbt_dspy.core.config import DEFAULT, AlgorithmConfig, resolve
from asyndbt_dspy.engines.meter import RunMeter
from asyndbt_dspy.engines.simulated import SimulatedEngine
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.simulation.machines import CoinEvaluator, light_machines
from asyndbt_dspy.simulation.provider import Latency, SimulatedProvider

_MILLION = 1_000_000
_MAX_FAILURES = 8
"""As of ``AsynDBT``: missing rollouts in a row after which a worker is set aside."""


@dataclass(frozen=True)
class Plan:
    """A run to be simulated.

    Attributes:
        workers: R >= 1.
        latency: Of one LM call.
        metric_calls: Rollouts of the whole run, setup aside, >= 1.
        calls_per_rollout: LM calls of one run of the program (its predictors), >= 1.
        concurrency: Calls that one worker has in flight, >= 1.
        stragglers: Share of the workers, in [0, 1], that are ``slowdown`` times slower; above 0 it is one of them at least.
        requests_per_minute: Limit of all workers together, ``inf`` for none.
        hanging: Share of calls that never come back, in [0, 1); they end at ``timeout_s``. ``simulate`` refuses so many that a
            compile would set its workers aside.
        straggler_factor: As of ``AsynDBT``, > 1 or ``None``: rollouts that take so many times the usual are left behind.
        held_out: Examples for the race per worker.
        shared_data: Workers hold each other's examples and call one model, as ``AsynDBT(workers=3)`` does: whoever is done in
            the race helps the others. Else each has its own.
        active_workers: S; ``None`` and ``"auto"``: as of ``AsynDBT``, so that nobody waits for others if tau is not said either.
        max_staleness: tau; ``None`` and ``"auto"``: as of ``AsynDBT``.
        keep_busy: Workers go on with their next minibatch where they would wait for others, also with an S of one's own.
        prompt_tokens, completion_tokens: Of one call, on average.
        price: US dollars per million prompt and completion tokens; ``None``: unknown.
        seed: Of the delays.

    Raises:
        ConfigurationError: a number out of range.
    """

    workers: int
    latency: Latency
    metric_calls: int
    calls_per_rollout: int = 1
    concurrency: int = 8
    stragglers: float = 0.0
    slowdown: float = 1.0
    requests_per_minute: float = math.inf
    hanging: float = 0.0
    timeout_s: float = 120.0
    straggler_factor: float | None = 8.0
    held_out: int = 10
    shared_data: bool = True
    active_workers: int | Literal["auto"] | None = None
    max_staleness: int | Literal["auto"] | None = None
    keep_busy: bool = False
    prompt_tokens: float = 600.0
    completion_tokens: float = 40.0
    price: tuple[float, float] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("workers", "metric_calls", "calls_per_rollout", "concurrency"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, ">= 1")
        _check("stragglers", self.stragglers, 0 <= self.stragglers <= 1, "a share of the workers, in [0, 1]")
        _check("slowdown", self.slowdown, 1 <= self.slowdown < math.inf, ">= 1")
        _check("requests_per_minute", self.requests_per_minute, self.requests_per_minute > 0, "> 0")
        _check("hanging", self.hanging, 0 <= self.hanging < 1, "in [0, 1)")
        _check("timeout_s", self.timeout_s, 0 < self.timeout_s < math.inf, "> 0 seconds")
        _check("held_out", self.held_out, self.held_out >= 0, ">= 0")
        factor = self.straggler_factor
        _check("straggler_factor", factor, factor is None or 1 < factor < math.inf, "> 1, or None")
        for name in ("prompt_tokens", "completion_tokens"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < math.inf, ">= 0 tokens")
        for one in self.price or ():
            _check("price", self.price, 0 <= one < math.inf, ">= 0 dollars per million tokens")

    @property
    def slow_workers(self) -> int:
        """How many workers are slow."""
        return max(1, round(self.stragglers * self.workers)) if self.stragglers else 0

    def config(self) -> AlgorithmConfig:
        """Constants of the run."""
        config = resolve(DEFAULT, self.workers, self.active_workers, self.max_staleness)
        return dataclasses.replace(config, keep_busy=self.keep_busy or config.keep_busy)


@dataclass(frozen=True)
class Forecast:
    """What a plan came to, for one seed of the delays.

    Attributes:
        seconds: Whole run; ``race_s`` of them in the final race.
        metric_calls, lm_calls, tokens: Made.
        dollars: ``None`` where the price is unknown.
        iterations: Updates of z.
        largest_staleness, mean_staleness: Of the steps, in updates of z.
        utilisation: Share of the workers' time spent evaluating.
    """

    seconds: float
    race_s: float
    metric_calls: int
    lm_calls: int
    tokens: int
    dollars: float | None
    iterations: int
    largest_staleness: int
    mean_staleness: float
    utilisation: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def simulate(plan: Plan) -> Forecast:
    """Run the shipped server and engine on a virtual clock with workers that only cost time.

    Raises:
        ConfigurationError: so many calls hang that a compile would set its workers aside, of which a forecast knows nothing.
    """
    _check_hanging(plan)
    config = plan.config()
    server, workers = light_machines(
        plan.workers,
        config,
        calls=plan.metric_calls,
        held_out=plan.held_out,
        seed=plan.seed,
        is_shared=plan.shared_data,
    )
    provider = SimulatedProvider(
        plan.latency,
        concurrency=plan.concurrency,
        factors={worker.name: plan.slowdown for worker in workers[: plan.slow_workers]},
        requests_per_minute=plan.requests_per_minute,
        calls_per_rollout=plan.calls_per_rollout,
        seed=plan.seed,
        hanging=plan.hanging,
        timeout_s=plan.timeout_s,
        straggler_factor=plan.straggler_factor,
    )
    engine = SimulatedEngine(provider)
    provider.clock = lambda: engine.now_s
    meter = RunMeter(server)
    asyncio.run(engine.run(server, workers, CoinEvaluator(), [meter]))
    tokens = provider.calls * (plan.prompt_tokens + plan.completion_tokens)
    return Forecast(
        seconds=meter.end_s,
        race_s=meter.end_s - meter.search_end_s if server.race is not None else 0.0,
        metric_calls=server.calls_spent,
        lm_calls=provider.calls,
        tokens=round(tokens),
        dollars=_dollars(plan, provider.calls),
        iterations=server.version,
        largest_staleness=meter.largest_staleness,
        mean_staleness=meter.mean_staleness,
        utilisation=meter.utilisation,
    )


def _check_hanging(plan: Plan) -> None:
    answered = (1 - plan.hanging) ** plan.calls_per_rollout
    run = (1 - answered) ** _MAX_FAILURES
    rollouts = plan.metric_calls / plan.workers
    # Until so many in a row are missing, rollouts of which each is missing with the same probability, on average.
    expected = (1 - run) / (answered * run) if answered * run else math.inf if answered else _MAX_FAILURES
    if expected <= rollouts:
        raise ConfigurationError(
            f"hanging={plan.hanging:g} with calls_per_rollout={plan.calls_per_rollout} is no run to forecast: a compile sets "
            f"a worker aside after {_MAX_FAILURES} missing rollouts in a row (max_failures), here after about {expected:.0f} "
            f"rollouts of the {rollouts:.0f} that each would make; plan with a smaller share of calls that hang"
        )


def mean_forecast(forecasts: list[Forecast]) -> dict[str, Any]:
    """Means over several seeds, and the range of the time."""
    rows = [one.to_dict() for one in forecasts]
    means = {
        name: None if rows[0][name] is None else statistics.fmean(row[name] for row in rows)
        for name in rows[0]
    }
    seconds = [one.seconds for one in forecasts]
    largest = max(one.largest_staleness for one in forecasts)
    return {**means, "largest_staleness": largest, "seconds_range": [min(seconds), max(seconds)]}


def _dollars(plan: Plan, calls: int) -> float | None:
    if plan.price is None:
        return None
    prompt, completion = (Decimal(str(one)) for one in plan.price)
    spent = prompt * Decimal(str(plan.prompt_tokens)) + completion * Decimal(str(plan.completion_tokens))
    return float(spent * calls / _MILLION)


def _check(name: str, value: object, holds: bool, bound: str) -> None:
    if not holds:
        raise ConfigurationError(f"{name}={value!r} must be {bound}")
