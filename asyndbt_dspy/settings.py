"""The checks of what ``AsynDBT`` was given: settings and data that cannot work are refused before anything is paid for."""

from __future__ import annotations

import dataclasses
import logging
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dspy

from asyndbt_dspy import preparation
from asyndbt_dspy.choices import check_choices, check_instructions
from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.core.config import AlgorithmConfig, whole_number
from asyndbt_dspy.core.validation import check_config
from asyndbt_dspy.engines.protocols import ListeningEngine
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.limits import RateLimits
from asyndbt_dspy.programs import checks
from asyndbt_dspy.programs.metrics import MAX_SCORE
from asyndbt_dspy.programs.slots import demo_slots
from asyndbt_dspy.workers import Worker

if TYPE_CHECKING:
    from asyndbt_dspy.optimizer import AsynDBT

logger = logging.getLogger(__name__)

_CACHED_NOISE = (
    "scores are said to be noisy, but the LM of worker %r has DSPy's response cache, which answers a repeated request as "
    "before; only the noise of the metric is averaged out. Build it with cache=False"
)
_AT_LEAST = {
    "demo_candidates": 1,
    "demo_slots": 0,
    "instruction_candidates": 0,
    "later_instructions": 0,
    "max_demo_tokens": 1,
    "fragments": 0,
}
"""Whole numbers among the options of the search space, with their bounds."""


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a text that is none of ``choices``."""
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r} is none of {sorted(choices)}")


def with_overrides(config: AlgorithmConfig, overrides: Mapping[str, Any]) -> AlgorithmConfig:
    """``config`` with single constants replaced.

    Raises:
        ConfigurationError: there is no such constant, or it cannot have this value.
    """
    known = {field.name for field in dataclasses.fields(AlgorithmConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ConfigurationError(f"config has no {unknown}; known constants: {sorted(known)}")
    return dataclasses.replace(config, **overrides)


def check_settings(optimizer: AsynDBT) -> None:
    """Refuse settings that cannot work, alone or together.

    Raises:
        ConfigurationError: says the value, the bound, and what to do.
    """
    if not isinstance(optimizer.budget, Budget):
        raise ConfigurationError(
            f"budget={optimizer.budget!r} must be a Budget; for so many metric calls Budget(metric_calls=…)"
        )
    if optimizer.run_dir is not None:
        _check_run_dir(optimizer.run_dir)
    elif optimizer.resume or optimizer.fsync:
        raise ConfigurationError(
            f"{'resume' if optimizer.resume else 'fsync'}=True needs the run_dir=… that the journals are kept in"
        )
    _check_workers(optimizer)
    _check_numbers(optimizer)
    _check_options(optimizer)
    if optimizer.deterministic and optimizer.budget.metric_calls is None:
        raise ConfigurationError(
            "deterministic=True needs a bound that depends on neither time nor prices, and the budget has no "
            f"metric_calls: {optimizer.budget}; give Budget(metric_calls=…)"
        )


def check_data(
    optimizer: AsynDBT, student: dspy.Module, workers: Sequence[Worker], valset: Sequence[dspy.Example] | None
) -> None:
    """Refuse data that cannot work, before any LM call.

    Raises:
        ConfigurationError: says which example, how many there are, and what to do.
    """
    check_instructions(student, optimizer.options.instructions)
    check_config([worker.name for worker in workers], dataclasses.replace(optimizer.config, active_workers=1))
    layout = demo_slots(
        student, demos_per_class=optimizer.options.demos_per_class, demo_slots=optimizer.options.demo_slots
    )
    check_choices(student, optimizer.options, layout)
    checks.check_overlap_of_others(
        {worker.name: worker.shard for worker in workers},
        {worker.name: worker.valset for worker in workers if worker.valset},
    )
    for worker in workers:
        lm = worker.first_lm or dspy.settings.lm
        if optimizer.config.repeats and getattr(lm, "cache", False):
            logger.warning(_CACHED_NOISE, worker.name)
        checks.check_inputs(
            student,
            worker.shard,
            valset=worker.valset,
            name=f"trainset of worker {worker.name!r}",
            context_tokens=lambda lm=lm: preparation.context_tokens(lm),  # type: ignore[misc]
            max_demo_tokens=optimizer.options.max_demo_tokens,
            slots=None if optimizer.options.mode == "instructions" else layout,
        )
    if valset:
        checks.check_examples(student, valset, name="valset")
        checks.check_overlap([one for worker in workers for one in worker.shard], valset)


def _check_run_dir(run_dir: object) -> None:
    if not isinstance(run_dir, (str, os.PathLike)) or not isinstance(os.fspath(run_dir), str):
        raise ConfigurationError(f"run_dir={run_dir!r} must be the path of a folder: a str or a Path")
    if not os.fspath(run_dir).strip():  # an environment variable that is not set, mostly
        raise ConfigurationError(f"run_dir={run_dir!r} names no folder; for the working directory say '.'")
    if "\0" in os.fspath(run_dir):
        raise ConfigurationError(
            f"run_dir={run_dir!r} has a NUL character, which no path may have; leave it out"
        )


def _check_workers(optimizer: AsynDBT) -> None:
    workers = optimizer.workers
    if workers is None and optimizer.preset == "cendbt":
        workers = 1
    if workers is None:
        _check_threads(optimizer, 1)
        return
    if isinstance(workers, numbers.Integral) and not isinstance(workers, bool):
        optimizer.workers = count = int(workers)
    elif isinstance(workers, Sequence) and all(isinstance(one, Worker) for one in workers):
        count = len(workers)
    else:
        raise ConfigurationError(f"workers={workers!r} must be a number or a list of Worker")
    _check_threads(optimizer, count)
    if optimizer.preset == "cendbt" and count != 1:
        raise ConfigurationError("preset='cendbt' is centralised: set workers=1")


def _check_threads(optimizer: AsynDBT, workers: int) -> None:
    """``num_threads`` and rate limits, which are for workers that nobody described one by one."""
    said = {"num_threads": optimizer.num_threads, **optimizer.limits}
    given = {name: value for name, value in said.items() if value is not None}
    if given and isinstance(optimizer.workers, Sequence):
        raise ConfigurationError(
            f"{given} besides a list of {workers} workers: each has its own; pass them as Worker(…, max_concurrency=…, "
            "requests_per_minute=…, tokens_per_minute=…)"
        )
    RateLimits(**optimizer.limits)
    if optimizer.num_threads is None:
        return
    optimizer.num_threads = whole_number("num_threads", optimizer.num_threads)
    if optimizer.num_threads < max(1, workers):
        raise ConfigurationError(
            f"num_threads={optimizer.num_threads} must be at least 1 for each of the workers ({workers})"
        )


def _check_numbers(optimizer: AsynDBT) -> None:
    optimizer.seed = whole_number("seed", optimizer.seed)
    optimizer.max_failures = whole_number("max_failures", optimizer.max_failures)
    if optimizer.seed < 0:
        raise ConfigurationError(f"seed={optimizer.seed} must be >= 0")
    if optimizer.max_failures < 1:
        raise ConfigurationError(f"max_failures={optimizer.max_failures} must be at least 1")
    if optimizer.max_errors is not None:
        optimizer.max_errors = whole_number("max_errors", optimizer.max_errors)
        if optimizer.max_errors < 1:
            raise ConfigurationError(
                f"max_errors={optimizer.max_errors} must be at least 1, or None: then nothing ends the run"
            )
    for name, least in (("rollout_timeout_s", 0), ("straggler_factor", 1)):
        value = getattr(optimizer, name)
        if value is None and name == "straggler_factor":
            continue
        if not _is_number(value) or not value > least:
            may_be_none = ", or None" if name == "straggler_factor" else " seconds"
            raise ConfigurationError(f"{name}={value!r} must be > {least}{may_be_none}")
    score = optimizer.failure_score
    if not _is_number(score) or not abs(score) <= MAX_SCORE:
        raise ConfigurationError(
            f"failure_score={score!r} must be a finite number within ±{MAX_SCORE:g}, best 0 of scores in [0, 1]"
        )


def _check_options(optimizer: AsynDBT) -> None:
    options = optimizer.options
    whole = {name: whole_number(name, getattr(options, name)) for name in _AT_LEAST}
    if options.demos_per_class is not None:
        whole["demos_per_class"] = whole_number("demos_per_class", options.demos_per_class)
    for name, value in whole.items():
        least = _AT_LEAST.get(name, 0)
        if value < least:
            hint = "; mode='instructions' shows no demos" if "demo" in name else ""
            raise ConfigurationError(f"{name}={value} must be >= {least}{hint}")
    optimizer.options = dataclasses.replace(options, **whole)  # type: ignore[arg-type]
    later = whole["later_instructions"]
    if not later:
        return
    if options.proposer is None or options.mode == "demos":
        raise ConfigurationError(
            f"later_instructions={later} with mode={options.mode!r} needs the proposer=… that writes them, and a "
            "mode that tries instructions"
        )
    if not isinstance(optimizer.make_engine(), ListeningEngine):
        raise ConfigurationError(
            f"later_instructions={later} needs an engine with the attribute `between` "
            f"(engines.ListeningEngine); {type(optimizer.engine).__name__} has none"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
