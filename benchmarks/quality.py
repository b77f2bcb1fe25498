"""Quality at equal task-LM calls: AsynDBT, DSPy's optimizers and the paper's baselines, on real data and local LMs.

    python benchmarks/quality.py --data DIR --tasks sst2,trec --lms smollm2-135m --optimizers asyndbt,bootstrap_rs
                                 --budgets 300,1200 --seeds 0,1,2 --out results.jsonl
    python benchmarks/quality.py --report results.jsonl [--json] [--plots DIR] [--write-docs docs/benchmarks.md]
    python benchmarks/quality.py --verify 10 --out results.jsonl --data DIR

Resumable: cells that the file already holds are skipped. One JSON line per run. ``docs/benchmarks.md`` says how it is
measured. The data folder (``--data`` or ``ASYNDBT_DATA``) is never copied.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"


def _listed(text: str) -> list[str]:
    """Commas separate, except inside of brackets: ``asyndbt,asyndbt[race=False,draws=4]``."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in _listed(text)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("ASYNDBT_DATA"))
    parser.add_argument("--tasks", type=_listed, default=None, help="default: all")
    parser.add_argument("--lms", type=_listed, default=None, help="default: both")
    parser.add_argument("--optimizers", type=_listed, default=None, help="default: all")
    parser.add_argument("--budgets", type=_numbers, default=[300, 1200])
    parser.add_argument("--seeds", type=_numbers, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--incumbents", action="store_true", help="score what AsynDBT would return earlier")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument(
        "--processes", type=int, default=1, help="that run cells at the same time, as on a GPU"
    )
    parser.add_argument("--test-limit", type=int, default=None, help="test examples, for smoke runs")
    parser.add_argument("--report", type=Path, default=None, metavar="RESULTS")
    parser.add_argument("--json", action="store_true", help="with --report: one JSON line")
    parser.add_argument(
        "--plots", type=Path, default=None, metavar="DIR", help="default: the folder plots beside the results"
    )
    parser.add_argument("--write-docs", type=Path, default=None, metavar="FILE")
    parser.add_argument("--verify", type=int, default=0, metavar="N", help="rerun N random rows of --out")
    parser.add_argument("--measure-settings", action="store_true", help="rewrite the others' settings")
    arguments = parser.parse_args()
    if arguments.report is None:
        for name in ("json", "plots", "write_docs"):
            if getattr(arguments, name):
                parser.error(f"--{name.replace('_', '-')} goes with --report RESULTS")
    for name, least in (("verify", 0), ("processes", 1), ("test_limit", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if arguments.test_limit is not None and arguments.out == RESULTS:
        parser.error("--test-limit makes rows of a smoke run: give them a file of their own with --out")
    return arguments


def main() -> None:
    arguments = _arguments()
    if arguments.report is not None:
        from quality_bench import report

        sys.exit(report.main(arguments.report, arguments.json, arguments.plots, arguments.write_docs))
    if arguments.measure_settings:
        from quality_bench import measure, settings

        measure.main(arguments.budgets, arguments.optimizers or settings.SEARCHERS)
        return
    if arguments.data is None or not Path(arguments.data).is_dir():
        sys.exit(
            "no data: give --data DIR or set ASYNDBT_DATA to the folder with sst2/, trec/ and the others"
        )
    if arguments.verify:
        from quality_bench import verify

        sys.exit(verify.main(arguments.out, Path(arguments.data), arguments.verify))
    _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    from quality_bench import cells, lms, optimizers, runs, tasks

    keys = arguments.optimizers or optimizers.keys()
    try:
        for key in keys:
            optimizers.find(key)
    except KeyError as error:
        sys.exit(error.args[0])
    names = arguments.tasks or [name for name, one in tasks.TASKS.items() if one.in_grid]
    unknown = sorted(set(names) - set(tasks.TASKS))
    if unknown:
        sys.exit(f"no tasks {unknown}; known: {', '.join(tasks.TASKS)}")
    wanted = cells.grid(
        names,
        arguments.lms or list(lms.LMS),
        keys,
        arguments.budgets,
        arguments.seeds,
    )
    done = {
        cells.Key.of(row)
        for row in cells.read(arguments.out)
        if row.get("test_limit") == arguments.test_limit
    }
    missing = [key for key in dict.fromkeys(wanted) if key not in done]
    print(f"{len(wanted)} cells, {len(missing)} to run", file=sys.stderr)
    options = runs.Options(
        arguments.out,
        Path(arguments.data),
        arguments.precision,
        incumbents=arguments.incumbents,
        test_limit=arguments.test_limit,
    )
    failures = runs.run(missing, options, arguments.processes)
    if failures:
        sys.exit(f"{failures} cells failed; the same call runs them again")


if __name__ == "__main__":
    main()
