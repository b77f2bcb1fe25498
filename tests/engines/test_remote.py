"""A worker's host and its stand-ins, without a cluster."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import dspy
import pytest
import ray_hosts as hosts

from asyndbt_dspy import ConfigurationError, MetricError, RolloutHost, scripted_lm
from asyndbt_dspy.lms.callers import calling_as
from asyndbt_dspy.lms.identity import is_deterministic, lm_identity
from asyndbt_dspy.remote import RemoteLM, RemoteRunner


class Channel:
    """Calls hosts of this process; the first answers of a call can be lost on the way back."""

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


def runner(channel: Channel, repeatable: bool = True) -> RemoteRunner:
    return RemoteRunner(channel, failure_score=0.0, repeatable=frozenset({"w"} if repeatable else ()))


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
