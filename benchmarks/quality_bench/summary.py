"""From rows to numbers: per budget every optimizer's mean, rank, harm and calls. No text here."""

from __future__ import annotations

import math
import statistics as plain
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from asyndbt_dspy.core.racing import bar
from quality_bench import optimizers, tasks
from quality_bench.cells import Row
from quality_bench.statistics import (
    bootstrap_interval,
    calls_to_hold,
    calls_to_reach,
    mean,
    paired_difference,
    ranks,
    sign_test,
    verdict,
)

Cell = tuple[str, str]
"""(task, LM)."""
OURS = "asyndbt"
PAPER = "asyndbt_paper"
_BARS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
_POINTS = tuple(point / 10 for point in range(1, 11))


@dataclass(frozen=True)
class Against:
    """One optimizer paired with AsynDBT over the cells that both have.

    Attributes:
        reference: AsynDBT, or the variant of it that a variant is compared with (see ``reference_of``).
        difference, low, high: The reference's mean minus its, in points, with a 95 % interval.
        wins, ties, losses: Cells by ``statistics.verdict`` of the reference.
        p_value: Of the sign test over wins and losses.
    """

    reference: str
    difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    p_value: float


@dataclass(frozen=True)
class Line:
    """One optimizer at one budget. Scores in percent, ``harm`` in percent of its runs; ``None`` where unknown.

    Attributes:
        rank: Mean rank over the common cells; ``None`` where not ranked.
        cells, runs: What it was measured on.
        calls, proposer_calls, seconds: Means over its runs.
    """

    optimizer: str
    mean_test: float
    low: float
    high: float
    rank: float | None
    harm: float | None
    cells: int
    runs: int
    calls: float
    proposer_calls: float
    seconds: float
    against: Against | None


@dataclass(frozen=True)
class Acceptance:
    """What AsynDBT's runs would have come to, had a program had to be ahead by so many standard errors to be returned.

    Attributes:
        accept_z: Standard errors of the paired difference to the student in the final race.
        mean_test: Percent, over ``runs``.
        harm: Percent of ``runs``.
        kept: Percent of ``runs`` that return the student.
    """

    accept_z: float
    mean_test: float
    harm: float
    kept: float
    runs: int


@dataclass
class Summary:
    """One budget.

    Attributes:
        common: Cells that every ranked optimizer has; means and ranks are over these.
        lines: The best first.
        variants: AsynDBT with other options, each over the cells that it shares with what it is compared with; then the
            paper's method over all of these cells.
        reach: Per cell AsynDBT's calls to reach the best other's final score, as a part of that one's calls; ``inf`` if it
            never does.
        hold: The same until the score is reached and not lost again.
        scores: ``{cell: {optimizer: mean over seeds}}``.
        incomplete: Ranked optimizers that lack more than a third of the cells: shown, not ranked.
        acceptance: By ``accept_z``, over AsynDBT's runs whose race is in the row.
        of_constants, held_out: AsynDBT against the best other over the common cells of tasks that constants were chosen on, and
            over the rest.
        seeds: AsynDBT's mean over the cells of the ablation, by seed; seeds that lack a cell are left out.
    """

    budget: int
    common: list[Cell]
    lines: list[Line]
    variants: list[Line]
    reach: dict[Cell, float]
    hold: dict[Cell, float]
    scores: dict[Cell, dict[str, float]]
    incomplete: list[str] = field(default_factory=list)
    acceptance: list[Acceptance] = field(default_factory=list)
    of_constants: Against | None = None
    held_out: Against | None = None
    seeds: dict[int, float] = field(default_factory=dict)

    @property
    def best_other(self) -> Line | None:
        others = [one for one in self.lines if one.rank is not None and not optimizers.is_ours(one.optimizer)]
        return max(others, key=lambda one: one.mean_test, default=None)

    @property
    def median_reach(self) -> float | None:
        return plain.median(self.reach.values()) if self.reach else None

    @property
    def median_hold(self) -> float | None:
        return plain.median(self.hold.values()) if self.hold else None


class Table:
    """The rows of one budget by cell and optimizer; methods that do not search belong to every budget."""

    def __init__(self, rows: Iterable[Row], budget: int) -> None:
        self.rows: dict[Cell, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["budget"] in (budget, 0):
                self.rows[row["task"], row["lm"]][row["optimizer"]].append(row)

    def score(self, cell: Cell, name: str) -> float:
        return mean([row["test"] for row in self.rows[cell][name]])

    def rates(self, cell: Cell, name: str, seeds_of: str = "") -> list[float]:
        """Per test example how often it was right, over its seeds or over those that ``seeds_of`` has too."""
        seeds = {row["seed"] for row in self.rows[cell].get(seeds_of, [])}
        rows = [row for row in self.rows[cell][name] if row["seed"] in seeds] or self.rows[cell][name]
        bits = [row["test_bits"] for row in rows]
        return [sum(letter == "1" for letter in column) / len(bits) for column in zip(*bits, strict=True)]

    def cells_of(self, name: str) -> list[Cell]:
        return sorted(cell for cell, found in self.rows.items() if name in found)

    def names(self) -> list[str]:
        return sorted({name for found in self.rows.values() for name in found})


def budgets_of(rows: Iterable[Row]) -> list[int]:
    return sorted({row["budget"] for row in rows} - {0})


def summarise(rows: Sequence[Row], budget: int) -> Summary:
    """The numbers of one budget.

    Raises:
        KeyError: rows of an optimizer that this benchmark does not know.
    """
    table = Table(rows, budget)
    names = [name for name in table.names() if "[" not in name]
    ranked = [name for name in names if optimizers.find(name).ranked]
    fullest = max((len(table.cells_of(name)) for name in ranked), default=0)
    incomplete = [name for name in ranked if 3 * len(table.cells_of(name)) < 2 * fullest]
    ranked = [name for name in ranked if name not in incomplete]
    common = sorted(set.intersection(*(set(table.cells_of(name)) for name in ranked))) if ranked else []
    placed = {cell: _ranks(table, cell, ranked) for cell in common}
    lines = []
    for name in names:
        own = [cell for cell in common if name in table.rows[cell]] or table.cells_of(name)
        rank = mean([placed[cell][name] for cell in common]) if name in ranked and common else None
        lines.append(_line(table, name, own, rank))
    variants, varied = [], set()
    for name in table.names():
        reference = reference_of(name, table.names())
        shared = [cell for cell in table.cells_of(name) if reference in table.rows[cell]]
        if "[" in name and shared:
            variants.append(_line(table, name, shared, None))
            varied.update(shared)
    if beside := [cell for cell in table.cells_of(PAPER) if cell in varied]:
        variants.append(_line(table, PAPER, beside, None))
    lines.sort(key=lambda line: -line.mean_test)
    scores = {
        cell: {name: table.score(cell, name) for name in table.rows[cell]} for cell in sorted(table.rows)
    }
    others = [name for name in ranked if not optimizers.is_ours(name)]
    reach, hold = (_parts(table, common, others, budget, until) for until in (calls_to_reach, calls_to_hold))
    found = Summary(budget, common, lines, variants, reach, hold, scores, incomplete, _acceptance(table))
    best = found.best_other
    if best is not None:
        tuned = [cell for cell in common if tasks.TASKS[cell[0]].tuning]
        found.of_constants = _against(table, best.optimizer, tuned)
        found.held_out = _against(table, best.optimizer, [cell for cell in common if cell not in tuned])
    found.seeds = _by_seed(table, varied)
    return found


def _by_seed(table: Table, cells: Collection[Cell]) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for cell in cells:
        for row in table.rows[cell][OURS]:
            found[row["seed"]].append(row["test"])
    return {seed: mean(scores) for seed, scores in sorted(found.items()) if len(scores) == len(cells)}


def _ranks(table: Table, cell: Cell, names: Sequence[str]) -> dict[str, int]:
    rates = {name: table.rates(cell, name) for name in names}
    tied = {(a, b): verdict(rates[a], rates[b]) == 0 for a in names for b in names if a != b}
    return ranks({name: table.score(cell, name) for name in names}, tied)


def _line(table: Table, name: str, own: Sequence[Cell], rank: float | None) -> Line:
    rows = [row for cell in own for row in table.rows[cell][name]]
    groups = [[row["test"] for row in table.rows[cell][name]] for cell in own]
    low, high = bootstrap_interval(groups)
    return Line(
        optimizer=name,
        mean_test=mean([mean(group) for group in groups]),
        low=low,
        high=high,
        rank=rank,
        harm=_harm(table, name, own),
        cells=len(own),
        runs=len(rows),
        calls=mean([row["task_lm_calls"] for row in rows]),
        proposer_calls=mean([row["proposer_calls"] for row in rows]),
        seconds=mean([row["seconds"] for row in rows]),
        against=_against(table, name, own),
    )


def _harm(table: Table, name: str, own: Sequence[Cell]) -> float | None:
    """Runs whose program is more than two paired standard errors below the student, in percent.

    The student itself is no worse than itself, however two scorings of it differ (see *Reproducing a row* in the docs).
    """
    known = []
    for cell in own:
        if "student" in table.rows[cell] and name != "student":
            student = table.rates(cell, "student")
            unchanged = {row["program"] for row in table.rows[cell]["student"]}
            known += [
                row["program"] not in unchanged
                and verdict([float(letter) for letter in row["test_bits"]], student) < 0
                for row in table.rows[cell][name]
            ]
    return 100 * sum(known) / len(known) if known else None


def _acceptance(table: Table) -> list[Acceptance]:
    pairs = [
        (row, found["student"][0])
        for found in table.rows.values()
        for row in found.get(OURS, [])
        if row.get("finalists") and "student" in found
    ]
    # What a run did not return was not scored, so only a higher bar than the run's own can be told.
    own = max((row["settings"]["algorithm"]["accept_z"] for row, _ in pairs), default=math.inf)
    return [_accepted(pairs, accept_z) for accept_z in _BARS if accept_z >= own]


def _accepted(pairs: Sequence[tuple[Row, Row]], accept_z: float) -> Acceptance:
    scores, harmed, kept = [], 0, 0
    for row, student in pairs:
        winner = next((one for one in row["finalists"] if one["won"]), None)
        if winner is None or winner["advantage"] <= bar(accept_z, winner["examples"]) * winner["error"]:
            kept += 1
            scores.append(student["test"])
            continue
        scores.append(row["test"])
        own, students = ([float(letter) for letter in one["test_bits"]] for one in (row, student))
        harmed += verdict(own, students) < 0
    return Acceptance(accept_z, mean(scores), 100 * harmed / len(pairs), 100 * kept / len(pairs), len(pairs))


def reference_of(name: str, known: Collection[str]) -> str:
    """What an optimizer is compared with: AsynDBT; a variant ``asyndbt[a,b]`` with ``asyndbt[a]`` where that was run too."""
    _, _, options = name.rstrip("]").partition("[")
    shorter = f"{OURS}[{options.rpartition(',')[0]}]"
    return shorter if shorter in known else OURS


def _against(table: Table, name: str, own: Sequence[Cell]) -> Against | None:
    reference = reference_of(name, table.names())
    shared = [cell for cell in own if reference in table.rows[cell]]
    if name == OURS or not shared:
        return None
    # A variant of ours splits the data as AsynDBT does with the same seed.
    seeds_of = name if optimizers.is_ours(name) else ""
    rates = [(table.rates(cell, reference, seeds_of), table.rates(cell, name)) for cell in shared]
    verdicts = [verdict(ours, other) for ours, other in rates]
    gaps = [paired_difference(ours, other)[0] for ours, other in rates]
    low, high = bootstrap_interval([[gap] for gap in gaps])
    wins, losses = verdicts.count(1), verdicts.count(-1)
    p_value = sign_test(wins, losses)
    return Against(reference, mean(gaps), low, high, wins, verdicts.count(0), losses, p_value)


def _parts(
    table: Table,
    cells: Sequence[Cell],
    others: Sequence[str],
    budget: int,
    until: Callable[[Sequence[tuple[float, float]], float], float | None],
) -> dict[Cell, float]:
    """Per cell AsynDBT's calls ``until`` the best other's final score, over that one's calls.

    Only of cells with incumbents and a best other that makes calls.
    """
    parts = {}
    for cell in cells:
        rows = [row for row in table.rows[cell].get(OURS, []) if row.get("incumbents")]
        if rows and others:
            best = max(others, key=lambda name: table.score(cell, name))
            spent = mean([row["task_lm_calls"] for row in table.rows[cell][best]])
            if not spent:  # there are no calls to compare with where the best other makes none
                continue
            calls = until(curve(rows, budget), table.score(cell, best))
            parts[cell] = math.inf if calls is None else calls / spent
    return parts


def curve(rows: Sequence[Row], budget: int) -> list[tuple[float, float]]:
    """``(calls, test score)`` of the incumbents, the mean over rows at ten points of the budget."""
    points = []
    for part in _POINTS:
        calls = part * budget
        values = []
        for row in rows:
            known = [one["test"] for one in row["incumbents"] if one["calls"] <= calls]
            if part == 1.0 or calls >= row["task_lm_calls"]:
                values.append(row["test"])
            elif known:
                values.append(known[-1])
        if len(values) == len(rows):
            points.append((calls, mean(values)))
    return points
