"""Score against calls, with intervals. Needs matplotlib (extra ``bench``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quality_bench import optimizers, summary
from quality_bench.cells import Row
from quality_bench.statistics import mean
from quality_bench.summary import Summary


def draw(rows: Sequence[Row], found: Sequence[Summary], folder: Path) -> list[Path]:
    """One picture over the common cells of each budget; returns the files."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "quality"  # the same rows make the same file
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for one in found:
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for line in one.lines:
            if not optimizers.find(line.optimizer).ranked:
                continue
            own = optimizers.is_ours(line.optimizer)
            axes.errorbar(
                max(line.calls, 1),
                line.mean_test,
                yerr=[[max(0, line.mean_test - line.low)], [max(0, line.high - line.mean_test)]],
                fmt="o" if own else "s",
                alpha=0.8,
                capsize=2,
                label=line.optimizer,
            )
        points = _mean_curve(rows, one)
        if points:
            axes.plot(*zip(*points, strict=True), "-", color="black", label="asyndbt along its run")
        axes.set_xlabel("task-LM calls")
        axes.set_ylabel("test score (percent), mean over cells")
        axes.set_title(f"Budget {one.budget}: {len(one.common)} cells, 95 % intervals")
        axes.legend(fontsize=7, ncols=2)
        figure.tight_layout()
        files.append(folder / f"quality_{one.budget}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
        pyplot.close(figure)
    return files


def _mean_curve(rows: Sequence[Row], one: Summary) -> list[tuple[float, float]]:
    """AsynDBT's incumbents, the mean over the common cells at the points that all of them have."""
    curves = []
    for cell in one.common:
        own = [
            row
            for row in rows
            if (row["task"], row["lm"], row["optimizer"], row["budget"]) == (*cell, summary.OURS, one.budget)
            and row.get("incumbents")
        ]
        if own:
            curves.append(dict(summary.curve(own, one.budget)))
    if not curves:
        return []
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(calls, mean([curve[calls] for curve in curves])) for calls in shared]
