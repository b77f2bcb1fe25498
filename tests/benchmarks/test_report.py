from __future__ import annotations

import math
from pathlib import Path

import pytest
from quality_bench import cells, report, settings, statistics, summary, tasks
from quality_bench.settings import Rung
from result_rows import made_row

HALF = "10" * 50


def test_ranks_share_the_better_one_with_the_head_of_their_group_only() -> None:
    scores = {"a": 90.0, "b": 88.0, "c": 86.0, "d": 50.0}
    tied = {("a", "b"): True, ("b", "c"): True, ("a", "c"): False, ("c", "d"): False}
    assert statistics.ranks(scores, tied) == {"a": 1, "b": 1, "c": 3, "d": 4}
    assert statistics.ranks({"a": 1.0, "b": 1.0}, {}) == {"a": 1, "b": 1}


def test_the_sign_test_is_exact() -> None:
    assert statistics.sign_test(0, 0) == 1
    assert statistics.sign_test(5, 0) == pytest.approx(2 / 32)
    assert statistics.sign_test(4, 2) == pytest.approx(2 * (1 + 6 + 15) / 64)


def test_paired_differences_by_hand() -> None:
    # differences 1, 0, 0, -1, 1 (mean .2, sum of squares about it 2.8)
    centre, error = statistics.paired_difference([1, 1, 0, 0, 1], [0, 1, 0, 1, 0])
    assert centre == pytest.approx(20)
    assert error == pytest.approx(100 * math.sqrt(2.8 / 4 / 5))
    assert statistics.verdict([1.0] * 9 + [0.0], [0.0] * 10) == 1
    assert statistics.verdict([1.0, 0.0] * 5, [0.0, 1.0] * 5) == 0


def test_intervals_hold_the_mean_and_narrow_with_more_cells() -> None:
    few, many = [[50.0], [70.0]], [[50.0], [70.0]] * 50
    for groups in (few, many):
        low, high = statistics.bootstrap_interval(groups)
        assert low <= 60 <= high
    narrow, wide = (statistics.bootstrap_interval(groups) for groups in (many, few))
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 3


def test_a_score_that_is_lost_again_is_reached_and_not_held() -> None:
    curve = [(30, 60), (60, 40), (90, 55), (120, 70)]
    assert statistics.calls_to_hold(curve, 50) == 90
    assert statistics.calls_to_reach(curve, 50) == 30
    for until in (statistics.calls_to_hold, statistics.calls_to_reach):
        assert until([(30, 60)], 61) is None


def test_harm_counts_runs_far_below_the_student() -> None:
    rows = [
        made_row("student", "1" * 100),
        made_row("asyndbt", "1" * 100),
        made_row("asyndbt", "1" * 90 + "0" * 10, seed=1),
        made_row("asyndbt", "1" * 99 + "0", seed=2),
        # Scored on another machine, the student itself may come to other answers.
        made_row("asyndbt", "1" * 90 + "0" * 10, seed=3, program="student"),
    ]
    [line, _] = sorted(summary.summarise(rows, 300).lines, key=lambda one: one.optimizer)
    assert (line.optimizer, line.harm, line.runs) == ("asyndbt", 25.0, 4)


def test_a_higher_bar_returns_the_student_more_often() -> None:
    def run(seed: int, bits: str, advantage: float | None) -> dict[str, object]:
        lost = {"examples": 10, "advantage": 0.9, "error": 0.1, "won": False}
        won = (
            [] if advantage is None else [{"examples": 20, "advantage": advantage, "error": 0.1, "won": True}]
        )
        kept = {"finalists": [lost, *won], "settings": {"algorithm": {"accept_z": 1.0}}}
        return made_row("asyndbt", bits, seed=seed) | kept

    half = "1" * 50 + "0" * 50
    rows = [
        made_row("student", half),
        run(0, "1" * 100, 0.25),
        run(1, "0" * 100, 0.15),  # harm, and 1.5 standard errors are not more than 1.5
        run(2, half, None),
    ]
    found = {one.accept_z: one for one in summary.summarise(rows, 300).acceptance}
    assert sorted(found) == [1.0, 1.5, 2.0, 2.5, 3.0], "what the run did not return was not scored"
    first, second = found[1.0], found[1.5]
    assert (first.mean_test, first.harm, first.kept, first.runs) == pytest.approx((50.0, 100 / 3, 100 / 3, 3))
    assert (second.mean_test, second.harm, second.kept) == pytest.approx((200 / 3, 0.0, 200 / 3))
    assert found[2.5].kept == 100.0, "with 20 examples 2.5 standard errors are 2.7"
    assert "| 1.5 | 66.7 | 0 % | 67 % |" in report.text([summary.summarise(rows, 300)])
    assert summary.summarise([made_row("student", half), made_row("asyndbt", half)], 300).acceptance == []


def test_ranks_ties_and_wins_of_a_small_grid() -> None:
    better, worse = "1" * 80 + "0" * 20, "1" * 40 + "0" * 60
    rows = []
    for task in ("sst2", "trec"):
        rows += [
            made_row("student", worse, task=task),
            made_row("asyndbt", better, task=task),
            made_row("simba", better[:-1] + "1", task=task),  # one more: a tie
            made_row("copro", worse, task=task),
            made_row("kate", "1" * 100, task=task, budget=0),
        ]
    found = summary.summarise(rows, 300)
    lines = {line.optimizer: line for line in found.lines}
    assert lines["asyndbt"].rank == lines["simba"].rank == 1
    assert lines["copro"].rank == lines["student"].rank == 3
    assert lines["kate"].rank is None
    against = lines["copro"].against
    assert against is not None
    assert (against.wins, against.ties, against.losses, against.difference) == (2, 0, 0, 40.0)
    best = found.best_other
    assert best is not None
    assert best.optimizer == "simba"


def test_means_are_over_the_cells_that_all_have() -> None:
    half = [made_row(name, HALF, task=task) for task in ("sst2", "trec") for name in ("student", "asyndbt")]
    none = [made_row(name, "0" * 100, task="cola") for name in ("student", "asyndbt")]
    rows = [*half, *none, *(made_row("simba", "1" * 100, task=task) for task in ("sst2", "trec"))]
    found = summary.summarise(rows, 300)
    assert found.common == [("sst2", "small"), ("trec", "small")]
    assert {line.optimizer: line.mean_test for line in found.lines} == {
        "simba": 100,
        "asyndbt": 50,
        "student": 50,
    }


def test_an_optimizer_with_few_cells_is_shown_but_not_ranked() -> None:
    names = ("sst2", "trec", "cola", "qnli", "ag_news")
    rows = [made_row(name, HALF, task=task) for task in names for name in ("student", "asyndbt")]
    rows.append(made_row("simba", "1" * 100))
    rows += [made_row("copro", HALF, task=task) for task in names[:3]]
    found = summary.summarise(rows, 300)
    assert found.incomplete == ["copro", "simba"]
    assert len(found.common) == 5
    assert next(line.rank for line in found.lines if line.optimizer == "simba") is None
    assert "not ranked: copro, simba" in report.text([found])
    assert "`copro` (3 of 5 cells)" in report.text([found])


def test_nothing_is_claimed_of_few_cells() -> None:
    rows = [made_row("student", HALF, task=task) for task in ("sst2", "trec", "cola", "qnli", "ag_news")]
    rows.append(made_row("asyndbt", "1" * 100))
    said = report.text([summary.summarise(rows, 300)])
    assert "`asyndbt` was run in 1 of 5 cells: nothing is claimed" in said
    assert "best ranked other" not in said


def test_the_papers_ordering_is_told_on_the_cells_that_both_have() -> None:
    rows = [made_row("asyndbt_paper", "1" * 60 + "0" * 40), made_row("random_icl", HALF, budget=0)]
    rows += [made_row("random_icl", "1" * 100, budget=0, task=name) for name in ("trec", "cola")]
    rows += [made_row("student", HALF, budget=0, task=name) for name in ("sst2", "trec", "cola")]
    said = report.text([summary.summarise(rows, 300)])
    assert "| `asyndbt_paper` ≥ `random_icl` | 60.0 / 50.0 | 1 | holds |" in said


def test_calls_to_reach_the_best_other() -> None:
    scores = ((30, 40.0), (90, 55.0), (120, 45.0), (200, 70.0))
    along = [{"calls": calls, "test": score} for calls, score in scores]
    rows = [
        made_row("asyndbt", "1" * 70 + "0" * 30, incumbents=along),
        made_row("simba", "1" * 50 + "0" * 50, task_lm_calls=240),
        made_row("student", HALF),
    ]
    found = summary.summarise(rows, 300)
    assert found.reach == {("sst2", "small"): pytest.approx(90 / 240)}
    assert found.hold == {("sst2", "small"): pytest.approx(210 / 240)}
    said = report.text([found])
    assert "median 0.38 over 1 cells whose best other makes any" in said
    assert "not lost again: 0.88" in said
    rows[1] = made_row("simba", "1" * 90 + "0" * 10)
    found = summary.summarise(rows, 300)
    assert found.reach == found.hold == {("sst2", "small"): math.inf}
    rows[1] = made_row("random_icl", "1" * 60 + "0" * 40, budget=0, task_lm_calls=0)
    found = summary.summarise(rows, 300)
    assert found.reach == found.hold == {}


def test_variants_are_compared_on_the_cells_they_share() -> None:
    rows = [
        made_row("asyndbt", "1" * 80 + "0" * 20),
        made_row("asyndbt", "0" * 100, task="trec"),
        made_row("asyndbt", "1" * 20 + "0" * 80, seed=1),  # the variant was not run with this seed
        made_row("asyndbt[race=False]", "1" * 60 + "0" * 40),
        made_row("student", HALF),
        made_row("student", HALF, task="trec"),
    ]
    found = summary.summarise(rows, 300)
    [variant] = found.variants
    assert variant.against is not None
    assert variant.against.difference == 20
    assert found.seeds == {0: 80.0, 1: 20.0}
    assert "has 80.0, 20.0 on these cells with seeds 0, 1, 50.0 in the mean" in report.text([found])
    assert "`asyndbt[race=False]`" in report.text([found])


def test_tasks_that_constants_were_chosen_on_are_told_apart_from_the_others() -> None:
    rows = [
        made_row(name, bits, task=task)
        for task, ours in (("sst2", "1" * 90 + "0" * 10), ("cola", "1" * 60 + "0" * 40))
        for name, bits in (("asyndbt", ours), ("simba", HALF))
    ]
    found = summary.summarise(rows, 300)
    assert found.of_constants is not None and found.held_out is not None
    assert (found.of_constants.difference, found.held_out.difference) == (40, 10)
    assert "over the other tasks and programs +10.0" in report.text([found])


def test_the_caveat_stands_beside_the_claim_and_tables_go_between_the_markers(tmp_path: Path) -> None:
    rows = [made_row(name, HALF) for name in ("student", "asyndbt", "simba")]
    said = report.text([summary.summarise(rows, 300)])
    [claim] = [part for part in said.split("\n\n") if "best ranked other" in part]
    assert report.CAVEAT in claim
    page = tmp_path / "benchmarks.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write_docs(page, said)
    content = page.read_text(encoding="utf-8")
    assert said in content
    assert "old" not in content
    assert content.startswith("before")
    assert content.endswith("after\n")
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="needs the lines"):
        report.write_docs(page, said)


def test_the_rung_is_the_largest_within_the_budget_if_it_uses_most_of_it() -> None:
    rungs = [Rung({"size": size}, size) for size in (100, 200, 280, 290, 400)]

    def chosen(measure: dict[int, float]) -> int:
        return settings.select(rungs, 300, lambda rung: measure[rung.settings["size"]])[0].settings["size"]

    assert chosen({100: 100, 200: 200, 280: 280, 290: 295, 400: 400}) == 290
    assert chosen({100: 90, 200: 150, 280: 260, 290: 310, 400: 500}) == 290  # 260 is less than 90 %
    assert chosen({100: 150, 200: 290, 280: 320, 290: 330, 400: 500}) == 200
    assert chosen({100: 400, 200: 500, 280: 600, 290: 700, 400: 800}) == 100


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    from quality_bench import plots

    along = [{"calls": 30, "test": 40.0}, {"calls": 150, "test": 55.0}]
    rows = [made_row("asyndbt", HALF, incumbents=along), made_row("student", HALF), made_row("simba", HALF)]
    [file] = plots.draw(rows, [summary.summarise(rows, 300)], tmp_path / "plots")
    [again] = plots.draw(rows, [summary.summarise(rows, 300)], tmp_path / "again")
    assert file.read_bytes() == again.read_bytes()
    assert file.stat().st_size > 1_000


def test_a_report_writes_its_plots_beside_the_results_and_a_line_for_programs_writes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    from quality_bench import plots

    results = tmp_path / "results.jsonl"
    for row in (made_row("asyndbt", HALF), made_row("student", HALF), made_row("simba", HALF)):
        cells.append(results, row)
    report.main(results, True, None, None)
    assert not (tmp_path / "plots").exists()
    report.main(results, False, None, None)
    assert (tmp_path / "plots" / "quality_300.svg").stat().st_size > 1_000
    monkeypatch.setattr(plots, "draw", lambda *_: (_ for _ in ()).throw(ImportError("no matplotlib here")))
    assert report.main(results, False, None, None) is None
    assert "pip install 'asyndbt-dspy[bench]'" in capsys.readouterr().err


def test_the_others_settings_are_committed_for_every_task_and_budget() -> None:
    sizes = {"sst2": 20, "cola": 20, "qnli": 20, "ag_news": 40, "trec": 60, "banking77": 100}
    for task in (one for one in tasks.TASKS.values() if one.in_grid):
        shape = settings.Shape(sizes[task.folder], task.predictors)
        for budget in (300, 1200):
            for name in settings.SEARCHERS:
                known = settings.table()[settings.key(name, budget, shape)]
                assert known["measured_calls"] >= 0.9 * budget, (name, budget, shape)
                assert settings.settings_for(name, budget, shape) == known["settings"]


def test_a_variant_of_a_variant_is_compared_with_the_one_without_its_last_option() -> None:
    known = [
        "asyndbt",
        "asyndbt[demo_ending=False]",
        "asyndbt[demo_ending=False,race=False]",
        "asyndbt[draws=4]",
    ]
    found = [summary.reference_of(name, known) for name in known]
    assert found == ["asyndbt", "asyndbt", "asyndbt[demo_ending=False]", "asyndbt"]
    assert summary.reference_of("mipro_v2", known) == "asyndbt"
    rows = [
        made_row("asyndbt", "1" * 100),
        made_row("asyndbt[demo_ending=False]", "1" * 50 + "0" * 50),
        made_row("asyndbt[demo_ending=False,race=False]", "1" * 40 + "0" * 60),
    ]
    gaps = {line.optimizer: line.against.difference for line in summary.summarise(rows, 300).variants}
    assert gaps == {"asyndbt[demo_ending=False]": 50.0, "asyndbt[demo_ending=False,race=False]": 10.0}


def test_the_papers_method_stands_beside_the_ablation_on_its_cells() -> None:
    rows = [
        *(made_row("asyndbt", "1" * 100, task=task) for task in ("sst2", "trec")),
        *(
            made_row("asyndbt_paper", "1" * right + "0" * (100 - right), task=task)
            for task, right in (("sst2", 30), ("trec", 90))
        ),
    ]
    assert summary.summarise(rows, 300).variants == []
    varied = [*rows, made_row("asyndbt[race=False]", "0" * 100, task="sst2")]
    found = summary.summarise(varied, 300).variants
    assert [(line.optimizer, line.mean_test, line.cells) for line in found] == [
        ("asyndbt[race=False]", 0.0, 1),
        ("asyndbt_paper", 30.0, 1),
    ]
