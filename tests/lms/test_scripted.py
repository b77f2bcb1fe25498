"""The scripted LM: a pure function of the request, with the effects and failures that a test wants."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import dspy
import pytest
from dspy import lm15

from asyndbt_dspy.lms.distributions import collect
from asyndbt_dspy.lms.failures import FailureKind, classify
from asyndbt_dspy.lms.scripted import scripted_lm


class Sort(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField()
    label: Literal["yes", "no"] = dspy.OutputField()


def by_word(messages: list[dict[str, str]]) -> str:
    return f"[[ ## label ## ]]\n{'yes' if 'good' in messages[-1]['content'] else 'no'}\n"


def test_it_answers_by_the_request_in_threads_and_tasks() -> None:
    lm = scripted_lm(by_word)
    sort = dspy.Predict(Sort)
    with dspy.context(lm=lm):
        assert sort(message="a good day").label == "yes"
        assert asyncio.run(sort.acall(message="a day")).label == "no"
    assert (lm.engine.calls, len(lm.history)) == (1, 2)


def test_the_script_sees_instructions_demos_and_input() -> None:
    seen: list[list[dict[str, str]]] = []

    def script(messages: list[dict[str, str]]) -> str:
        seen.append(messages)
        return by_word(messages)

    sort = dspy.Predict(Sort)
    sort.demos = [dspy.Example(message="so good", label="yes")]
    with dspy.context(lm=scripted_lm(script)):
        sort(message="a day")
    (messages,) = seen
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user"]
    assert "Sort the message." in messages[0]["content"]
    assert "so good" in messages[1]["content"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (lm15.RateLimitError("busy"), FailureKind.TRANSIENT),
        (lm15.AuthError("key"), FailureKind.ENDPOINT),
        (lm15.ContextLengthError("long"), FailureKind.EXAMPLE),
        (ValueError("a bug in the script"), FailureKind.PROGRAM),
    ],
)
def test_the_script_may_fail_as_a_provider_does(error: Exception, kind: FailureKind) -> None:
    def script(messages: Any) -> str:
        raise error

    with pytest.raises(dspy.LMError) as caught:
        scripted_lm(script)("?")
    assert classify(caught.value) is kind


def test_it_declares_schemas_only_when_asked_to() -> None:
    assert scripted_lm(by_word).supports_response_schema
    assert "response_format" in scripted_lm(by_word).supported_params
    without = scripted_lm(by_word, supports_schema=False)
    assert not without.supports_response_schema
    assert "response_format" not in without.supported_params


def test_it_may_report_a_distribution() -> None:
    lm = scripted_lm(lambda messages: (by_word(messages), {"label": {"yes": 0.2, "no": 0.8}}))
    with dspy.context(lm=lm), collect() as found:
        dspy.Predict(Sort)(message="a day")
    assert found


def test_nothing_is_cached_or_retried_unless_asked_for() -> None:
    lm = scripted_lm(by_word)
    lm("same")
    lm("same")
    assert lm.engine.calls == 2
    assert lm.num_retries == 0


def test_a_copied_program_shares_the_script() -> None:
    program = dspy.Predict(Sort)
    program.lm = scripted_lm(by_word)
    assert program.deepcopy().lm.engine is program.lm.engine
