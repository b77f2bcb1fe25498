"""Reruns random rows of a results file and compares.

Two checks per row. *Program*: the committed instructions and demos score as they did, example by example. *Run*: the
whole cell again, with the constants of its row, gives the same calls, the same program and the same answers; a run whose
order timing decides (``deterministic=False``) is not made again. In float32 both hold exactly but for ties
in the last bits. In bfloat16 an answer depends a little on what else was in the batch, which timing decides: labels
that are nearly tied may flip, and a search that meets such a tie may go another way.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import dspy

from quality_bench import cells, lms, optimizers, tasks

BEFORE = {"accept_score_z": 0.0}
"""What constants of the algorithm amounted to before they were there; rows from then do not name them."""
TOLERANCE = 0.02
"""Part of the test examples on which two scorings of one program may differ."""


@dataclass(frozen=True)
class Comparison:
    """A row and its rerun.

    Attributes:
        program_flips: Test examples on which the committed program now answers differently, ``None`` without a state.
        run_flips: Test examples on which the rerun's program differs, ``None`` without a rerun.
        same_program, same_calls: Whether the rerun chose the same program by as many calls.
        test, rerun: Test scores in percent.
    """

    key: cells.Key
    examples: int
    program_flips: int | None
    test: float
    run_flips: int | None = None
    same_program: bool = False
    same_calls: bool = False
    rerun: float | None = None

    @property
    def matches(self) -> bool:
        """The program scores the same within the tolerance, and so does the rerun (or it is the same program)."""
        allowed = max(1, round(TOLERANCE * self.examples))
        return all(flips is None or flips <= allowed for flips in (self.program_flips, self.run_flips))

    def __str__(self) -> str:
        key = self.key
        rerun = (
            "a run that cannot be repeated"
            if self.run_flips is None
            else f"run flips {self.run_flips}/{self.examples}, same program {self.same_program}, "
            f"same calls {self.same_calls}, test {self.test} → {self.rerun}"
        )
        return (
            f"{'match' if self.matches else 'DIFFERS'}: {key.task} {key.lm} {key.optimizer} budget={key.budget} "
            f"seed={key.seed}: program flips {self.program_flips}/{self.examples}, {rerun}"
        )


def compare(row: cells.Row, loaded: lms.Lms, folder: Path) -> Comparison:
    """Score the row's program again, then run its cell again, if it can be repeated."""
    key = cells.Key.of(row)
    count = len(row["test_bits"])
    program_flips = None
    if row["state"]:
        task = tasks.TASKS[key.task]
        with dspy.context(lm=loaded.task, adapter=dspy.JSONAdapter()), cells.quiet():
            program = cells.with_state(cells.student_of(key), row["state"])
            bits = cells.correct(program, tasks.load(folder, task, test_limit=count).test)
        program_flips = _flips(row["test_bits"], "".join(map(str, map(int, bits))))
    first = Comparison(key=key, examples=count, program_flips=program_flips, test=row["test"])
    if not row["settings"].get("deterministic", True) or not _is_known(key.optimizer):
        return first
    constants = {**BEFORE, **row["settings"].get("algorithm", {})}
    again = cells.run(key, loaded, folder, test_limit=count, constants=constants)
    return dataclasses.replace(
        first,
        run_flips=_flips(row["test_bits"], again["test_bits"]),
        same_program=row["program"] == again["program"],
        same_calls=row["task_lm_calls"] == again["task_lm_calls"],
        rerun=again["test"],
    )


def _is_known(optimizer: str) -> bool:
    """Rows of options that were tried and dropped cannot be run again."""
    try:
        optimizers.find(optimizer)
    except KeyError:
        return False
    return True


def _flips(first: str, second: str) -> int:
    return sum(a != b for a, b in zip(first, second, strict=True))


def main(path: Path, folder: Path, count: int, seed: int | None = None) -> str | None:
    """Rerun ``count`` random rows; returns what does not match, for ``sys.exit``."""
    rows = cells.read(path)
    if not rows:
        return f"{path} holds no rows to verify"
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))
    chosen.sort(key=lambda row: (row["lm"], row["precision"]))
    found: list[Comparison] = []
    loaded: lms.Lms | None = None
    for row in chosen:
        if loaded is None or (loaded.name, loaded.precision) != (row["lm"], row["precision"]):
            loaded = lms.load(row["lm"], row["precision"])
        found.append(compare(row, loaded, folder))
        sys.stdout.write(f"{found[-1]}\n")
        sys.stdout.flush()
    return verdict(found)


def verdict(found: Sequence[Comparison]) -> str | None:
    """What does not match, ``None`` if all do."""
    differing = [one for one in found if not one.matches]
    return f"{len(differing)} of {len(found)} rows differ" if differing else None
