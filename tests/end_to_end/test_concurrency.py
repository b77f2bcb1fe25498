"""Event loops, several compiles at a time, and runs that can be repeated and replayed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError
from asyndbt_dspy import optimizer as optimizer_module
from asyndbt_dspy.compilation import prepare
from asyndbt_dspy.core.messages import decode, encode
from asyndbt_dspy.engines.protocols import Recorded, replay

TRAIN = kit.examples(60)


def settings(**options: Any) -> AsynDBT:
    student = dspy.Predict(kit.Sort)
    return kit.optimizer(
        budget=Budget(metric_calls=90), instructions=kit.texts_for(student, kit.MAGIC, "Guess."), **options
    )


def outcome(optimizer: AsynDBT, program: dspy.Module) -> str:
    """Everything about a run that must not depend on timing."""
    events = [(one.machine, encode(one.event)) for one in optimizer.recorded]
    found = optimizer.result.to_dict()
    for worker in found["workers"]:
        del worker["busy_s"]
    del found["seconds"]
    return json.dumps([kit.state_of(program), events, found], sort_keys=True)


def compiled(lm: dspy.LM, **options: Any) -> tuple[str, AsynDBT, dspy.Module]:
    optimizer = settings(**options)
    with dspy.context(lm=lm):
        program = optimizer.compile(dspy.Predict(kit.Sort), trainset=TRAIN)
    return outcome(optimizer, program), optimizer, program


def test_compile_works_where_a_loop_runs_and_gives_the_same() -> None:
    alone, _, _ = compiled(kit.color_lm())

    async def notebook_cell() -> str:
        ticks = asyncio.ensure_future(asyncio.sleep(0))
        found, _, _ = compiled(kit.color_lm())
        await ticks
        return found

    assert asyncio.run(notebook_cell()) == alone


def test_errors_reach_the_caller_where_a_loop_runs() -> None:
    async def notebook_cell() -> None:
        settings().compile(dspy.Predict(kit.Sort), trainset=[])

    with pytest.raises(ConfigurationError, match="0 examples"):
        asyncio.run(notebook_cell())


def test_compiling_leaves_dspy_settings_alone() -> None:
    lm = kit.color_lm()
    with dspy.context(lm=lm, trace=[], caller_modules=None):
        before = {
            name: dspy.settings.get(name) for name in ("lm", "adapter", "caller_modules", "usage_tracker")
        }
        settings().compile(dspy.Predict(kit.Sort), trainset=TRAIN)
        assert {name: dspy.settings.get(name) for name in before} == before
        assert dspy.settings.trace == []


@pytest.mark.parametrize("shared_optimizer", [False, True])
def test_two_compiles_of_one_program_at_once_do_not_disturb_each_other(shared_optimizer: bool) -> None:
    student = dspy.Predict(kit.Sort)
    before = kit.state_of(student)
    trainsets = [kit.examples(60), kit.examples(60, start=60)]

    async def one(optimizer: AsynDBT, number: int) -> dspy.Module:
        with dspy.context(lm=kit.shuffled_lm(number)):
            return await optimizer.acompile(student, trainset=trainsets[number])

    alone = [kit.state_of(asyncio.run(one(settings(seed=7), number))) for number in range(2)]

    async def both() -> list[dspy.Module]:
        first = settings(seed=7)
        second = first if shared_optimizer else settings(seed=7)
        return await asyncio.gather(one(first, 0), one(second, 1))

    together = [kit.state_of(program) for program in asyncio.run(both())]
    assert together == alone
    assert alone[0] != alone[1], "otherwise a mix-up would go unseen"
    assert kit.state_of(student) == before


def test_a_deterministic_run_does_not_depend_on_the_order_of_answers() -> None:
    outcomes = {compiled(kit.shuffled_lm(seed))[0] for seed in range(3)}
    assert len(outcomes) == 1


def test_threads_do_not_change_a_deterministic_run() -> None:
    """A program without ``aforward`` runs in threads, whose timing nobody controls."""

    class Plain(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sort = dspy.Predict(kit.Sort)

        def forward(self, message: str) -> dspy.Prediction:
            return self.sort(message=message)

    outcomes = set()
    for _ in range(2):
        optimizer = kit.optimizer(budget=Budget(metric_calls=90), workers=3)
        with dspy.context(lm=kit.color_lm()):
            program = optimizer.compile(Plain(), trainset=TRAIN)
        outcomes.add(outcome(optimizer, program))
    assert len(outcomes) == 1


def test_the_order_of_answers_matters_without_deterministic() -> None:
    """The control of the test above: the orders are really different."""
    options = {"deterministic": False, "workers": 3, "active_workers": 1}
    orders = set()
    for seed in range(3):
        _, optimizer, _ = compiled(kit.shuffled_lm(seed), **options)
        orders.add(tuple(one.machine for one in optimizer.recorded))
    assert len(orders) > 1


def test_another_seed_searches_otherwise() -> None:
    assert compiled(kit.color_lm(), seed=1)[0] != compiled(kit.color_lm(), seed=2)[0]


def fresh_machines(optimizer: AsynDBT) -> Any:
    """Server and workers as a compile builds them, before the first event."""

    async def build() -> Any:
        run = await prepare(optimizer, dspy.Predict(kit.Sort), TRAIN, None, None)
        await run.aclose()
        return run

    with dspy.context(lm=kit.color_lm()):
        return asyncio.run(build())


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_recorded_events_rebuild_server_and_workers(
    preset: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []

    async def watched(self: AsynDBT, *arguments: Any) -> Any:
        runs.append(await prepare(self, *arguments))
        return runs[-1]

    monkeypatch.setattr(optimizer_module, "prepare", watched)
    _, optimizer, _ = compiled(kit.shuffled_lm(3), preset=preset, deterministic=deterministic)
    (ran,) = runs
    monkeypatch.undo()
    written = [json.dumps([one.machine, encode(one.event)]) for one in optimizer.recorded]
    events = [Recorded(machine, decode(event), 0.0) for machine, event in map(json.loads, written)]

    again = fresh_machines(optimizer)
    assert again.server.snapshot() != ran.server.snapshot()
    server, workers = replay(events, again.server, again.workers)
    assert server.snapshot() == ran.server.snapshot()
    assert {name: one.snapshot() for name, one in workers.items()} == {
        one.name: one.snapshot() for one in ran.workers
    }
    assert server.winner == ran.server.winner

    short = fresh_machines(optimizer)
    server, _ = replay(events[:-8], short.server, short.workers)
    assert server.snapshot() != ran.server.snapshot(), "a run without its last events is not equal"
