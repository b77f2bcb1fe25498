"""LMs and engines that can be called plainly only: programs run in threads for them, or the compile refuses at once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Worker
from asyndbt_dspy.lms.attempts import answers_async
from asyndbt_dspy.lms.scripted import ScriptedEngine
from asyndbt_dspy.programs.proposals import propose_instructions


class Own(dspy.BaseLM):
    """A client of somebody's own, as DSPy's documentation has it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(model="own/m", cache=False, **settings)

    def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        message = SimpleNamespace(content=kit.stairs(1)(messages), tool_calls=None)
        choices = [SimpleNamespace(message=message, finish_reason="stop")]
        return SimpleNamespace(choices=choices, usage={}, model=self.model)


class OwnAsync(Own):
    async def aforward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        return self.forward(prompt, messages, **options)


def plain_lm(script: Any = None) -> dspy.LM:
    return dspy.LM("plain/m", engine=ScriptedEngine(script or kit.stairs(1), True), cache=False)


def compiled(student: dspy.Module, workers: list[Worker]) -> AsynDBT:
    optimizer = AsynDBT(
        kit.metric,
        workers=workers,
        budget=Budget(metric_calls=80),
        instructions={name: [kit.MAGIC] for name, _ in student.named_predictors()},
        progress=False,
    )
    with dspy.context(adapter=dspy.JSONAdapter()):
        optimizer.compile(student)
    return optimizer


def test_which_lms_answer_on_the_event_loop() -> None:
    assert [answers_async(lm) for lm in (Own(), OwnAsync(), plain_lm(), kit.color_lm())] == [
        False,
        True,
        False,
        True,
    ]
    assert answers_async(dspy.LM("openai/m"))


@pytest.mark.parametrize("lm", [Own(), plain_lm()])
def test_a_program_that_could_be_awaited_is_called_plainly_for_them(lm: Any) -> None:
    workers = [
        Worker("plain", kit.examples(30), lm=lm),
        Worker("both", kit.examples(30, 30), lm=kit.color_lm()),
    ]
    result = compiled(dspy.Predict(kit.Sort), workers).result
    assert [one.failed for one in result.workers] == [0, 0] and result.workers[0].calls > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"lm": plain_lm(), "requests_per_minute": 60_000},
        {"lm": [plain_lm(), kit.color_lm()]},
        {"lm": [kit.color_lm(), plain_lm()]},
        {"lm": Own(), "requests_per_minute": 60_000},
        {"lm": Own(num_ctx=512), "requests_per_minute": 60_000},
        {"lm": OwnAsync(), "requests_per_minute": 60_000},
        {"lm": OwnAsync(num_ctx=512), "requests_per_minute": 60_000},
    ],
)
def test_metered_and_behind_one_another_they_stay_what_they_are(settings: dict[str, Any]) -> None:
    result = compiled(dspy.Predict(kit.Sort), [Worker("w", kit.examples(60), **settings)]).result
    assert result.workers[0].failed == 0 and result.workers[0].calls > 40


def test_a_predictors_own_lm_counts_as_well() -> None:
    student = dspy.ChainOfThought(kit.Sort)
    student.predict.lm = plain_lm()
    result = compiled(student, [Worker("w", kit.examples(60), lm=kit.color_lm())]).result
    assert result.workers[0].failed == 0 and result.workers[0].calls > 40


def test_what_can_only_be_awaited_is_refused_before_any_call() -> None:
    def script(messages: Any) -> str:
        raise AssertionError("called")

    with pytest.raises(
        ConfigurationError, match=r"worker 'w': the LM 'plain/m' has no async side, and AsyncOnly has"
    ):
        compiled(kit.AsyncOnly(), [Worker("w", kit.examples(30), lm=plain_lm(script))])
    hedged = Worker("w", kit.examples(30), lm=[kit.color_lm(), plain_lm(script)], hedge_after_s=1.0)
    with pytest.raises(ConfigurationError, match=r"'plain/m' has no async side.*leave hedge_after_s out"):
        compiled(dspy.Predict(kit.Sort), [hedged])


def test_a_proposer_may_be_one_of_them() -> None:
    written = ScriptedEngine(lambda messages: '{"new_instructions": "Sort by who must act."}', True)
    lm = dspy.LM("plain/m", engine=written, cache=False)
    with dspy.context(adapter=dspy.JSONAdapter()):
        found = asyncio.run(propose_instructions(dspy.Predict(kit.Sort), "self", lm=lm, count=1))
    assert found == ["Sort by who must act."]
