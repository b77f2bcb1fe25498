"""Shards, what is shared between them, and what is kept back for the race."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Sequence
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, MetricError, Worker
from asyndbt_dspy.compilation import prepare
from asyndbt_dspy.core.messages import encode
from asyndbt_dspy.engines.protocols import SERVER

SECRET = "hunter2"


class Seen:
    """A metric that notes on which items each program was scored."""

    def __init__(self) -> None:
        self.numbers: list[str] = []

    def __call__(self, gold: Any, prediction: Any) -> bool:
        self.numbers.append(gold.message)
        return kit.metric(gold, prediction)


def prepared(optimizer: AsynDBT, trainset: Any, valset: Any = None, lm: Any = None) -> Any:
    """The parts of a compile, before the search."""
    import asyncio

    async def build() -> Any:
        run = await prepare(optimizer, dspy.Predict(kit.Sort), trainset, None, valset)
        await run.aclose()
        return run

    with dspy.context(lm=lm or kit.color_lm()):
        return asyncio.run(build())


def messages(examples: Sequence[dspy.Example]) -> set[str]:
    return {one.message for one in examples}


@pytest.mark.parametrize("workers", [1, 3, 4])
def test_a_number_of_workers_splits_the_trainset_by_label(workers: int) -> None:
    run = prepared(kit.optimizer(workers=workers), kit.examples(84))
    parts = [list(shard.worker.trainset) for shard in run.shards]
    assert len(parts) == workers
    assert sorted(one.message for part in parts for one in part) == sorted(messages(kit.examples(84)))
    for part in parts:
        counts = [sum(one.label == label for one in part) for label in kit.LABELS]
        assert max(counts) - min(counts) <= 1
    names = [shard.worker.name for shard in run.shards]
    assert len(set(names)) == workers


def test_default_workers_are_for_what_a_valset_leaves_and_may_take_over_from_each_other() -> None:
    run = prepared(kit.optimizer(workers=None), kit.examples(18), kit.examples(12, start=500))
    assert [len(shard.worker.trainset) for shard in run.shards] == [6, 6, 6]
    run = prepared(kit.optimizer(workers=None), kit.examples(80))
    assert [shard.group for shard in run.shards] == ["trainset"] * 3


def test_a_shard_key_keeps_examples_of_one_key_together() -> None:
    def customer(one: dspy.Example) -> int:
        return int(one.message.split()[1]) // 20

    optimizer = kit.optimizer(workers=2, shard_key=customer)
    run = prepared(optimizer, kit.examples(80))
    keys = [{customer(one) for one in shard.worker.trainset} for shard in run.shards]
    assert len(keys) == 2
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == {0, 1, 2, 3}


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("mode", ["both", "instructions"])
def test_no_example_of_an_estimate_or_a_demo_is_raced_on(preset: Any, mode: Any) -> None:
    options: dict[str, Any] = {"config": {"race": True, "race_fraction": 0.3}} if preset == "paper" else {}
    run = prepared(kit.optimizer(preset=preset, mode=mode, **options), kit.examples(80))
    for shard in run.shards:
        used, raced = messages(shard.estimate) | messages(shard.pool), messages(shard.held_out)
        assert not used & raced
        assert used | raced == messages(shard.worker.trainset)
        assert len(raced) == 12, "24 of 80 examples, from both workers alike"
        assert len(shard.held_out) == len(raced)
    part = run.evaluator.parts[run.shards[0].worker.name]
    own, everybody = run.shards[0].held_out, [one for shard in run.shards for one in shard.held_out]
    assert tuple(part.held_out[: len(own)]) == own
    assert messages(part.held_out) == messages(everybody), "of one trainset: it may take over from the others"
    assert messages(part.estimate) == messages(run.shards[0].estimate)


def test_the_race_runs_on_the_valset_and_the_search_does_not() -> None:
    metric = Seen()
    optimizer = kit.optimizer(metric=metric, workers=2)
    valset = kit.examples(12, start=500)
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(48), valset=valset)
    raced = [number for number, name in enumerate(metric.numbers) if int(name.split()[1]) >= 500]
    assert raced, "the race ran"
    assert all(int(name.split()[1]) >= 500 for name in metric.numbers[raced[0] :]), "and came last"
    assert optimizer.result.candidates[0].examples == 12
    run = prepared(kit.optimizer(workers=2), kit.examples(48), valset)
    assert [len(shard.held_out) for shard in run.shards] == [6, 6]
    assert sum(len({*messages(one.estimate), *messages(one.pool)}) for one in run.shards) == 48


def test_a_workers_own_valset_is_raced_on_by_that_worker() -> None:
    own = kit.examples(6, start=500)
    workers = [Worker("a", kit.examples(24), valset=own), Worker("b", kit.examples(24, start=24))]
    run = prepared(kit.optimizer(workers=workers), None)
    assert messages(run.shards[0].held_out) == messages(own)
    assert len(run.shards[1].held_out) == 12, "half of its own"
    assert messages(run.shards[1].held_out) <= messages(workers[1].trainset)


def test_a_candidate_is_never_scored_on_an_example_that_it_shows() -> None:
    """A shard too small to part demos from estimates."""
    shown_and_asked: list[str] = []

    def script(request: list[dict[str, str]]) -> str:
        asked = kit.number_in(request)
        demos = "".join(one["content"] for one in request[:-1] if one["role"] == "user")
        if f"item {asked}\n" in demos:
            shown_and_asked.append(f"item {asked}")
        return kit.stairs(1)(request)

    lm = kit.make_lm(script)
    workers = [Worker("a", kit.examples(12)), Worker("b", kit.examples(12, start=12))]
    with dspy.context(lm=lm):
        kit.optimizer(workers=workers).compile(dspy.Predict(kit.Sort))
    assert any(one["role"] == "assistant" for request in kit.requests_of(lm) for one in request), (
        "demos were shown"
    )
    assert shown_and_asked == []


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_class_that_a_shard_lacks_is_filled_by_what_others_share(preset: Any) -> None:
    reds = [one for one in kit.examples(90) if one.label == "red"]
    others = [one for one in kit.examples(90) if one.label != "red"]
    workers = [Worker("reds", reds), Worker("others", others)]
    run = prepared(kit.optimizer(preset=preset, workers=workers), None)
    for member in run.server.members:
        for block, allowed in zip(run.programs.space.upper, member.allowed, strict=True):
            if block.kind == "demo":
                homes = {block.arms[arm].home for arm in allowed if arm}
                owner = "reds" if block.stratum == "red" else "others"
                assert homes == {owner}, (member.name, block.stratum)


def test_a_class_that_nobody_shares_stays_empty() -> None:
    reds = [one for one in kit.examples(90) if one.label == "red"]
    others = [one for one in kit.examples(90) if one.label != "red"]
    workers = [Worker("reds", reds, share_demos=False), Worker("others", others)]
    run = prepared(kit.optimizer(workers=workers), None)
    others_allowed = run.server.members[1].allowed
    for block, allowed in zip(run.programs.space.upper, others_allowed, strict=True):
        if block.stratum == "red":
            assert allowed == (0,)
    kinds = [block.kind for block in run.programs.space.upper]
    assert kinds.count("demo") == 3, "the slot is there, and empty"


def test_demos_of_one_worker_help_the_others() -> None:
    """Merged programs hold demos of several shards."""
    workers = [
        Worker(label, [one for one in kit.examples(120) if one.label == label]) for label in kit.LABELS
    ]
    optimizer = kit.optimizer(workers=workers, mode="demos")
    with dspy.context(lm=kit.color_lm()):
        program = optimizer.compile(dspy.Predict(kit.Sort))
        assert kit.score(program, kit.examples(30, start=300)) == 1.0
    assert len({demo["label"] for demo in program.demos}) >= 2


# ---------------------------------------------------------------------- privacy


def secrets(count: int, start: int = 1000) -> list[dspy.Example]:
    return [
        dspy.Example(
            message=f"{SECRET}-{number} item {number}", label=kit.right_label(number), note=f"{SECRET} note"
        ).with_inputs("message")
        for number in range(start, start + count)
    ]


def angry(messages: list[dict[str, str]]) -> str:
    """Now and then an error that quotes the prompt, else the color script."""
    if kit.number_in(messages) % 5 == 0:
        raise dspy.lm15.RateLimitError(f"slow down: {messages[-1]['content']}")
    if kit.number_in(messages) % 7 == 0:
        return f"no JSON, but {messages[-1]['content']}"
    return kit.stairs(1)(messages)


@pytest.mark.parametrize("kind", ["Predict", "TwoSteps", "ReAct"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_nothing_of_a_private_worker_gets_out(
    kind: str, preset: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="asyndbt_dspy")
    theirs, surrounding = kit.make_lm(angry, "theirs"), kit.color_lm("others")

    def propose(request: list[dict[str, str]]) -> str:
        return kit.answer(request, new_instructions=f"{kit.MAGIC} Answer with a label.")

    proposer = kit.make_lm(propose, "proposer")
    workers = [
        Worker("open", kit.examples(36)),
        Worker("private", secrets(36), lm=theirs, share_demos=False),
        Worker("open too", kit.examples(36, start=36)),
    ]
    optimizer = kit.optimizer(workers=workers, preset=preset, proposer=proposer, progress=True)
    with dspy.context(lm=surrounding):
        program = optimizer.compile(kit.KINDS[kind]())
    use = next(one for one in optimizer.result.workers if one.name == "private")
    assert use.calls > 0
    assert use.missing > 0
    assert SECRET in kit.text_of(theirs), "the worker's own LM sees its examples"
    places = {
        "result": json.dumps(optimizer.result.to_dict()) + str(optimizer.result) + repr(optimizer.result),
        "events": json.dumps([encode(one.event) for one in optimizer.recorded]),
        "server": repr([one.event for one in optimizer.recorded if one.machine == SERVER]),
        "log": "".join(
            one.getMessage() + str(one.exc_text) for one in caplog.records if one.name != "dspy.predict.react"
        ),
        "screen": "".join(capfd.readouterr()),
        "other LMs": kit.text_of(surrounding),
        "proposer": kit.text_of(proposer),
        "program": kit.state_of(program) + repr(program),
        "settings": repr(optimizer.get_params()) + repr(workers),
    }
    assert [place for place, text in places.items() if SECRET in text] == []


def test_the_same_planted_text_of_an_open_worker_is_found() -> None:
    """The control of the test above: without ``share_demos=False`` the secrets do get out."""
    lm = kit.color_lm()
    workers = [Worker("open", kit.examples(36)), Worker("private", secrets(36), lm=kit.color_lm("theirs"))]
    optimizer = kit.optimizer(workers=workers, mode="demos")
    with dspy.context(lm=lm):
        optimizer.compile(dspy.Predict(kit.Sort))
    assert SECRET in kit.text_of(lm)
    assert SECRET in json.dumps(optimizer.result.to_dict())


def test_when_all_workers_are_private_only_instructions_are_searched() -> None:
    workers = [
        Worker(f"w{number}", secrets(36, 1000 + 36 * number), share_demos=False) for number in range(2)
    ]
    student = dspy.Predict(kit.Sort)
    optimizer = kit.optimizer(workers=workers, instructions=kit.texts_for(student, kit.MAGIC))
    with dspy.context(lm=kit.color_lm()):
        program = optimizer.compile(student)
    assert program.signature.instructions == kit.MAGIC
    assert not program.demos
    assert SECRET not in optimizer.result.to_json()


def test_a_private_worker_that_is_set_aside_is_not_quoted(caplog: pytest.LogCaptureFixture) -> None:
    def always(messages: list[dict[str, str]]) -> str:
        raise dspy.lm15.RateLimitError(f"slow down: {messages[-1]['content']}")

    workers = [
        Worker("open", kit.examples(36)),
        Worker("private", secrets(36), lm=kit.make_lm(always), share_demos=False),
    ]
    optimizer = kit.optimizer(workers=workers)
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(dspy.Predict(kit.Sort))
    reason = optimizer.result.workers[1].set_aside
    assert "RateLimitError" in reason
    told = reason + caplog.text + json.dumps([encode(one.event) for one in optimizer.recorded])
    assert SECRET not in told


def test_a_metric_error_on_a_private_example_does_not_quote_it() -> None:
    def metric(gold: Any, prediction: Any) -> Any:
        return None if SECRET in gold.message else kit.metric(gold, prediction)

    workers = [Worker("open", kit.examples(36)), Worker("private", secrets(36), share_demos=False)]
    with (
        dspy.context(lm=kit.color_lm()),
        pytest.raises(MetricError, match="private worker 'private'") as caught,
    ):
        kit.optimizer(workers=workers, metric=metric, budget=Budget(metric_calls=60)).compile(
            dspy.Predict(kit.Sort)
        )
    told = "".join(traceback.format_exception(caught.value))
    assert SECRET not in told
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__
