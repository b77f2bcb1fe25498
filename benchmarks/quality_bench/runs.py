"""Runs cells one after another, in this process or in several that share the list.

Several pay on a GPU or where there are cores to spare: a run of one cell leaves most of a GPU idle, because it is bound by
Python between passes. Each process loads the LMs for itself (on a GPU about 3 GB for both).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_bench import cells, lms

SHOWN = ("task", "lm", "optimizer", "budget", "seed", "test", "valid", "task_lm_calls", "seconds")


@dataclass(frozen=True)
class Options:
    """What all cells of a call have in common."""

    out: Path
    data: Path
    precision: str = "auto"
    incumbents: bool = False
    test_limit: int | None = None


def run(keys: Sequence[cells.Key], options: Options, processes: int = 1) -> int:
    """Run all cells; returns how many failed. Those in several processes: one that fails leaves the others running."""
    if processes <= 1:
        run_all(iter(keys), options)
        return 0
    context = multiprocessing.get_context("spawn")
    place, failures, lock = context.Value("i", 0), context.Value("i", 0), context.Lock()
    threads = max(1, (os.cpu_count() or 1) // processes)
    group = [
        context.Process(target=_work, args=(list(keys), options, place, failures, lock, threads))
        for _ in range(min(processes, len(keys)))
    ]
    for one in group:
        one.start()
    for one in group:
        one.join()
    return int(failures.value) + sum(bool(one.exitcode) for one in group)


def run_all(
    keys: Iterator[cells.Key],
    options: Options,
    lock: AbstractContextManager[Any] | None = None,
    failed: Callable[[cells.Key], None] | None = None,
) -> None:
    """Run cells as they come; each row is written as soon as it is there.

    Args:
        lock: Held while a row is written.
        failed: Told of a cell that raised; without it the error is raised.
    """
    loaded: dict[str, lms.Lms] = {}
    for key in keys:
        try:
            if key.lm not in loaded:
                loaded = {key.lm: lms.load(key.lm, options.precision)}
            row = cells.run(
                key,
                loaded[key.lm],
                options.data,
                incumbents=options.incumbents,
                test_limit=options.test_limit,
            )
        except Exception:
            if failed is None:
                raise
            failed(key)
            continue
        with lock or nullcontext():
            cells.append(options.out, row)
        print(json.dumps({name: row[name] for name in SHOWN}), flush=True)


def claimed(keys: Sequence[cells.Key], place: Any) -> Iterator[cells.Key]:
    """The cells that no other process has taken; ``place`` is the number of the next one, shared by all."""
    while True:
        with place.get_lock():
            number = place.value
            place.value += 1
        if number >= len(keys):
            return
        yield keys[number]


def _work(
    keys: Sequence[cells.Key], options: Options, place: Any, failures: Any, lock: Any, threads: int
) -> None:
    import torch

    torch.set_num_threads(threads)

    def failed(key: cells.Key) -> None:
        with failures.get_lock():
            failures.value += 1
        sys.stderr.write(f"{key} failed:\n{traceback.format_exc()}\n")

    run_all(claimed(keys, place), options, lock, failed)
    sys.stdout.flush()
    sys.stderr.flush()
    # All rows are written. An interpreter that ends while a library's native thread runs may abort, and look like a failure.
    os._exit(0)
