"""Answers of LMs of the older kind, in whatever objects they come."""

from __future__ import annotations

import asyncio
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import dspy
import pytest
from dspy.lm15 import request_from_openai_chat
from litellm import ModelResponse

from asyndbt_dspy.lms.legacy_engines import as_body, legacy_engines


@dataclass(slots=True)
class Choice:
    message: Any
    finish_reason: str = "length"


class Slotted:
    __slots__ = ("choices", "model", "usage")

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


Message = namedtuple("Message", "role content")
BODY = {
    "choices": [{"message": {"role": "assistant", "content": "red"}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    "model": "own/m",
}
ANSWERS = [
    BODY,
    ModelResponse(**BODY),
    SimpleNamespace(
        choices=(Choice(Message("assistant", "red")),), usage=BODY["usage"], model="own/m", _raw=object()
    ),
    Slotted(**BODY),
]


class Own(dspy.BaseLM):
    def __init__(self, answer: Any) -> None:
        super().__init__(model="own/m", cache=False)
        self.answer = answer

    def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        return self.answer

    async def aforward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_may_be_any_object(answer: Any) -> None:
    request = request_from_openai_chat({"model": "own/m", "messages": [{"role": "user", "content": "?"}]})
    engine, async_engine = legacy_engines(Own(answer), is_async=True)
    for response in (engine.complete(request), asyncio.run(async_engine.complete(request))):
        assert (response.text, response.finish_reason) == ("red", "length")
        assert (response.usage.input_tokens, response.usage.output_tokens) == (3, 2)


def test_an_engine_that_is_not_async_is_none() -> None:
    assert legacy_engines(Own("?"), is_async=False)[1] is None


def test_a_body_is_dicts_lists_and_plain_values() -> None:
    assert as_body(ANSWERS[2]) == as_body(ANSWERS[3]) == BODY
    assert as_body(BODY) == BODY and as_body(ANSWERS[1]) is ANSWERS[1]
    assert as_body({"logprobs": None, "n": [1, 2.5, True, "a", b"b"]}) == {
        "logprobs": None,
        "n": [1, 2.5, True, "a", b"b"],
    }
