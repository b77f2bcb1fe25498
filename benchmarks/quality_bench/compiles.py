"""What benchmarks of single settings of AsynDBT share: their arguments, and rows of compiles that go on where they stopped."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import dspy

from asyndbt_dspy import AsynDBT
from quality_bench import cells, lms
from quality_bench.statistics import verdict

Row = dict[str, Any]


def parser(description: str, out: pathlib.Path, **defaults: Any) -> argparse.ArgumentParser:
    """``--data`` (or ``ASYNDBT_DATA``), ``--out``, and an option for each default, of its type."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = os.environ.get("ASYNDBT_DATA")
    found.add_argument("--data", type=pathlib.Path, default=data, required=data is None)
    found.add_argument("--out", type=pathlib.Path, default=out)
    for name, default in defaults.items():
        found.add_argument(f"--{name}", type=type(default), default=default)
    return found


def scored(optimizer: AsynDBT, program: dspy.Module, student: dspy.Module, test: list[dspy.Example]) -> Row:
    """How a compile's program and the student do on the test part."""
    result = optimizer.result
    assert result is not None
    own, others = (cells.correct(one, test) for one in (program, student))
    return {
        "is_student": result.winner == "student",
        "test": cells.percent(own),
        "student": cells.percent(others),
        "verdict": verdict(list(map(float, own)), list(map(float, others))),
        "versions": cells.versions(),
    }


def fill(
    out: pathlib.Path,
    wanted: Iterable[tuple[str, Hashable]],
    key_of: Callable[[Row], Hashable],
    run: Callable[[Any, lms.Lms, dict[Hashable, Row]], Row],
) -> list[Row]:
    """Run what ``out`` does not hold yet, each ``(LM, key)`` with its LM and the rows so far; returns all rows."""
    known = {key_of(row): row for row in cells.read(out)}
    loaded: lms.Lms | None = None
    for lm, key in wanted:
        if key in known:
            continue
        if loaded is None or loaded.name != lm:
            loaded = lms.load(lm)
        known[key] = run(key, loaded, known)
        cells.append(out, known[key])
        print(json.dumps(known[key]), file=sys.stderr, flush=True)
    return cells.read(out)
