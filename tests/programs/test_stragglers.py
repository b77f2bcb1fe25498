"""Calls that take far longer than their like hold nobody up, and are paid for once."""

from __future__ import annotations

import asyncio
from typing import Any

import dspy
import kit
import pytest
from virtual_loop import VirtualLoop, standing_still

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Price, Worker
from asyndbt_dspy.core.messages import Evaluate, Outcome
from asyndbt_dspy.programs.evaluator import ProgramEvaluator, WorkerPart
from asyndbt_dspy.programs.paid_rollouts import RolloutKey
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.programs.slots import build_space
from asyndbt_dspy.programs.stragglers import Stragglers, cancelled
from asyndbt_dspy.recording.recorder import KeysOnly
from asyndbt_dspy.setup_rollouts import Asked, SetupRollouts
from asyndbt_dspy.testing.provider import Call, Fault, Provider


def virtually(coroutine: Any) -> tuple[Any, float]:
    """Result and virtual seconds."""
    loop, errors = VirtualLoop(), []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    try:
        found = loop.run_until_complete(coroutine)
        assert not errors
        return found, loop.time()
    finally:
        loop.run_until_complete(cancelled(asyncio.all_tasks(loop)))
        loop.close()


class Slow:
    """A runner whose rollouts take as long as their example says."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.ended: list[str] = []

    async def run(self, program: Any, example: dspy.Example, **_: Any) -> Rollout:
        self.made.append(example.name)
        await asyncio.sleep(example.seconds)
        self.ended.append(example.name)
        return Rollout(1.0, seconds=example.seconds)

    def close(self) -> None: ...


def evaluator(seconds: list[float], factor: float | None = 8.0) -> tuple[ProgramEvaluator, Slow]:
    examples = [dspy.Example(name=str(place), seconds=one) for place, one in enumerate(seconds)]
    runner = Slow()
    found = ProgramEvaluator(
        build_space(dspy.Predict("question -> answer")),
        {"w": WorkerPart("w", examples, (), max_concurrency=4)},
        runner,
        rollout_timeout_s=1e6,
        straggler_factor=factor,
    )
    found.stragglers = Stragglers(factor, lambda: asyncio.get_running_loop().time())
    return found, runner


class Named(KeysOnly):
    """A book by which a rollout is its example."""

    def __init__(self) -> None:
        super().__init__({})

    def key(self, lm: Any, program: Any, example: dspy.Example) -> RolloutKey:
        return RolloutKey(example.name.encode(), True)


def asked(task: int, *examples: int) -> Evaluate:
    return Evaluate("w", task, ((0,),), (examples,), held_out=False)


USUAL = [0.5] * 8


def test_a_unit_goes_on_without_a_call_that_hangs_and_its_answer_is_there_the_next_time() -> None:
    async def go() -> Any:
        one, runner = evaluator([*USUAL, 6.0])
        loop = asyncio.get_running_loop()
        first = await one.evaluate(asked(1, *range(9)))
        at_s, left = loop.time(), one.left_behind
        await asyncio.sleep(10)
        second = await one.evaluate(asked(2, 8))
        return first, at_s, left, second, runner, one

    (first, at_s, left, second, runner, one), _ = virtually(go())
    assert at_s == pytest.approx(5.0)  # it began at 1.0; eight times the usual half second
    assert first.outcomes[0][8] == Outcome(None)
    assert [outcome.score for outcome in first.outcomes[0][:8]] == [1.0] * 8
    assert (first.calls, left) == (9, 1), "what is left behind is paid for"
    assert second.outcomes[0][0].score == 1.0
    assert (second.calls, one.use("w").calls) == (0, 9)
    assert runner.made.count("8") == 1


def test_a_unit_that_is_ended_keeps_what_is_in_and_nothing_is_answered_afterwards() -> None:
    async def go() -> Any:
        one, runner = evaluator([0.5] * 12)
        unit = asyncio.ensure_future(one.evaluate(asked(1, *range(12))))
        await asyncio.sleep(0.6)  # four are in, four under way
        one.gate.hold("stop")
        await one.gate.drained()
        await one.end_units()
        assert unit.done()
        later = asyncio.ensure_future(one.evaluate(asked(2, 0)))
        await asyncio.sleep(100)
        assert not later.done(), "one that is refused at once would be asked for again and again"
        later.cancel()
        return unit.result(), runner.made

    (scored, made), _ = virtually(go())
    assert [one.score for one in scored.outcomes[0]] == [1.0] * 8 + [None] * 4
    assert scored.calls == len(made) == 8


def test_what_is_asked_again_while_it_is_under_way_is_not_made_twice() -> None:
    async def go() -> Any:
        one, runner = evaluator([*USUAL, 9.0])
        await one.evaluate(asked(1, *range(9)))
        second = await one.evaluate(asked(2, 0, 1, 2, 3, 8))
        return second, runner

    (second, runner), seconds = virtually(go())
    assert second.calls == 0
    assert second.outcomes[0][4] == Outcome(None)
    assert runner.made.count("8") == 1
    assert seconds == pytest.approx(5.0)


def test_a_call_that_goes_on_for_too_long_is_given_up_and_frees_its_place() -> None:
    async def go() -> Any:
        one, runner = evaluator([*USUAL, 1e5])
        await one.evaluate(asked(1, *range(9)))
        await asyncio.sleep(11.9)
        before = one.left_behind
        await asyncio.sleep(0.2)
        return before, one.left_behind, runner

    (before, after, runner), _ = virtually(go())
    assert (before, after) == (1, 0)
    assert "8" not in runner.ended


@pytest.mark.parametrize(("slow", "waits"), [(4, False), (6, True)])
def test_where_more_than_a_third_is_slow_the_endpoint_is_slow(slow: int, waits: bool) -> None:
    async def go() -> Any:
        one, _ = evaluator([*USUAL, *[30.0] * slow])
        return await one.evaluate(asked(1, *range(8 + slow)))

    found, seconds = virtually(go())
    missing = sum(outcome.score is None for row in found.outcomes for outcome in row)
    assert (missing < slow) is waits
    assert (seconds >= 30.0) is waits


def test_where_little_is_known_a_call_is_left_behind_after_ten_seconds() -> None:
    """As in a compile's first rollouts, one for each of a few workers."""

    async def go() -> Any:
        one, _ = evaluator([0.5, 0.5, 60.0], 8.0)
        return await one.evaluate(asked(1, *range(3)))

    found, seconds = virtually(go())
    assert [one.score for one in found.outcomes[0]] == [1.0, 1.0, None]
    assert seconds == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize(("factor", "usual"), [(None, USUAL), (8.0, [])])
def test_all_are_waited_for_where_nothing_is_known_or_it_is_turned_off(
    factor: float | None, usual: list[float]
) -> None:
    async def go() -> Any:
        one, _ = evaluator([*usual, 60.0], factor)
        return await one.evaluate(asked(1, *range(len(usual) + 1)))

    found, seconds = virtually(go())
    assert found.outcomes[0][-1].score == 1.0
    assert seconds >= 60.0


@pytest.mark.parametrize("is_twin", [False, True])
def test_who_waits_for_a_call_that_is_given_up_goes_on_without_it(is_twin: bool) -> None:
    async def go() -> Any:
        one, _ = evaluator([*USUAL, 1e5, 3.0, 3.0, 3.0])
        if is_twin:  # another candidate that is the same program
            one.book = Named()
        await one.evaluate(asked(1, *range(9)))
        await asyncio.sleep(11.0)  # 16 s; what was left behind at 5 s is given up at 17 s
        if is_twin:
            one._left.clear()
        found = await one.evaluate(asked(2, 8, 9, 10, 11))
        return found, asyncio.get_running_loop().time()

    (found, at_s), _ = virtually(go())
    assert [outcome.score for outcome in found.outcomes[0]] == [None, 1.0, 1.0, 1.0]
    assert at_s == pytest.approx(19.0)


def test_what_was_left_behind_has_ended_when_the_evaluator_is_closed() -> None:
    class Slowly(Slow):
        async def run(self, program: Any, example: dspy.Example, **_: Any) -> Rollout:
            try:
                return await super().run(program, example)
            except asyncio.CancelledError:
                await asyncio.sleep(0.3)  # its attempt is booked
                self.ended.append(f"{example.name} cut")
                raise

    async def go() -> Any:
        one, _ = evaluator([*USUAL, 1e5])
        one.runner = runner = Slowly()
        await one.evaluate(asked(1, *range(9)))
        assert one.left_behind == 1
        await one.aclose()
        return one.left_behind, runner.ended[-1]

    assert virtually(go())[0] == (0, "8 cut")


def test_who_is_cancelled_while_waiting_is_cancelled() -> None:
    async def go() -> None:
        one, _ = evaluator([*USUAL, 1e5])
        await one.evaluate(asked(1, *range(9)))
        waiting = asyncio.ensure_future(one.evaluate(asked(2, 8)))
        await asyncio.sleep(1.0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    virtually(go())


def test_a_process_that_stood_still_leaves_nothing_behind() -> None:
    async def unit() -> Any:
        one, _ = evaluator([*USUAL, 1.5, 1.5, 1.5])
        standing_still(1.8, 300.0)
        found = await one.evaluate(asked(1, *range(11)))
        # What hangs afterwards is still found out.
        one.parts["w"].estimate.append(dspy.Example(name="late", seconds=1e6))
        before = asyncio.get_running_loop().time()
        late = await one.evaluate(asked(2, 11))
        return found, late, asyncio.get_running_loop().time() - before

    (found, late, took_s), _ = virtually(unit())
    assert [outcome.score for outcome in found.outcomes[0]] == [1.0] * 11
    assert late.outcomes[0][0].score is None and took_s == pytest.approx(5.0), (
        "its four seconds, and looked at every five"
    )

    async def setup() -> Any:
        (made, wanted), _ = setup_of({"a": [0.5] * 8, "b": [0.5] * 8, "c": [0.9] * 8})
        standing_still(1.5, 300.0)
        return await SetupRollouts(made, Notes()).run("traces", wanted)

    assert all(one is not None for one in virtually(setup())[0])


def test_of_two_workers_one_may_be_gone() -> None:
    async def go() -> Any:
        (made, wanted), _ = setup_of({"a": [0.5] * 8, "gone": [1e6] * 8})
        found = await SetupRollouts(made, Notes()).run("traces", wanted)
        return found, asyncio.get_running_loop().time()

    (found, at_s), _ = virtually(go())
    assert [one is not None for one in found] == [True] * 8 + [False] * 8
    assert at_s == pytest.approx(5.0), "done at 1 s, and eight times half a second more"


def test_short_calls_are_worth_a_second() -> None:
    async def go() -> Any:
        one, _ = evaluator([0.001] * 8 + [0.9])
        return await one.evaluate(asked(1, *range(9)))

    assert virtually(go())[0].outcomes[0][8].score == 1.0


def test_a_compile_with_calls_that_never_return_ends_and_keeps_to_its_budget() -> None:
    """Real time, over a socket: one call in twenty hangs, in setup, search and race; each would cost its 20 s."""

    def hangs(call: Call) -> Fault:
        return Fault("never") if call.number % 20 == 19 else Fault()

    with Provider(kit.stairs(1), fault=hangs) as provider:
        lm = dspy.LM(
            "openai/m", api_base=provider.url, api_key="k", cache=False, temperature=0.0, max_tokens=50
        )
        workers = [
            Worker(name, kit.examples(40, 100 * place), lm=lm) for place, name in enumerate(("a", "b"))
        ]
        student = dspy.Predict(kit.Sort)
        optimizer = kit.optimizer(
            workers=workers,
            deterministic=False,
            budget=Budget(metric_calls=200),
            rollout_timeout_s=20.0,
            mode="instructions",
            instructions=kit.texts_for(student, kit.MAGIC),
            prices={"openai/m": Price(prompt=1.0, completion=1.0)},
        )
        with dspy.context(adapter=dspy.JSONAdapter()):
            program = optimizer.compile(student)
    assert optimizer.result.seconds < 20.0
    assert program.signature.instructions == kit.MAGIC
    assert 120 < optimizer.result.metric_calls <= 200
    lines = list(optimizer.result.spending.values())
    sent = sum(line["attempts"] for line in lines)
    ended = sum(line["answers"] + line["refused"] + line["cut"] for line in lines)
    assert sent == ended == provider.attempts, "what hung until the end is cut off before the result is made"
    assert sum(line["cut"] for line in lines) > 0


class Notes:
    """A ``SetupBook`` in memory."""

    def __init__(self) -> None:
        self.kept: Any = None

    def setup(self) -> Any:
        return self.kept

    def keep_setup(self, found: Any) -> None:
        self.kept = found


def setup_of(seconds: dict[str, list[float]], factor: float | None = 8.0) -> tuple[Any, Any]:
    """The setup's rollouts of workers whose calls take so long, four in flight each; the runner."""
    made, runner = evaluator([], factor)
    made.parts = {name: WorkerPart(name, (), (), max_concurrency=4) for name in seconds}
    asked = [
        Asked(name, dspy.Predict("question -> answer"), dspy.Example(name=f"{name}{place}", seconds=one))
        for name, all_of_it in seconds.items()
        for place, one in enumerate(all_of_it)
    ]
    return (made, asked), runner


def test_the_setup_does_not_wait_for_all_of_a_slow_worker_and_what_never_began_costs_nothing() -> None:
    async def go() -> Any:
        (made, asked), runner = setup_of({"a": [0.5] * 12, "b": [0.5] * 12, "slow": [5.0] * 12})
        setup, loop = SetupRollouts(made, Notes()), asyncio.get_running_loop()
        found = await setup.run("traces", asked)
        at_s, calls = loop.time(), setup.close()
        await asyncio.sleep(60.0)  # whatever was left and not dropped would be made by then
        return found, runner, at_s, calls

    (found, runner, at_s, calls), _ = virtually(go())
    # The others are done at 1.5 s. Eight times their usual half second later four of the slow one's would be nearly back.
    assert at_s == pytest.approx(5.5)
    assert [one is not None for one in found] == [True] * 28 + [False] * 8
    assert len(runner.made) == 32 == calls, "four are under way and paid for, four were never made"


def test_a_call_of_the_setup_that_hangs_is_left_when_it_took_too_long_and_not_later() -> None:
    async def go() -> Any:
        (made, asked), _ = setup_of({"a": [1e6] + [0.5] * 39, "b": [0.5] * 40, "c": [0.5] * 40})
        found = await SetupRollouts(made, Notes()).run("traces", asked)
        return found, asyncio.get_running_loop().time()

    (found, at_s), _ = virtually(go())
    # Half of the workers are done at 5 s, and the others might have until 10 s. The last answer is in at 6.5 s.
    assert at_s == pytest.approx(6.5, abs=1e-3)
    assert [place for place, one in enumerate(found) if one is None] == [0]


def test_a_setup_that_was_over_counts_for_as_many_calls_when_the_run_goes_on() -> None:
    (made, _), _ = setup_of({"a": [0.5] * 12})
    notes = Notes()
    notes.keep_setup({"asked": {"traces": 12}, "in_time": {"traces": [0]}, "calls": 12})
    assert SetupRollouts(made, notes).close() == 12


@pytest.mark.parametrize(
    ("seconds", "factor"),
    [
        ({"only": [0.5] * 60}, 8.0),
        ({"a": [0.5] * 6, "b": [1.5] * 6}, 8.0),
        ({"a": [0.5] * 80, "b": [0.5] * 80, "slower": [0.9] * 80}, 8.0),  # done at 10 and at 18 s
        ({"a": [0.5] * 4, "b": [0.5] * 4, "c": [0.5] * 4, "slow": [30.0] * 4}, None),
    ],
    ids=["one worker", "a little slower", "as much time again", "deterministic"],
)
def test_the_setup_waits_for_all_where_nobody_is_far_behind(
    seconds: dict[str, list[float]], factor: float | None
) -> None:
    async def go() -> Any:
        (made, asked), _ = setup_of(seconds, factor)
        return await SetupRollouts(made, Notes()).run("traces", asked)

    assert all(one is not None for one in virtually(go())[0])


def test_a_factor_that_leaves_everything_behind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"straggler_factor=1.0 must be > 1, or None"):
        AsynDBT(kit.metric, straggler_factor=1.0)
