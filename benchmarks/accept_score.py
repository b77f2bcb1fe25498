"""What the metric alone shows of the programs that AsynDBT returned, and what it would have to show (``accept_score_z``).

    python benchmarks/accept_score.py --rows results.jsonl --data DIR [--lms smollm2-135m,gemma3-270m] [--out FILE]
    python benchmarks/accept_score.py [--out FILE]        # only the table

Rows are those of ``benchmarks/quality.py``. Every program that ``asyndbt`` returned is scored again on the validation part, and
so is the student: paired difference and standard error by the metric, as the final race reckons them, but on all of the part.
One JSON line per run; runs that the file holds already are skipped. The table says what the runs would have come to, had the
student been returned below so many standard errors: an estimate, as a race may have had another finalist that shows more.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import dspy
import numpy as np
from quality_bench import cells, lms, tasks
from quality_bench.statistics import mean, verdict

from asyndbt_dspy.core.racing import standard_error

OUT = pathlib.Path(__file__).parent / "results" / "accept_score.jsonl"
BARS = (0.0, 0.5, 1.0, 1.5, 2.0)
Row = dict[str, Any]


def score(rows: list[Row], folder: pathlib.Path, name: str, out: pathlib.Path) -> None:
    """Append a line for every run of ``asyndbt`` with this LM."""
    known = {cells.Key.of(line) for line in cells.read(out)}
    students = {row["task"]: row for row in rows if row["optimizer"] == "student" and row["lm"] == name}
    loaded, bits = lms.load(name), {}

    def right(row: Row) -> np.ndarray:
        place = row["task"], row["program"]
        if place not in bits:
            task = tasks.TASKS[row["task"]]
            program = cells.with_state(task.build(), row["state"])
            with dspy.context(lm=loaded.task, adapter=dspy.JSONAdapter()), cells.quiet():
                bits[place] = np.array(cells.correct(program, tasks.load(folder, task).valid), dtype=float)
        return bits[place]

    for row in rows:
        if row["optimizer"] != "asyndbt" or row["lm"] != name or cells.Key.of(row) in known:
            continue
        student = students[row["task"]]
        kept = row["program"] == student["program"]
        differences = np.zeros(0) if kept else right(row) - right(student)
        own, others = (list(map(float, one["test_bits"])) for one in (row, student))
        line = {field: row[field] for field in ("task", "lm", "optimizer", "budget", "seed", "test")}
        line |= {
            "student": student["test"],
            "harmed": not kept and verdict(own, others) < 0,
            "advantage": None if kept else float(differences.mean()),
            "error": None if kept else standard_error(differences),
        }
        cells.append(out, line)


def table(lines: list[Row]) -> str:
    """Per budget and bar: mean test score over the cells, of the tasks that constants are chosen on alone, and harm."""
    found = [
        "| calls | bar | runs that change | test | on tuning tasks | harmed |",
        "|---|---|---|---|---|---|",
    ]
    for budget in sorted({line["budget"] for line in lines}):
        runs = [line for line in lines if line["budget"] == budget]
        for least in BARS:
            back = [one["advantage"] is not None and one["advantage"] < least * one["error"] for one in runs]
            scores: dict[tuple[str, str], list[float]] = {}
            for one, returned in zip(runs, back, strict=True):
                scores.setdefault((one["task"], one["lm"]), []).append(one["student" if returned else "test"])
            tuned = [mean(own) for (task, _), own in scores.items() if _is_tuning(task)]
            harmed = sum(one["harmed"] and not returned for one, returned in zip(runs, back, strict=True))
            whole = mean([mean(own) for own in scores.values()])
            found.append(
                f"| {budget} | {least:g} | {sum(back)} of {len(runs)} | {whole:.1f} | "
                f"{mean(tuned) if tuned else float('nan'):.1f} | {harmed} |"
            )
    return "\n".join(found)


def _is_tuning(task: str) -> bool:
    return tasks.TASKS[task].tuning


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, default=os.environ.get("ASYNDBT_DATA"))
    parser.add_argument("--lms", default=",".join(lms.LMS))
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    options = parser.parse_args()
    if options.rows:
        if not options.data:
            sys.exit("no data: give --data DIR or set ASYNDBT_DATA")
        for name in options.lms.split(","):
            score(cells.read(options.rows), options.data, name, options.out)
    print(table(cells.read(options.out)))


if __name__ == "__main__":
    main()
