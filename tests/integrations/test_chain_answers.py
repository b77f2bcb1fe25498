"""What a chain's predictors give: to the steps behind them, and to demos."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import dspy
import pytest
from langchain_asyndbt import to_program
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate

from asyndbt_dspy.deploy import save_artifact

PROMPT = ChatPromptTemplate([("system", "Name the mood."), ("human", "{text}")])


class Verbose(BaseChatModel):
    """Answers with all that a provider sends beside the text, its ids new each time."""

    numbers: Any = None

    @property
    def _llm_type(self) -> str:
        return "verbose"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        number = next(self.numbers)
        message = AIMessage(
            content=[{"type": "text", "text": "warm"}, {"type": "reasoning", "signature": f"sig-{number}"}],
            tool_calls=[{"name": "note", "args": {"mood": "warm"}, "id": f"call-{number}"}],
            additional_kwargs={"reasoning_content": "the customer said please"},
            response_metadata={"headers": {"organization": "acme-internal", "x-request-id": f"req-{number}"}},
            usage_metadata={"input_tokens": 1, "output_tokens": 1, "total_tokens": 2},
        )
        return ChatResult(generations=[ChatGeneration(message=message)])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_message_is_a_demo_by_its_text_and_tool_calls_and_whole_for_the_next_step(
    asynchronous: bool, tmp_path: Any
) -> None:
    received: list[AIMessage] = []

    def text_of_it(message: AIMessage) -> str:
        received.append(message)
        return message.content[0]["text"]

    program = to_program(PROMPT | Verbose(numbers=itertools.count()) | text_of_it)
    with dspy.context(trace=[]):
        for _ in range(2):
            answer = asyncio.run(program.acall(text="t")) if asynchronous else program(text="t")
            assert answer.output == "warm"
        first, second = (prediction["prompt_output"] for _, _, prediction in dspy.settings.trace)
    numbers = [message.response_metadata["headers"]["x-request-id"] for message in received]
    assert numbers == ["req-0", "req-1"], "the step behind it gets all that the model said"
    assert first == second, "equal answers are equal demos"
    assert first.content == "warm"
    assert [(call["name"], call["args"]) for call in first.tool_calls] == [("note", {"mood": "warm"})]
    program.prompt.demos = [dspy.Example(text="t", prompt_output=first)]
    folder = save_artifact(program, tmp_path / "a")
    written = "".join(file.read_text() for file in folder.iterdir())
    assert "warm" in written
    assert not [text for text in ("acme-internal", "req-", "sig-", "call-", "please") if text in written]
    shown = program.to_chain().first.messages
    assert [message.content for message in shown[1:3]] == ["t", "warm"]
