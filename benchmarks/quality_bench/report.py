"""Tables for people, and the JSON line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from quality_bench import cells, summary, tasks
from quality_bench.statistics import mean
from quality_bench.summary import Line, Summary

CAVEAT = (
    "The proposers are the LMs themselves, of 135 and 270 million parameters: that cripples methods that live on "
    "proposals (`mipro_v2`, `simba`, `gepa`, `copro`). With a strong proposer they may well do better than here."
)
BEGIN, END = "<!-- quality tables: begin -->", "<!-- quality tables: end -->"


def main(path: Path, as_json: bool, plots: Path | None, docs: Path | None) -> str | None:
    """Print the report of a results file, or its line for programs, and draw the plots; returns what is wrong, for ``sys.exit``.

    Args:
        plots: Folder; ``None``: ``plots`` beside the results, and none beside a line for programs.
    """
    rows = cells.read(path)
    if not rows:
        return f"{path} holds no rows; run the benchmark with --out {path} first"
    limits = {row.get("test_limit") for row in rows}
    if len(limits) > 1:
        return f"{path} mixes rows of different --test-limit ({limits}): their scores cannot be compared"
    found = [summary.summarise(rows, budget) for budget in summary.budgets_of(rows)]
    if as_json:
        sys.stdout.write(json.dumps(as_line(found)) + "\n")
    else:
        sys.stdout.write(text(found) + "\n")
    if plots is not None or not as_json:
        _draw(rows, found, plots or path.parent / "plots")
    if docs is not None:
        write_docs(docs, text(found))
    return None


def _draw(rows: Sequence[cells.Row], found: Sequence[Summary], folder: Path) -> None:
    from quality_bench import plots

    try:
        files = plots.draw(rows, found, folder)
    except ImportError as error:
        sys.stderr.write(f"no plots ({error}): pip install 'asyndbt-dspy[bench]'\n")
        return
    sys.stderr.write(f"plots: {', '.join(map(str, files))}\n")


def as_line(found: Sequence[Summary]) -> dict[str, object]:
    """``{"budgets": {"300": {"asyndbt": {"mean_test", "rank", "harm"}}}}``, scores and harm in percent."""
    return {
        "budgets": {
            str(one.budget): {
                line.optimizer: {
                    "mean_test": round(line.mean_test, 2),
                    "rank": None if line.rank is None else round(line.rank, 2),
                    "harm": None if line.harm is None else round(line.harm, 2),
                }
                for line in one.lines
            }
            for one in found
        }
    }


def write_docs(path: Path, tables: str) -> None:
    """Put the tables between the markers of a Markdown file.

    Raises:
        ValueError: the file has no markers.
    """
    content = path.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        raise ValueError(f"{path} needs the lines {BEGIN} and {END}, between which the tables go")
    before, _, rest = content.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def text(found: Sequence[Summary]) -> str:
    """The whole report as Markdown."""
    return "\n\n".join(part for one in found for part in _budget(one))


def _budget(one: Summary) -> list[str]:
    parts = [f"### {one.budget} task-LM calls", _coverage(one), _main_table(one), _claims(one)]
    parts += [f"Score per task and LM at {one.budget} calls (percent):", _cell_table(one)]
    if one.variants:
        parts += [
            f"Ablation at {one.budget} calls (difference: what it is compared with minus the variant, on the variant's seeds; "
            f"intervals over cells, so that they do not hold what one run differs from the next by{_by_seed(one)}):",
            _variants(one),
        ]
    if one.acceptance:
        parts.append(_acceptance(one))
    parts.append(_paper(one))
    return [part for part in parts if part]


def _by_seed(one: Summary) -> str:
    """AsynDBT's own mean by seed: a variant with one seed is compared with that one."""
    if len(one.seeds) < 2:
        return ""
    each = ", ".join(f"{score:.1f}" for score in one.seeds.values())
    return (
        f"; `asyndbt` itself has {each} on these cells with seeds {', '.join(map(str, one.seeds))}, "
        f"{mean(list(one.seeds.values())):.1f} in the mean"
    )


def _acceptance(one: Summary) -> str:
    said = (
        f"What `asyndbt` would have come to at {one.budget} calls, had a finalist had to be ahead of the student by more standard "
        f"errors on the race's examples (`accept_z`; {one.acceptance[0].runs} runs):"
    )
    rows = [
        [f"{bar.accept_z:g}", f"{bar.mean_test:.1f}", f"{bar.harm:.0f} %", f"{bar.kept:.0f} %"]
        for bar in one.acceptance
    ]
    return f"{said}\n\n{_table(['accept_z', 'test', 'harm', 'student returned'], rows)}"


def _coverage(one: Summary) -> str:
    held_out = sum(not tasks.TASKS[task].tuning for task, _ in one.common)
    said = (
        f"Means over {len(one.common)} cells (task × LM), {held_out} of them on tasks and programs that no constant "
        "was chosen on, the bar for the student apart (see *Constants* above); "
        "95 % intervals by bootstrap over cells and seeds. Ranks are of seed means, and ties (less than two "
        "paired standard errors over the test examples) share the better rank. Harm: part of the runs "
        "more than two paired standard errors below the student."
    )
    if one.incomplete:
        said += f" Not in every cell, so not ranked: {', '.join(one.incomplete)}."
    return said


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _main_table(one: Summary) -> str:
    head = [
        "optimizer",
        "test",
        "95 %",
        "rank",
        "harm",
        "asyndbt −",
        "95 %",
        "win/tie/loss",
        "LM calls",
        "of budget",
        "proposer calls",
        "seconds",
        "runs",
    ]
    return _table(head, [_main_row(one, line) for line in one.lines])


def _main_row(one: Summary, line: Line) -> list[str]:
    versus = line.against
    part = f" ({line.cells} of {len(one.common)} cells)" if line.cells < len(one.common) else ""
    return [
        f"`{line.optimizer}`{part}",
        f"{line.mean_test:.1f}",
        f"{line.low:.1f}–{line.high:.1f}",
        "–" if line.rank is None else f"{line.rank:.1f}",
        "–" if line.harm is None else f"{line.harm:.0f} %",
        "–" if versus is None else f"{versus.difference:+.1f}",
        "–" if versus is None else f"{versus.low:+.1f} … {versus.high:+.1f}",
        "–" if versus is None else f"{versus.wins}/{versus.ties}/{versus.losses} (p={versus.p_value:.2g})",
        f"{line.calls:.0f}",
        f"{100 * line.calls / one.budget:.0f} %",
        f"{line.proposer_calls:.0f}",
        f"{line.seconds:.0f}",
        str(line.runs),
    ]


def _claims(one: Summary) -> str:
    ours = next((line for line in one.lines if line.optimizer == summary.OURS), None)
    best = one.best_other
    if ours is None or best is None:
        return ""
    if ours.rank is None:
        return f"`asyndbt` was run in {ours.cells} of {len(one.common)} cells: nothing is claimed at this budget yet."
    gap = ours.mean_test - best.mean_test
    harm = "–" if ours.harm is None else f"{ours.harm:.1f} %"
    said = [
        f"`asyndbt` minus the best ranked other (`{best.optimizer}`): {gap:+.1f} points (wanted: +3 or more). "
        f"Average rank {ours.rank:.2f} (wanted: 2.5 or less). Harm {harm} (wanted: 2 % or less)."
    ]
    parts = [
        f"over {where} {versus.difference:+.1f} (95 % {versus.low:+.1f} … {versus.high:+.1f}; "
        f"{versus.wins}/{versus.ties}/{versus.losses})"
        for where, versus in (
            ("the tasks that constants were chosen on", one.of_constants),
            ("the other tasks and programs", one.held_out),
        )
        if versus is not None
    ]
    if len(parts) == 2:
        said.append(f"Paired with it cell by cell: {', '.join(parts)}.")
    if one.median_reach is not None and one.median_hold is not None:
        reach, hold = (
            "never" if math.isinf(part) else f"{part:.2f}" for part in (one.median_reach, one.median_hold)
        )
        said.append(
            f"Calls to reach the best other's final score, as a part of that one's calls: median {reach} over "
            f"{len(one.reach)} cells whose best other makes any (wanted: 0.5 or less); "
            f"until it is reached and not lost again: {hold}."
        )
    return " ".join([*said, CAVEAT])


def _cell_table(one: Summary) -> str:
    names = [line.optimizer for line in one.lines]
    body = [
        [
            f"{task}, {lm}",
            *(f"{scores[name]:.1f}" if name in scores else "–" for name in names),
        ]
        for (task, lm), scores in one.scores.items()
    ]
    return _table(["cell", *(f"`{name}`" for name in names)], body)


def _variants(one: Summary) -> str:
    body = []
    for line in one.variants:
        versus = line.against
        assert versus is not None  # variants share cells with AsynDBT
        body.append(
            [
                f"`{line.optimizer}`",
                f"`{versus.reference}`",
                f"{line.mean_test:.1f}",
                f"{versus.difference:+.1f}",
                f"{versus.low:+.1f} … {versus.high:+.1f}",
                f"{versus.wins}/{versus.ties}/{versus.losses}",
                str(line.runs),
            ]
        )
    return _table(["variant", "compared with", "test", "difference", "95 %", "win/tie/loss", "runs"], body)


_PAPER = (
    ("cendbt", "asyndbt_paper"),
    ("asyndbt_paper", "bdpl"),
    ("asyndbt_paper", "random_icl"),
    ("asyndbt_paper", "kate"),
    ("asyndbt_demo_only", "asyndbt_prompt_only"),
)
"""The paper's ordering: the first of a pair is at least as good."""


def _paper(one: Summary) -> str:
    body = []
    for a, b in _PAPER:
        pairs = [(found[a], found[b]) for found in one.scores.values() if a in found and b in found]
        if pairs:
            first, second = (mean(scores) for scores in zip(*pairs, strict=True))
            holds = "holds" if first >= second else "does not hold"
            body.append([f"`{a}` ≥ `{b}`", f"{first:.1f} / {second:.1f}", str(len(pairs)), holds])
    if not body:
        return ""
    head = (
        f"The paper's ordering at {one.budget} calls, on the cells that both of a pair have (where there is one, the last "
        "line: demos matter more than instructions):"
    )
    return f"{head}\n\n{_table(['ordering', 'test', 'cells', 'here'], body)}"
