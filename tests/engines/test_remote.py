"""A worker's host and its stand-ins, without a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import enum
import json
from decimal import Decimal
from typing import Any

import dspy
import numpy as np
import pydantic
import pytest
import ray_hosts as hosts

from asyndbt_dspy import (
    AsynDBT,
    Budget,
    ConfigurationError,
    MetricError,
    ProgramFailedError,
    RolloutHost,
    Worker,
    scripted_lm,
)
from asyndbt_dspy.lms.callers import calling_as
from asyndbt_dspy.lms.identity import is_deterministic, lm_identity
from asyndbt_dspy.remote import RemoteLM, RemoteRunner, elsewhere


class Channel:
    """Calls hosts of this process; the first answers of a call can be lost on the way back."""

    recover_s = 1.0

    def __init__(self, host: RolloutHost, lost: int = 0) -> None:
        self.host = host
        self.lost = lost
        self.payloads: list[str] = []

    async def start(self, workers: Any) -> None: ...

    async def call(self, worker: str, method: str, payload: str) -> str:
        while True:
            self.payloads.append(payload)
            answer = await getattr(self.host, method)(payload)
            if not self.lost:
                return str(answer)
            self.lost -= 1

    def stop(self) -> None: ...


class Counted:
    def __init__(self, script: Any = hosts.answer) -> None:
        self.calls = 0
        self.script = script

    def __call__(self, messages: Any) -> Any:
        self.calls += 1
        return self.script(messages)


def host_with(script: Any, metric: Any = hosts.metric, count: int = 0) -> RolloutHost:
    return RolloutHost(
        dspy.Predict(hosts.Sort),
        metric,
        lm=scripted_lm(script, name="colors"),
        examples=hosts.examples(count),
        adapter=dspy.JSONAdapter(),
    )


def runner(channel: Channel, repeatable: bool = True, timeout_s: float = 60.0) -> RemoteRunner:
    names = frozenset({"w"} if repeatable else ())
    return RemoteRunner(channel, failure_score=0.0, repeatable=names, timeout_s=timeout_s)


def run(one: RemoteRunner, number: int = 0, trace: bool = False, program: Any = None) -> Any:
    with calling_as("w"):
        return asyncio.run(
            one.run(program or dspy.Predict(hosts.Sort), hosts.examples(1, number)[0], trace=trace)
        )


@pytest.mark.parametrize("count", [0, 1])
def test_an_answer_that_was_lost_on_its_way_is_not_paid_for_again(count: int) -> None:
    script = Counted()

    async def go() -> Any:
        channel = Channel(host_with(script, count=count), lost=2)
        with calling_as("w"):
            return await runner(channel).run(dspy.Predict(hosts.Sort), hosts.examples(1)[0])

    assert asyncio.run(go()).score == 1.0
    assert script.calls == 1


def test_instructions_and_demos_arrive() -> None:
    seen: list[Any] = []

    def script(messages: Any) -> str:
        seen.append(messages)
        return hosts.answer(messages)

    program = dspy.Predict(hosts.Sort)
    program.signature = program.signature.with_instructions("Do it well.")
    program.demos = [dspy.Example(message="item 7", label="green", augmented=True)]
    found = run(runner(Channel(host_with(script))), 2, trace=True, program=program)
    assert "Do it well." in seen[0][0]["content"]
    assert any("item 7" in one["content"] for one in seen[0])
    [(predictor, inputs, prediction)] = found.trace
    assert predictor is program
    assert inputs == {"message": "item 2"}
    assert prediction.label == hosts.COLORS[2] or found.score == 0.0


class Team(enum.Enum):
    BILLING = "billing"


class Order(pydantic.BaseModel):
    item: str


@pytest.mark.parametrize("adapter", [dspy.JSONAdapter(), dspy.ChatAdapter()])
@pytest.mark.parametrize(
    "value",
    [
        Team.BILLING,
        datetime.date(2020, 1, 2),
        Decimal("1.10"),
        np.int64(3),
        np.float32(0.5),
        np.array([1, 2]),
        {1, 2},
        (1, 2),
        ["a", "b"],
        {"team": Team.BILLING, "orders": [Order(item="lamp")]},
        Order(item="lamp"),
        dspy.Example(a=1),
        dspy.Image(url="https://example.com/a.png"),
        float("nan"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_demos_of_any_type_prompt_there_as_they_do_here(value: Any, adapter: dspy.Adapter) -> None:
    seen: list[Any] = []

    def script(messages: Any) -> str:
        seen.append(messages)
        return hosts.answer(messages)

    def program() -> dspy.Predict:
        return dspy.Predict(hosts.Sort)

    changed = program()
    changed.demos = [
        dspy.Example(message=value, label=value, augmented=True),
        dspy.Example(message="item 7", label="green"),
    ]
    lm = scripted_lm(script, name="colors")
    with dspy.context(lm=lm, adapter=adapter):
        # What the LM says fits one adapter only; its prompt is what counts.
        with contextlib.suppress(Exception):
            changed(message="item 0")
        here = seen[:]
        run(runner(Channel(RolloutHost(program(), hosts.metric, lm=lm, adapter=adapter))), program=changed)
    assert here and seen[len(here)] == here[0]
    assert len(here[0]) == 6, "system, two demos, question"


def test_training_data_and_traces_of_a_predictor_stay_here() -> None:
    program = dspy.Predict(hosts.Sort)
    program.train, program.traces = [object()], [object()]
    assert run(runner(Channel(host_with(hosts.answer))), program=program).score == 1.0


def test_a_repeated_rollout_is_made_again_where_scores_are_noisy_and_remembered_where_not() -> None:
    for repeatable, calls in ((True, 1), (False, 3)):
        script = Counted()

        async def go(repeatable: bool = repeatable, script: Counted = script) -> None:
            one = runner(Channel(host_with(script)), repeatable)
            with calling_as("w"):
                for _ in range(3):
                    await one.run(dspy.Predict(hosts.Sort), hosts.examples(1)[0])

        asyncio.run(go())
        assert script.calls == calls


def test_failures_keep_their_kind_and_are_tried_again() -> None:
    answers = iter([dspy.lm15.RateLimitError("slow down"), None])

    def script(messages: Any) -> str:
        error = next(answers, None)
        if error is not None:
            raise error
        return hosts.answer(messages)

    async def go() -> list[Any]:
        one = runner(Channel(host_with(script)))
        with calling_as("w"):
            return [await one.run(dspy.Predict(hosts.Sort), hosts.examples(1)[0]) for _ in range(2)]

    first, second = asyncio.run(go())
    assert (first.score, first.failure.value) == (None, "transient")
    assert "slow down" in first.error
    assert second.score == 1.0


def test_a_metric_that_returns_nothing_ends_the_run_as_it_does_here() -> None:
    with pytest.raises(MetricError, match="returned"):
        run(runner(Channel(host_with(hosts.answer, metric=lambda gold, prediction: None))))


def test_a_metric_that_only_raises_ends_the_compile_as_it_does_here() -> None:
    def misspelt(gold: Any, prediction: Any) -> bool:
        return bool(gold.lable == prediction.label)

    script = Counted()
    channel = Channel(host_with(script, metric=misspelt))
    workers = [Worker("w", hosts.examples(40))]
    optimizer = AsynDBT(misspelt, workers=workers, engine=channel, max_errors=5, progress=False)
    with dspy.context(adapter=dspy.JSONAdapter()), pytest.raises(ProgramFailedError, match="lable"):
        optimizer.compile(dspy.Predict(hosts.Sort))
    assert 5 <= script.calls <= 5 + 8


def test_a_stand_in_has_the_identity_of_its_lm_and_answers_nothing() -> None:
    host = host_with(hosts.answer)
    described = json.loads(asyncio.run(host.describe("")))
    lm = RemoteLM("w", described)
    assert lm_identity(lm) == lm_identity(host.lm)
    assert is_deterministic(lm) == is_deterministic(host.lm)
    with pytest.raises(ConfigurationError, match="the LM of worker 'w' is on its node"):
        lm("question")


def test_an_example_that_json_cannot_carry_is_to_be_loaded_there() -> None:
    example = dspy.Example(message=object(), label="red").with_inputs("message")
    with calling_as("w"), pytest.raises(ConfigurationError, match="let the setup load it"):
        asyncio.run(runner(Channel(host_with(hosts.answer))).run(dspy.Predict(hosts.Sort), example))


@pytest.mark.parametrize("value", [(1, 2), hosts.examples(1)[0], float("nan")])
def test_a_value_that_would_arrive_as_something_else_is_to_be_loaded_there(value: Any) -> None:
    example = dspy.Example(message=value, label="red").with_inputs("message")
    with calling_as("w"), pytest.raises(ConfigurationError, match=r"'message': .* let the setup load it"):
        asyncio.run(runner(Channel(host_with(hosts.answer))).run(dspy.Predict(hosts.Sort), example))


class Hanging(dspy.Module):
    """Its first call never ends."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(hosts.Sort)
        self.seen = Seen()

    async def aforward(self, message: str) -> dspy.Prediction:
        self.seen.calls += 1
        if self.seen.calls == 1:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self.seen.ended += 1
        return await self.sort.acall(message=message)


class Seen:
    """Shared by all copies of a program."""

    def __init__(self) -> None:
        self.calls = self.ended = 0

    def __deepcopy__(self, memo: Any) -> Seen:
        return self


def test_a_rollout_that_hangs_is_ended_where_it_is_made_and_asked_again() -> None:
    program = Hanging()
    host = RolloutHost(program, hosts.metric, lm=scripted_lm(hosts.answer), adapter=dspy.JSONAdapter())

    async def go() -> list[Any]:
        # Time stands still but while the first call hangs, so that neither is late because the machine is busy.
        now = 0.0
        asyncio.get_running_loop().time = lambda: now  # type: ignore[method-assign]
        one = runner(Channel(host), timeout_s=0.05)
        with calling_as("w"):
            first = asyncio.ensure_future(one.run(program, hosts.examples(1)[0]))
            while not program.seen.calls:
                await asyncio.sleep(0)
            now = 1.0
            return [await first, await one.run(program, hosts.examples(1)[0])]

    first, second = asyncio.run(go())
    assert (first.score, first.failure.value, first.error) == (None, "transient", "no answer within 0.05 s")
    assert second.score == 1.0
    assert (program.seen.calls, program.seen.ended) == (2, 1)


def test_a_call_that_nobody_waits_for_any_more_ends_and_one_that_is_awaited_goes_on() -> None:
    program = Hanging()
    host = RolloutHost(program, hosts.metric, lm=scripted_lm(hosts.answer), adapter=dspy.JSONAdapter())

    async def go() -> None:
        one = runner(Channel(host))
        with calling_as("w"):
            asked = [asyncio.ensure_future(one.run(program, hosts.examples(1)[0])) for _ in range(2)]
            while not program.seen.calls:
                await asyncio.sleep(0)
            asked[0].cancel()
            await asyncio.wait([asked[0]])
            assert (program.seen.calls, program.seen.ended) == (1, 0)
            asked[1].cancel()
            await asyncio.wait([asked[1]])
            while not program.seen.ended:
                await asyncio.sleep(0)
            assert (await one.run(program, hosts.examples(1)[0])).score == 1.0
        assert program.seen.calls == 2

    asyncio.run(go())


class Odd(dspy.Module):
    """Its trace holds something that JSON cannot carry."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict("message -> label")

    async def aforward(self, message: str) -> dspy.Prediction:
        found = await self.sort.acall(message=message)
        dspy.settings.trace[-1] = (self.sort, {"message": object()}, found)
        return found


def test_a_trace_that_cannot_travel_costs_its_demo_and_not_its_worker() -> None:
    host = RolloutHost(Odd(), hosts.metric, lm=scripted_lm(hosts.answer), adapter=dspy.JSONAdapter())
    found = run(runner(Channel(host)), 0, trace=True, program=Odd())
    assert (found.score, found.trace) == (1.0, [])


def compared(setup: RolloutHost, metric: Any = hosts.metric, program: Any = None) -> None:
    worker = Worker("w", hosts.examples(4))
    asyncio.run(
        elsewhere(
            Channel(setup),
            Budget(metric_calls=9),
            program or dspy.Predict(hosts.Sort),
            None,
            [worker],
            metric,
        )
    )


def test_both_sides_must_have_one_program_and_one_prompt_format(caplog: pytest.LogCaptureFixture) -> None:
    with dspy.context(adapter=dspy.JSONAdapter()):
        compared(host_with(hosts.answer))
        assert not caplog.records
        other = type("Sort", (dspy.Signature,), {"__annotations__": {}, "__doc__": "Sort."})
        with pytest.raises(ConfigurationError, match="other predictors or signatures"):
            compared(host_with(hosts.answer), program=dspy.Predict(other))
        compared(host_with(hosts.answer, metric=lambda gold, prediction: 1.0))
        assert "metric of worker 'w' is another one" in caplog.text
    with pytest.raises(ConfigurationError, match="adapter JSONAdapter, and the compile with ChatAdapter"):
        compared(host_with(hosts.answer))


def test_a_program_class_of_a_script_is_that_of_the_module_on_the_node() -> None:
    here = Hanging()
    there = RolloutHost(Hanging(), hosts.metric, lm=scripted_lm(hosts.answer), adapter=dspy.JSONAdapter())
    home = Hanging.__module__
    described = asyncio.run(there.describe(""))
    try:
        Hanging.__module__ = "__main__"
        there.describe = lambda payload: _ready(described)  # type: ignore[method-assign, assignment]
        with dspy.context(adapter=dspy.JSONAdapter()):
            compared(there, program=here)
    finally:
        Hanging.__module__ = home


async def _ready(text: str) -> str:
    return text


def test_where_scores_are_noisy_every_time_is_a_draw_of_its_own_also_after_a_restart() -> None:
    script = Counted()
    channel = Channel(host_with(script))
    program, example = dspy.Predict(hosts.Sort), hosts.examples(1)[0]

    async def ask(one: RemoteRunner, times: int) -> None:
        with calling_as("w"):
            await asyncio.gather(*(one.run(program, example) for _ in range(times)))

    def process() -> RemoteRunner:
        return RemoteRunner(channel, failure_score=0.0, repeatable=frozenset(), run_id="run")

    asyncio.run(ask(process(), 2))
    assert script.calls == 2, "two at a time are two draws"
    again = process()
    with calling_as("w"):
        again.note_paid(program, example)  # the journal has the first; nobody heard of the second
    asyncio.run(ask(again, 1))
    assert script.calls == 2
    asyncio.run(ask(again, 1))
    assert script.calls == 3
