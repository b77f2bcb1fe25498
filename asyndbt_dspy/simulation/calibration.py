"""A plan from what a real run recorded: latencies, tokens, failures and slow workers."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.runs.journal import read_journal
from asyndbt_dspy.simulation.plan import Plan
from asyndbt_dspy.simulation.provider import Latency

_SLOW = 1.5
"""A worker counts as a straggler from so many times the median worker's seconds on."""
_FEWEST = 5
"""Rollouts that a worker needs to say how fast it is."""
_HUNG = 3.0
"""A rollout without a score hung if it took so many times its worker's median; others were refused at once."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one run recorded.

    Attributes:
        seconds: Worker -> seconds per LM call of every rollout that was answered.
        calls_per_rollout: Mean, at least 1.
        prompt_tokens, completion_tokens: Mean of one call.
        missing: Share of rollouts without a score, in [0, 1].
        rollouts: Recorded.
        hung_s: Seconds of rollouts that came to nothing after a long time. Calls that were left behind and given up
            (``straggler_factor``) are in no journal.
    """

    seconds: Mapping[str, tuple[float, ...]]
    calls_per_rollout: float
    prompt_tokens: float
    completion_tokens: float
    missing: float
    rollouts: int
    hung_s: tuple[float, ...] = ()

    def factors(self) -> dict[str, float]:
        """How many times slower each worker is than the median one; of two in the middle, than the faster."""
        medians = {
            name: statistics.median(found) for name, found in self.seconds.items() if len(found) >= _FEWEST
        }
        whole = statistics.median_low(medians.values()) if medians else 1.0
        return {name: medians.get(name, whole) / whole for name in self.seconds}


def read_run(run_dir: Path) -> Measured:
    """The newest run in ``run_dir`` that asked an LM: one that was answered from the cache took no time.

    Raises:
        ConfigurationError: there is none.
        JournalError: a journal that is damaged.
    """
    runs = [one for one in run_dir.glob("runs/[0-9]*") if one.name.isdigit()]
    for run in sorted(runs, key=lambda one: int(one.name), reverse=True):
        found = _measured(sorted(run.glob("workers/*.jsonl")))
        if found is not None:
            return found
    raise ConfigurationError(
        f"{run_dir} holds no run with answered LM calls; give the run_dir of a compile, or plan without it"
    )


def _measured(journals: Sequence[Path]) -> Measured | None:
    """What the workers of one run recorded; ``None`` where no LM call was answered."""
    seconds: dict[str, tuple[float, ...]] = {}
    hung: list[float] = []
    calls = prompt = completion = rollouts = missing = 0
    for path in journals:
        entries = [
            one for one in read_journal(path) if one.get("kind") == "rollout" and not one.get("shared")
        ]
        paid = [one for one in entries if one["usage"][0]]
        rollouts += len(entries)
        missing += sum(one.get("score") is None for one in entries)
        calls += sum(one["usage"][0] for one in paid)
        prompt += sum(one["usage"][1] for one in paid)
        completion += sum(one["usage"][2] for one in paid)
        seconds[path.stem] = tuple(
            max(1e-6, one["seconds"] / one["usage"][0]) for one in paid if one.get("score") is not None
        )
        usual = statistics.median(seconds[path.stem]) if seconds[path.stem] else 0.0
        hung += [
            one["seconds"]
            for one in entries
            if one.get("score") is None and one.get("seconds", 0.0) > _HUNG * usual
        ]
    if not any(seconds.values()):
        return None
    per_rollout = max(1.0, calls / max(1, rollouts - missing))
    return Measured(
        seconds,
        per_rollout,
        prompt / calls,
        completion / calls,
        missing / rollouts,
        rollouts,
        tuple(hung),
    )


def calibrated(plan: Plan, measured: Measured) -> Plan:
    """``plan`` with latencies, tokens, calls per rollout, stragglers and calls that hung as measured.

    Concurrency, rate limits and what else a journal does not hold are the plan's. More calls may hang than were recorded
    (``Measured.hung_s``): the larger share of the two counts.
    """
    factors = measured.factors()
    pooled = tuple(one / factors[name] for name, found in sorted(measured.seconds.items()) for one in found)
    slow = [factor for factor in factors.values() if factor >= _SLOW]
    per_rollout = max(1, round(measured.calls_per_rollout))
    hanging, timeout_s = len(measured.hung_s) / measured.rollouts / per_rollout, plan.timeout_s
    if hanging:  # no answer came later than that
        answered = (one for found in measured.seconds.values() for one in found)
        timeout_s = max(statistics.median(measured.hung_s), *answered)
    if measured.prompt_tokens or measured.completion_tokens:  # else the provider reported none
        plan = dataclasses.replace(
            plan, prompt_tokens=measured.prompt_tokens, completion_tokens=measured.completion_tokens
        )
    return dataclasses.replace(
        plan,
        hanging=max(plan.hanging, hanging),
        timeout_s=timeout_s,
        latency=Latency(statistics.median(pooled), measured_s=pooled),
        calls_per_rollout=per_rollout,
        stragglers=len(slow) / len(factors),
        slowdown=statistics.fmean(slow) if slow else 1.0,
    )
