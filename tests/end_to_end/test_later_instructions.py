"""Instructions that the proposer writes during the search, from what the best candidates got wrong."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import Budget, ConfigurationError, Worker
from asyndbt_dspy.core.messages import StopSearch
from asyndbt_dspy.engines.local import LocalEngine
from asyndbt_dspy.programs.slots import build_space

TRAIN = kit.examples(72)
AT_FIRST = 3
"""Proposals of the setup."""


@pytest.fixture(autouse=True)
def json_prompts() -> Any:
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield


class Proposer:
    """Writes texts that do not help, and the one that does only once it is asked again."""

    def __init__(self, at_first: int = AT_FIRST, later: str = kit.MAGIC) -> None:
        self.asked: list[str] = []
        self.at_first = at_first
        self.later = later

    def __call__(self, messages: list[dict[str, str]]) -> str:
        self.asked.append(messages[-1]["content"])
        number = len(self.asked)
        text = f"Try number {number}." if number <= self.at_first else self.later
        return kit.answer(messages, new_instructions=text)


def metric(gold: Any, prediction: Any) -> dspy.Prediction:
    right = gold.label == prediction.label
    return dspy.Prediction(
        score=float(right), feedback="" if right else f"hint: {gold.message} is {gold.label}"
    )


def optimizer(script: Proposer, **options: Any) -> Any:
    settings = {
        "metric": metric,
        "mode": "instructions",
        "proposer": kit.make_lm(script, "proposer"),
        "instruction_candidates": AT_FIRST,
        "later_instructions": 1,
        "budget": Budget(metric_calls=240),
    }
    return kit.optimizer(**{**settings, **options})


def compiled(made: Any, lm: dspy.LM | None = None, **data: Any) -> Any:
    with dspy.context(lm=lm or kit.color_lm()):
        return made.compile(dspy.Predict(kit.Sort), **(data or {"trainset": TRAIN}))


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_written_during_the_search_joins_and_wins(deterministic: bool) -> None:
    script = Proposer()
    made = optimizer(script, deterministic=deterministic)
    assert compiled(made).signature.instructions == kit.MAGIC
    assert len(script.asked) == AT_FIRST + 1
    asked = script.asked[-1]
    assert "hint: item" in asked, "the metric's feedback on what the search got wrong"
    assert 40 <= steps_before_joining(made) <= 90, "a third of the search's calls, and what was under way"


def steps_before_joining(made: Any) -> int:
    """Rollouts of the search before the arms joined."""
    joined = next(n for n, one in enumerate(made.recorded) if type(one.event).__name__ == "ArmsJoined")
    return sum(one.event.calls for one in made.recorded[:joined] if type(one.event).__name__ == "StepReply")


@pytest.mark.parametrize(
    ("budget", "deterministic"),
    [
        (Budget(lm_calls=240), False),
        (Budget(lm_calls=240, seconds=1e6), False),
        (Budget(metric_calls=10_000, lm_calls=240), False),
        (Budget(metric_calls=10_000, lm_calls=240), True),
    ],
)
def test_whichever_cap_bounds_the_search_the_proposer_is_asked_a_third_in(
    budget: Budget, deterministic: bool
) -> None:
    script = Proposer()
    made = optimizer(script, budget=budget, deterministic=deterministic)
    compiled(made)
    assert len(script.asked) == AT_FIRST + 1
    assert 30 <= steps_before_joining(made) <= 90


def test_where_only_time_bounds_the_search_the_proposer_is_asked_a_third_of_it_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that goes by the LM's calls: a thousand seconds each, three hundred calls in all."""

    def now_s() -> float:
        return 1e3 * kit.calls_of(lm)

    script, lm = Proposer(), kit.color_lm()
    for module in ("compilation", "optimizer"):
        monkeypatch.setattr(f"asyndbt_dspy.{module}.time", SimpleNamespace(perf_counter=now_s))
    engine = LocalEngine(clock=now_s)

    def until_time_is_over(gold: Any, prediction: Any) -> dspy.Prediction:
        if kit.calls_of(lm) == 180:
            engine.stop_search(StopSearch("time"))
        return metric(gold, prediction)

    budget = Budget(seconds=300e3)
    made = optimizer(script, metric=until_time_is_over, budget=budget, deterministic=False, engine=engine)
    compiled(made, lm)
    assert len(script.asked) == AT_FIRST + 1
    assert 40 <= steps_before_joining(made) <= 110


def test_a_slow_proposer_changes_nothing_where_the_run_is_to_be_repeatable() -> None:
    class Slow(kit.AsyncScriptedEngine):
        async def complete(self, request: Any) -> Any:
            for _ in range(300):
                await asyncio.sleep(0)
            return await super().complete(request)

    made = []
    for engine in (kit.AsyncScriptedEngine, Slow):
        script = Proposer()
        made.append(optimizer(script, proposer=kit.lm_over(script, engine(script, True))))
        compiled(made[-1])
    kinds = [[(one.machine, type(one.event).__name__) for one in each.recorded] for each in made]
    assert ("server", "ArmsJoined") in kinds[0]
    assert kinds[0] == kinds[1]


def test_the_best_candidate_is_improved_and_not_the_student() -> None:
    class Halves(Proposer):
        def __call__(self, messages: list[dict[str, str]]) -> str:
            first = kit.MAGIC if not self.asked else "Try again."
            self.asked.append(messages[-1]["content"])
            return kit.answer(messages, new_instructions=first)

    script = Halves()
    made = optimizer(script, instruction_candidates=1, later_instructions=1)
    program = compiled(made)
    assert program.signature.instructions == kit.MAGIC
    assert kit.MAGIC not in script.asked[0] and kit.MAGIC in script.asked[1]


def test_repeats_of_what_is_there_do_not_join() -> None:
    script = Proposer(later="Try number 2.")
    made = optimizer(script)
    compiled(made)
    assert len(script.asked) == AT_FIRST + 1
    [event] = [one.event for one in made.recorded if type(one.event).__name__ == "ArmsJoined"]
    assert event.open == (1 + AT_FIRST,), "what was open before, and nothing more"


@pytest.mark.parametrize("later", ["Try number 2.", kit.MAGIC])
def test_a_search_that_knows_all_asks_for_more_and_ends_if_nothing_comes(later: str) -> None:
    """A third of 4,000 calls is never spent on a shard that is known after some two hundred."""
    script = Proposer(later=later)
    made = optimizer(script, budget=Budget(lm_calls=4_000), mode="instructions", deterministic=False)
    compiled(made)
    assert len(script.asked) == AT_FIRST + 1
    assert len(made.recorded) < 2_000, "no steps for nothing"


class Silent(kit.AsyncScriptedEngine):
    """Answers what is asked at first, and nothing later."""

    def __init__(self, script: Any, do: Any = lambda: None) -> None:
        super().__init__(script, True)
        self.asked, self.do = 0, do

    async def complete(self, request: Any) -> Any:
        self.asked += 1
        if self.asked > AT_FIRST:
            self.do()
            await asyncio.Event().wait()
        return await super().complete(request)


def test_a_proposer_that_is_never_done_holds_up_nobody() -> None:
    script = Proposer()
    silent = Silent(script)
    made = optimizer(script, proposer=kit.lm_over(script, silent), deterministic=False)
    compiled(made)
    assert silent.asked == AT_FIRST + 1
    assert made.result.metric_calls > 100


def test_a_run_that_waits_for_the_proposer_can_be_stopped() -> None:
    """Under ``deterministic=True`` it stands still while the proposer writes."""
    script = Proposer()
    silent = Silent(script, lambda: made.stop())
    made = optimizer(script, proposer=kit.lm_over(script, silent), deterministic=True)
    compiled(made)
    assert silent.asked == AT_FIRST + 1
    assert made.result.stopped == "stopped before its end, with the best so far"


def test_what_private_workers_saw_is_shown_to_nobody() -> None:
    script = Proposer()
    workers = [
        Worker("open", kit.examples(40)),
        Worker("closed", kit.examples(40, start=1000), share_demos=False),
    ]
    compiled(optimizer(script, workers=workers), trainset=None)
    assert len(script.asked) == AT_FIRST + 1
    for asked in script.asked:
        examples, failures = asked.split("[[ ## failures ## ]]")
        assert "item " in examples and "item " in failures and "score 1" not in failures
    assert not any(
        "item 10" in asked.replace("item 10 ", "").replace('item 10"', "") for asked in script.asked
    )


def test_a_refused_proposer_leaves_the_search_as_it_was() -> None:
    script = Proposer()
    made = optimizer(script, budget=Budget(metric_calls=240, lm_calls=60))
    compiled(made)
    assert made.result.metric_calls <= 60


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_that_died_goes_on_with_what_was_written(tmp_path: Path, deterministic: bool) -> None:
    from crashes import entries, killed_after, lines_written, steady

    def run(folder: Path, script: Proposer) -> Any:
        made = optimizer(script, run_dir=folder, resume=True, deterministic=deterministic)
        return made, compiled(made)

    whole, program = run(tmp_path / "whole", Proposer())
    written = lines_written(tmp_path / "whole")
    joins = next(
        place
        for place, entry in enumerate(entries(tmp_path / "whole", "event"))
        if entry["event"]["type"] == "ArmsJoined"
    )
    assert joins > 10
    for lines in range(written // 8, written, written // 8):
        folder, script = tmp_path / str(lines), Proposer()
        with killed_after(lines), contextlib.suppress(BaseException):
            run(folder, script)
        again, same = run(folder, script)
        assert len(script.asked) <= AT_FIRST + 1 + 1, "at most what was not yet written down is asked again"
        [event] = [one for one in entries(folder, "event") if one["event"]["type"] == "ArmsJoined"]
        assert event["event"]["open"] == [AT_FIRST + 2]
        assert same.signature.instructions == kit.MAGIC
        if deterministic:
            assert steady(again.result) == steady(whole.result)
            assert kit.state_of(same) == kit.state_of(program)


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_was_written_before_the_death_is_not_asked_for_again(
    deterministic: bool, tmp_path: Path
) -> None:
    """The process dies between the line with the texts and the one that says that they joined."""
    from crashes import entries, killed_before

    def joins(entry: dict[str, Any]) -> bool:
        return entry["kind"] == "event" and entry["event"]["type"] == "ArmsJoined"

    script, options = Proposer(), {"run_dir": tmp_path, "resume": True, "deterministic": deterministic}
    with killed_before(joins) as deaths, contextlib.suppress(BaseException):
        compiled(optimizer(script, **options))
    assert deaths, "it died at that line"
    assert [one for one in entries(tmp_path, "instructions") if one["predictor"].endswith("(later)")]
    assert not [one for one in entries(tmp_path, "event") if joins(one)]
    assert len(script.asked) == AT_FIRST + 1
    program = compiled(optimizer(script, **options))
    assert program.signature.instructions == kit.MAGIC
    assert len(script.asked) == AT_FIRST + 1


def test_a_predictor_with_texts_of_the_user_gets_no_others() -> None:
    script = Proposer(at_first=AT_FIRST)
    student = kit.TwoSteps()
    made = optimizer(script, instructions={"sort": ["Be quick."]})
    with dspy.context(lm=kit.color_lm(predictors=2)):
        made.compile(student, trainset=TRAIN)
    [event] = [one.event for one in made.recorded if type(one.event).__name__ == "ArmsJoined"]
    assert event.open == (1 + AT_FIRST + 1, 2)
    assert len(script.asked) == AT_FIRST + 1


def test_an_arm_without_a_text_is_the_student_and_is_filled_once() -> None:
    programs = build_space(dspy.Predict(kit.Sort), instructions={"self": ["Be quick."]}, later={"self": 2})
    assert [len(block.arms) for block in programs.space.blocks] == [4]
    assert programs.build((3,), fresh=True).signature.instructions == "Sort the message."
    programs.fill(0, 2, kit.MAGIC)
    programs.fill(0, 2, kit.MAGIC)
    assert programs.build((2,)).signature.instructions == kit.MAGIC
    for arm, text in ((1, "Other."), (2, "Other."), (4, "Other."), (0, "Other.")):
        with pytest.raises(ConfigurationError, match="is not one of its 2 late arms"):
            programs.fill(0, arm, text)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"later_instructions=2 .* needs the proposer"):
        kit.optimizer(later_instructions=2)
    with pytest.raises(ConfigurationError, match=r"later_instructions=-1 must be >= 0"):
        optimizer(Proposer(), later_instructions=-1)

    class Plain:
        async def run(self, *_: Any) -> None: ...

        def stop_search(self, stop: StopSearch) -> None: ...

    with pytest.raises(ConfigurationError, match="Plain has none"):
        optimizer(Proposer(), engine=Plain(), deterministic=False)
