"""A run that died goes on: nothing recorded is asked again, and the result is that of the run that did not die."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest
from crashes import Asked, compiled, entries, killed_after, killed_before, lines_written, steady

from asyndbt_dspy import Budget, Worker
from asyndbt_dspy.errors import ConfigurationError, JournalError, ResumeError
from asyndbt_dspy.runs.journal import encode_line
from asyndbt_dspy.runs.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


def undisturbed(tmp_path: Path, **options: Any) -> tuple[Any, Any, int, list[str]]:
    """Result, program, journal lines and prompts of a run that nothing disturbs."""
    asked = Asked(kit.stairs(1))
    optimizer, program = compiled(tmp_path / "undisturbed", asked, **options)
    lines = lines_written(tmp_path / "undisturbed")
    return steady(optimizer.result), kit.state_of(program), lines, asked.prompts


def test_a_run_dir_changes_nothing_of_a_run(tmp_path: Path) -> None:
    plain, program = compiled(None, kit.stairs(1))
    result, state, _, _ = undisturbed(tmp_path)
    assert (steady(plain.result), kit.state_of(program)) == (result, state)


@pytest.mark.parametrize("seed", range(3))
def test_deterministic_after_any_number_of_deaths_the_result_is_the_same_and_nothing_is_paid_twice(
    tmp_path: Path, seed: int
) -> None:
    result, state, lines, prompts = undisturbed(tmp_path)
    assert lines > 100 and len(set(prompts)) == len(prompts)
    moments = random.Random(seed)
    for number in range(3):
        folder, asked = tmp_path / f"run-{number}", Asked(kit.stairs(1))
        optimizer, program = None, None
        while program is None:
            recorded = {entry["key"] for entry in entries(folder, "rollout")} if folder.exists() else set()
            before = len(recorded)
            deadline = moments.choice([moments.randrange(8), moments.randrange(lines), lines * 2])
            with killed_after(deadline):
                optimizer, program = compiled(folder, asked)
            keys = [entry["key"] for entry in entries(folder, "rollout")] if folder.exists() else []
            assert len(keys) == len(set(keys)) >= before, "no rollout is recorded twice"
        assert optimizer is not None
        assert (steady(optimizer.result), kit.state_of(program)) == (result, state)
        lost = len(asked.prompts) - len(prompts)
        assert set(asked.prompts) == set(prompts) and lost == len(asked.prompts) - len(set(asked.prompts))


def test_every_single_line_is_a_moment_to_die(tmp_path: Path) -> None:
    budget = Budget(metric_calls=60)
    result, state, lines, _ = undisturbed(tmp_path, budget=budget)
    for line in range(1, lines, 5):
        folder, asked = tmp_path / f"run-{line}", Asked(kit.stairs(1))
        with killed_after(line):
            assert compiled(folder, asked, budget=budget)[1] is None or line >= lines - 2
        recorded = len(entries(folder, "rollout"))
        first = len(asked.prompts)
        optimizer, program = compiled(folder, asked, budget=budget)
        assert (steady(optimizer.result), kit.state_of(program)) == (result, state), line
        assert len(asked.prompts) - first == result["metric_calls"] - recorded, line


def test_a_finished_run_is_returned_without_a_single_call(tmp_path: Path) -> None:
    first, program = compiled(tmp_path, kit.stairs(1))

    def never(messages: Any) -> str:
        raise AssertionError("asked again")

    again, same = compiled(tmp_path, never)
    assert steady(again.result) == steady(first.result) and kit.state_of(same) == kit.state_of(program)
    assert first.result is not None and again.result is not None
    assert again.result.seconds == pytest.approx(first.result.seconds, abs=0.5)


def fast_order(seed: int) -> Any:
    """An LM that answers in another order every time."""
    return kit.shuffled_lm(seed)


@pytest.mark.parametrize("seed", range(4))
def test_without_deterministic_the_recorded_order_of_events_goes_on(tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    for attempt in range(2):
        folder = tmp_path / str(attempt)
        program, events, asked = None, [], []
        while program is None:
            lm = fast_order(moments.randrange(1000))
            with killed_after(moments.choice([moments.randrange(10, 250), 10_000])):
                optimizer, program = compiled(folder, None, lm=lm, deterministic=False)
            asked += [str(one) for one in kit.requests_of(lm)]
            if folder.exists():
                found = [(entry["machine"], entry["event"]) for entry in entries(folder, "event")]
                assert found[: len(events)] == events, "what happened stays as it happened"
                events = found
        assert len(entries(folder, "rollout")) == optimizer.result.metric_calls <= 120
        assert sum(row.calls for row in optimizer.result.workers) == optimizer.result.metric_calls
        again, same = compiled(folder, None, lm=(lm := fast_order(7)), deterministic=False)
        assert kit.calls_of(lm) == 0
        assert steady(again.result) == steady(optimizer.result)
        assert kit.state_of(same) == kit.state_of(program)


def test_missing_rollouts_and_lost_workers_are_repeated_as_they_were(tmp_path: Path) -> None:
    def faulty(messages: Any) -> Any:
        if kit.number_in(messages) % 2:
            raise dspy.lm15.ServerError("down")
        return kit.stairs(1)(messages)

    data = kit.examples(60)
    student = dspy.Predict(kit.Sort)

    def go(folder: Path, lm: Any, deterministic: bool) -> Any:
        workers = [
            Worker("good", [one for one in data if not int(one.message.split()[1]) % 2]),
            Worker("bad", [one for one in data if int(one.message.split()[1]) % 2]),
        ]
        optimizer = kit.optimizer(
            workers=workers,
            instructions=kit.texts_for(student),
            run_dir=folder,
            resume=True,
            deterministic=deterministic,
        )
        with dspy.context(lm=lm):
            optimizer.compile(student)
        return optimizer.result

    for deterministic in (True, False):
        folder, lm = tmp_path / str(deterministic), kit.make_lm(faulty)
        for line in (40, 70, 110, 140):
            with killed_after(line):
                go(folder, lm, deterministic)
        first = go(folder, lm, deterministic)
        calls = kit.calls_of(lm)
        assert first.workers[1].set_aside and not first.workers[0].set_aside
        assert steady(go(folder, lm, deterministic)) == steady(first) and kit.calls_of(lm) == calls


def test_traces_and_proposals_are_not_paid_for_again(tmp_path: Path) -> None:
    def propose(messages: Any) -> str:
        return '{"new_instructions": "Look at the number. ' + str(len(messages[-1]["content"])) + '"}'

    options = {"instructions": None, "bootstrap": True, "budget": Budget(metric_calls=150)}
    texts, outcomes = [], []
    for folder, deaths in (("a", ()), ("b", (12, 20, 24, 30, 60))):
        lm, proposer = kit.make_lm(kit.stairs(2)), kit.make_lm(propose)
        for line in (*deaths, None):
            with killed_after(line):
                optimizer, program = compiled(
                    tmp_path / folder, None, kit.TwoSteps(), lm=lm, proposer=proposer, **options
                )
        rollouts = entries(tmp_path / folder, "rollout")
        assert any(entry.get("trace") for entry in rollouts)
        texts.append(
            [(entry["predictor"], entry["texts"]) for entry in entries(tmp_path / folder, "instructions")]
        )
        outcome = steady(optimizer.result), kit.state_of(program)
        outcomes.append(outcome)
        before = kit.calls_of(lm), kit.calls_of(proposer)
        compiled(tmp_path / folder, None, kit.TwoSteps(), lm=lm, proposer=proposer, **options)
        assert (kit.calls_of(lm), kit.calls_of(proposer)) == before
    assert outcomes[0] == outcomes[1]
    assert texts[0] == texts[1] and len(texts[0]) == 2


def test_a_raised_budget_goes_on_where_the_smaller_one_ended(tmp_path: Path) -> None:
    for deterministic in (True, False):
        folder = tmp_path / str(deterministic)
        lm = kit.make_lm(kit.stairs(1))
        compiled(folder, None, lm=lm, deterministic=deterministic, budget=Budget(metric_calls=60))
        first = kit.calls_of(lm)
        more, _ = compiled(folder, None, lm=lm, deterministic=deterministic, budget=Budget(metric_calls=120))
        # Where the run goes another way, a worker may get what the other one paid for: both journals then have it.
        calls, paid = kit.calls_of(lm), [one for one in entries(folder, "rollout") if not one.get("shared")]
        keys = [entry["key"] for entry in paid]
        assert 40 < first <= 60 < more.result.metric_calls <= calls <= 120
        assert len(keys) == len(set(keys)) == calls, "what was paid for is used"
        again, _ = compiled(folder, None, lm=lm, deterministic=deterministic, budget=Budget(metric_calls=120))
        assert kit.calls_of(lm) == calls and steady(again.result) == steady(more.result)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_raised_budget_survives_a_death_at_any_moment(tmp_path: Path, deterministic: bool) -> None:
    def go(folder: Path, calls: int) -> Any:
        budget = Budget(metric_calls=calls)
        return compiled(folder, kit.stairs(1), deterministic=deterministic, budget=budget)

    for lines in (0, 1, 3, 4, 5, 20, 60):
        folder = tmp_path / str(lines)
        go(folder, 60)
        with killed_after(lines):
            go(folder, 120)
        optimizer, program = go(folder, 120)
        assert program is not None and 60 < optimizer.result.metric_calls <= 120
        again, same = go(folder, 120)
        assert steady(again.result) == steady(optimizer.result)
        assert kit.state_of(same) == kit.state_of(program)


def test_a_worker_that_is_well_again_under_a_raised_budget_stays_so_after_a_death(tmp_path: Path) -> None:
    asked = 0

    def recovering(messages: Any) -> Any:
        nonlocal asked
        asked += 1
        if 35 < asked <= 35 + down:
            raise dspy.lm15.ServerError("down")
        return kit.stairs(1)(messages)

    def go(folder: Path, calls: int) -> Any:
        lms = [kit.scripted_lm(script, name=name, temperature=0.0) for name, script in scripts.items()]
        workers = [
            Worker(name, kit.examples(60, start), lm=lm)
            for name, start, lm in zip(scripts, (0, 60), lms, strict=True)
        ]
        options: dict[str, Any] = {"workers": workers, "deterministic": False}
        optimizer, _ = compiled(folder, None, lm=lms[0], budget=Budget(metric_calls=calls), **options)
        return optimizer.result

    scripts = {"well": kit.stairs(1), "recovering": recovering}
    down = 1000
    first = go(tmp_path, 100)
    assert first.workers[1].set_aside and entries(tmp_path, "worker_failed")
    down, seen = 0, []

    def is_after_the_turn(entry: dict[str, Any]) -> bool:
        seen.append(entry["kind"])
        return "rewind" in seen and len(seen) - seen.index("rewind") > 2

    with killed_before(is_after_the_turn) as lost:
        go(tmp_path, 160)
    assert lost
    assert not go(tmp_path, 160).workers[1].set_aside


def test_what_a_proposer_spent_keeps_its_name(tmp_path: Path) -> None:
    def propose(messages: Any) -> str:
        return '{"new_instructions": "Look at the number."}'

    options: dict[str, Any] = {"instructions": None, "budget": Budget(metric_calls=60, lm_calls=500)}
    spent = []
    for _ in range(2):
        optimizer, _ = compiled(tmp_path, kit.stairs(1), proposer=kit.make_lm(propose, "p"), **options)
        spent.append({name: line["attempts"] for name, line in optimizer.result.spending.items()})
    assert spent[0] == spent[1] and spent[0]["proposer"] > 0


def test_a_run_of_something_else_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    compiled(tmp_path, kit.stairs(1))

    def other_metric(gold: Any, prediction: Any) -> bool:
        return not kit.metric(gold, prediction)

    with pytest.raises(ResumeError) as caught:
        compiled(tmp_path, kit.stairs(1), dspy.ChainOfThought(kit.Sort), metric=other_metric, seed=3)
    text = "; ".join(caught.value.differences)
    assert "the metric" in text and "the program" in text and "settings.seed was 0 and is 3" in text
    compiled(tmp_path, kit.stairs(1), metric=other_metric, resume=False)  # a new run may be anything


@pytest.mark.parametrize("change", [{"name": "b"}, {"temperature": 0.5}, {"api_base": "http://b.test/v1"}])
def test_another_lm_of_a_worker_is_refused_with_its_name(tmp_path: Path, change: dict[str, Any]) -> None:
    def go(name: str = "a", temperature: float = 0.0, **settings: Any) -> None:
        lms = [
            kit.scripted_lm(script, name=one, temperature=it) for one, it in (("a", 0.0), (name, temperature))
        ]
        lms[
            1
        ].kwargs |= settings  # an LM with an engine of its own takes no address, and this one is never called
        workers = [Worker("eu", kit.examples(30), lm=lms[0]), Worker("us", kit.examples(30, 100), lm=lms[1])]
        compiled(tmp_path, None, lm=lms[0], workers=workers, budget=Budget(metric_calls=40))

    script = Asked(kit.stairs(1))
    go()
    count = len(script.prompts)
    with pytest.raises(ResumeError) as caught:
        go(**change)
    assert caught.value.differences == ("the LM of worker 'us' changed (model, endpoint or sampling)",)
    assert len(script.prompts) == count


@pytest.mark.parametrize("deterministic", [True, False])
def test_after_a_raise_the_budget_of_before_is_refused(tmp_path: Path, deterministic: bool) -> None:
    def go(calls: int) -> None:
        budget = Budget(metric_calls=calls)
        compiled(tmp_path, kit.stairs(1), deterministic=deterministic, budget=budget)

    go(60)
    go(90)
    with pytest.raises(ResumeError, match=r"Budget\(metric_calls=60\) is below the 90 of before"):
        go(60)
    go(90)


def test_workers_in_another_order_are_refused(tmp_path: Path) -> None:
    workers = [Worker("eu", kit.examples(30)), Worker("us", kit.examples(30, 100))]
    compiled(tmp_path, kit.stairs(1), workers=workers, budget=Budget(metric_calls=40))
    with pytest.raises(
        ResumeError, match=r"the order of the workers was \['eu', 'us'\] and is \['us', 'eu'\]"
    ):
        compiled(tmp_path, kit.stairs(1), workers=workers[::-1], budget=Budget(metric_calls=40))


def test_rollouts_that_a_dying_machine_lost_are_taken_from_the_servers_journal(tmp_path: Path) -> None:
    """Without ``fsync`` the disk may keep one journal's end and not the other's."""
    for deterministic in (True, False):
        folder, asked = tmp_path / str(deterministic), Asked(kit.stairs(1))
        with killed_after(160):
            compiled(folder, asked, deterministic=deterministic)
        before = len(asked.prompts)
        worker = folder / "runs" / "0001" / "workers" / "worker-2.jsonl"
        worker.write_bytes(b"".join(worker.read_bytes().splitlines(keepends=True)[:4]))
        over = sum(
            outcome["score"] is not None  # what the search had not begun as the race began is none
            for one in entries(folder, "event")
            if "outcomes" in one["event"]
            for row in one["event"]["outcomes"]
            for outcome in row
        )
        optimizer, _ = compiled(folder, asked, deterministic=deterministic)
        again = len(asked.prompts) - before
        assert optimizer.result is not None and again <= optimizer.result.metric_calls - over


def test_an_event_that_happens_otherwise_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with killed_after(160):
        compiled(tmp_path, kit.stairs(1))
    for path in (tmp_path / "runs" / "0001" / "workers").iterdir():
        lines = path.read_bytes().splitlines(keepends=True)
        again = [json.loads(line)["entry"] for line in lines]
        changed = [one | {"score": 1.0 - one["score"]} if "score" in one else one for one in again]
        path.write_bytes(b"".join(encode_line(number, one) for number, one in enumerate(changed)))
    with pytest.raises(
        JournalError, match=r"event \d+ of the recorded run does not happen again.*without resume=True"
    ):
        compiled(tmp_path, kit.stairs(1))


def test_bad_settings_are_refused_before_any_call(tmp_path: Path) -> None:
    for setting in ("resume", "fsync"):
        with pytest.raises(ConfigurationError, match=f"{setting}=True needs the run_dir"):
            kit.optimizer(**{setting: True})
    for run_dir, said in (
        (5, "run_dir=5 must be the path"),
        (b"runs", "must be the path"),
        (" ", "names no folder"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            kit.optimizer(run_dir=run_dir)
    asked = Asked(kit.stairs(1))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match="is a file"):
        compiled(file, asked)
    compiled(tmp_path / "d", asked)
    count = len(asked.prompts)
    manifest = {"package": "x", "fingerprints": {}, "budget": {}}
    holder = RunDirectory(tmp_path / "d", resume=False, manifest=manifest)
    with pytest.raises(JournalError, match="in use by process"):
        compiled(tmp_path / "d", asked)
    holder.close()
    assert len(asked.prompts) == count


def test_a_metric_error_lets_the_run_dir_go(tmp_path: Path) -> None:
    def broken(gold: Any, prediction: Any) -> None:
        return None

    for _ in range(2):
        with pytest.raises(Exception, match="metric"):
            compiled(tmp_path, kit.stairs(1), metric=broken)
