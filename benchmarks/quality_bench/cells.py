"""One cell of the grid: a key, a run, a row."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import platform
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy
import torch

from quality_bench import optimizers, tasks
from quality_bench.counting import CountedMetric
from quality_bench.lms import Lms

PACKAGES = ("asyndbt-dspy", "dspy", "gepa", "optuna", "torch", "transformers", "numpy")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, order=True)
class Key:
    """What names a cell. ``budget`` is 0 for methods that do not search."""

    task: str
    lm: str
    optimizer: str
    budget: int
    seed: int

    @classmethod
    def of(cls, row: Row) -> Key:
        return cls(*(row[field.name] for field in dataclasses.fields(cls)))


def grid(
    names: Sequence[str],
    lms: Sequence[str],
    keys: Sequence[str],
    budgets: Sequence[int],
    seeds: Sequence[int],
) -> list[Key]:
    """The cells to run: by LM, seed and task, so that a grid that is stopped holds whole seeds of every optimizer."""
    found: list[Key] = []
    for lm in lms:
        for seed in seeds:
            for task in names:
                for name in keys:
                    optimizer = optimizers.find(name)
                    if not optimizer.seeded and seed != seeds[0]:
                        continue
                    for budget in budgets if optimizer.searches else (0,):
                        found.append(Key(task, lm, name, budget, seed if optimizer.seeded else 0))
    return found


def read(path: Path) -> list[Row]:
    """Rows of a results file, a cut-off last line left out; an absent file has none."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row. A line that an interrupted run left open is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as out:
        out.seek(0, io.SEEK_END)
        if out.tell():
            out.seek(-1, io.SEEK_END)
            if out.read(1) != b"\n":
                out.write(b"\n")
        out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def run(
    key: Key,
    lms: Lms,
    folder: Path,
    *,
    incumbents: bool = False,
    test_limit: int | None = None,
    constants: Mapping[str, Any] | None = None,
) -> Row:
    """Optimize, then score on valid and test; returns the row.

    Args:
        constants: See ``optimizers.Job``.
        incumbents: Also score what AsynDBT would have returned earlier.
        test_limit: At most so many test examples, for smoke runs; kept in the row.
    """
    task = tasks.TASKS[key.task]
    examples = tasks.load(folder, task, test_limit=test_limit)
    optimizer = optimizers.find(key.optimizer)
    metric = CountedMetric(feedback=optimizer.feedback)
    job = optimizers.Job(
        task,
        lms,
        dataclasses.replace(examples, test=[]),
        key.budget,
        key.seed,
        metric,
        incumbents,
        constants or {},
    )
    calls = lms.book.start(key.seed)
    started = time.perf_counter()
    # An example whose answer does not parse is wrong; it does not end an optimizer's run.
    with dspy.context(lm=lms.task, adapter=dspy.JSONAdapter(), max_errors=1_000_000), quiet():
        outcome = optimizer.run(job)
        seconds, made, proposed = time.perf_counter() - started, calls.of("task"), calls.of("proposer")
        lms.book.start(key.seed)  # what follows is not the optimizer's
        valid = correct(outcome.program, examples.valid)
        test = correct(outcome.program, examples.test)
        state = program_state(outcome.program)
        scores, along = {fingerprint(state): percent(test)}, []
        for one in outcome.incumbents:
            name = fingerprint(program_state(one.program))  # one is often kept at several points
            if name not in scores:
                scores[name] = percent(correct(one.program, examples.test))
            along.append({"calls": one.rollouts * task.predictors, "test": scores[name]})
    return {
        **dataclasses.asdict(key),
        "test": percent(test),
        "valid": percent(valid),
        "task_lm_calls": made,
        "proposer_calls": proposed,
        "metric_calls": metric.calls,
        "seconds": round(seconds, 2),
        "scoring_seconds": round(time.perf_counter() - started - seconds, 2),
        "test_bits": "".join(map(str, map(int, test))),
        "program": fingerprint(state),
        "state": state,
        "settings": outcome.settings,
        "incumbents": along,
        "finalists": outcome.finalists,
        **({} if test_limit is None else {"test_limit": test_limit}),
        "precision": lms.precision,
        "device": device(),
        "versions": versions(),
    }


def correct(program: dspy.Module, examples: Sequence[dspy.Example]) -> list[bool]:
    """Per example whether the program's label is right; an example that failed is wrong."""
    parallel = dspy.Parallel(num_threads=32, disable_progress_bar=True, max_errors=1_000_000)
    answers = parallel([(program, one.inputs()) for one in examples])
    return [
        getattr(answer, "label", None) == one.label for answer, one in zip(answers, examples, strict=True)
    ]


def percent(bits: Sequence[bool]) -> float:
    return round(100 * sum(bits) / len(bits), 2) if bits else 0.0


def program_state(program: dspy.Module) -> dict[str, Any]:
    """Instructions and demos per predictor; empty for methods without a program of their own."""
    return {
        name: {
            "instructions": predictor.signature.instructions,
            "prefixes": {
                field: (part.json_schema_extra or {}).get("prefix")
                for field, part in predictor.signature.output_fields.items()
            },
            "demos": [
                {name: value for name, value in dict(demo).items() if name != "augmented"}
                for demo in predictor.demos
            ],
        }
        for name, predictor in program.named_predictors()
    }


def student_of(key: Key) -> dspy.Module:
    """A program whose predictors have the names and fields of the cell's state."""
    task = tasks.TASKS[key.task]
    if key.optimizer != "zero_shot_cot":
        return task.build()
    from quality_bench import baselines

    return baselines.with_reasoning(task)


def with_state(program: dspy.Module, state: dict[str, Any]) -> dspy.Module:
    """``program`` with the instructions and demos of a row."""
    for name, predictor in program.named_predictors():
        kept = state[name]
        predictor.signature = predictor.signature.with_instructions(kept["instructions"])
        for field, prefix in kept["prefixes"].items():
            predictor.signature = predictor.signature.with_updated_fields(field, prefix=prefix)
        predictor.demos = [dspy.Example(**demo) for demo in kept["demos"]]
    return program


def fingerprint(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device() -> str:
    """Where local LMs run unless told otherwise: the first CUDA device, else the CPU."""
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optimizers print, log and warn a lot; errors that matter are raised."""
    held = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(held)
