"""A LangChain model as a DSPy LM: messages, tools, structured output, usage, streams and errors."""

from __future__ import annotations

import asyncio
import copy
from typing import Any, Literal

import dspy
import pytest
from dspy import lm15
from langchain_asyndbt import langchain_lm, to_chat_model
from langchain_asyndbt.messages import from_request, from_response, to_openai, to_request, to_response
from langchain_core import exceptions as lc
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import RunnableLambda
from scripted_chat import chat_lm

from asyndbt_dspy.errors import ConfigurationError


class Failing(BaseChatModel):
    errors: list[Any]
    calls: int = 0

    @property
    def _llm_type(self) -> str:
        return "failing"

    def _generate(
        self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> ChatResult:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return ChatResult(generations=[ChatGeneration(message=AIMessage("[[ ## answer ## ]]\nfine"))])


class Status(Exception):
    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(f"status {status}")
        self.status_code = status
        self.response = type("Response", (), {"headers": headers or {}, "status_code": status})()


class Coded(Exception):
    """As Google's clients raise them."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Throttled(Exception):
    """As botocore raises them."""

    def __init__(self) -> None:
        super().__init__("slow down")
        self.response = {"Error": {"Code": "said"}, "ResponseMetadata": {"HTTPStatusCode": 429}}


def wrapped(error: Exception) -> Exception:
    """As an integration raises it anew."""
    outer = RuntimeError("error calling the model")
    outer.__cause__ = error
    return outer


RETRIED = [
    lc.ModelRateLimitError("429"), lc.ModelTimeoutError("slow"), lc.ModelConnectionError("gone"),
    lc.ModelAPIError("500"), TimeoutError("slow"), ConnectionError("gone"), Status(429), Status(503), Status(408),
    Coded(429), Coded(503), Throttled(), wrapped(Coded(429)),
]  # fmt: skip
FINAL = {
    dspy.LMAuthError: [
        lc.ModelAuthenticationError("401"),
        lc.ModelPermissionDeniedError("403"),
        Status(401),
        Coded(403),
    ],
    dspy.LMInvalidRequestError: [lc.ModelInvalidRequestError("400"), Status(422)],
    dspy.LMUnsupportedModelError: [lc.ModelNotFoundError("404")],
    dspy.ContextWindowExceededError: [lc.ContextOverflowError("long")],
    dspy.LMBillingError: [Status(402)],
    dspy.utils.exceptions.LMUnexpectedError: [ValueError("a bug")],
}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspy.clients.execution._delay", lambda error, attempt: 0.0)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("error", RETRIED, ids=repr)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_can_be_retried_is_retried_by_dspy(error: Exception, asynchronous: bool) -> None:
    model = Failing(errors=[error, error])
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=langchain_lm(model, num_retries=2)):
        found = asyncio.run(program.acall(question="q")) if asynchronous else program(question="q")
    assert found.answer == "fine"
    assert model.calls == 3


@pytest.mark.parametrize(
    ("kind", "error"), [(kind, error) for kind, errors in FINAL.items() for error in errors]
)
def test_what_cannot_be_retried_is_not(kind: type[Exception], error: Exception) -> None:
    model = Failing(errors=[error])
    with dspy.context(lm=langchain_lm(model, num_retries=2)), pytest.raises(kind):
        dspy.Predict("question -> answer")(question="q")
    assert model.calls == 1


def test_the_time_to_wait_is_passed_on() -> None:
    lm = langchain_lm(Failing(errors=[Status(429, {"retry-after": "7"})]), num_retries=0)
    with pytest.raises(dspy.LMRateLimitError) as failed:
        lm("q")
    assert failed.value.retry_after == 7.0


ERRORS_BACK = {
    lc.ModelRateLimitError: lm15.RateLimitError("x"),
    lc.ModelTimeoutError: lm15.TimeoutError("x"),
    lc.ModelAPIError: lm15.ServerError("x"),
    lc.ModelAuthenticationError: lm15.AuthError("x"),
    lc.ContextOverflowError: lm15.ContextLengthError("x"),
}


@pytest.mark.parametrize(("kind", "error"), ERRORS_BACK.items())
def test_errors_of_a_dspy_lm_are_langchains(kind: type[Exception], error: Exception) -> None:
    def fail(request: Any) -> str:
        raise error

    lm = chat_lm(fail)
    lm.num_retries = 0
    model = to_chat_model(lm)
    for call in (
        lambda: model.invoke("q"),
        lambda: list(model.stream("q")),
        lambda: asyncio.run(model.ainvoke("q")),
    ):
        with pytest.raises(kind):
            call()


class Rate(dspy.Signature):
    """Rate."""

    text: str = dspy.InputField()
    label: Literal["low", "high"] = dspy.OutputField()


def test_structured_output_reaches_the_model_and_back() -> None:
    inner = chat_lm()
    lm = langchain_lm(to_chat_model(inner), supports_response_schema=True)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert dspy.Predict(Rate)(text="t").label == "low"
    assert inner.engine.requests[0].config.response_format["schema"]["properties"]["label"]["enum"] == [
        "low",
        "high",
    ]


def test_tools_reach_the_model_and_back() -> None:
    def look(word: str) -> str:
        """Look up."""
        return word

    inner = chat_lm()
    lm = langchain_lm(to_chat_model(inner).bind(temperature=0.5))
    program = dspy.Predict("question, tools: list[dspy.Tool] -> calls: dspy.ToolCalls")
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter(use_native_function_calling=True)):
        found = program(question="what is x", tools=[dspy.Tool(look)])
    assert found.calls.tool_calls[0].name == "look"
    request = inner.engine.requests[0]
    assert request.tools[0].name == "look"
    assert request.config.temperature == 0.5, "what was bound before is kept"


def test_usage_settings_and_streams() -> None:
    inner = chat_lm(lambda request: "[[ ## answer ## ]]\none two three\n\n[[ ## completed ## ]]")
    lm = langchain_lm(to_chat_model(inner), temperature=0.3, max_tokens=9, stop=["END"])
    program = dspy.Predict("question -> answer")
    with dspy.context(lm=lm):
        assert program(question="q").answer == "one two three"
    config = inner.engine.requests[0].config
    assert (config.temperature, config.max_tokens, config.stop) == (0.3, 9, ("END",))
    assert lm.history[0]["usage"]["completion_tokens"] == 3

    async def pieces() -> list[str]:
        listener = dspy.streaming.StreamListener("answer")
        with dspy.context(lm=lm):
            stream = dspy.streamify(program, stream_listeners=[listener], is_async_program=True)
            return [p.chunk async for p in stream(question="q") if hasattr(p, "chunk")]

    assert "".join(asyncio.run(pieces())).strip() == "one two three"


def test_a_copy_of_a_program_keeps_the_model_and_models_have_no_shared_cache() -> None:
    one, two = (langchain_lm(FakeListChatModel(responses=[f"[[ ## answer ## ]]\n{n}"])) for n in (1, 2))
    assert copy.deepcopy(one).engine is one.engine
    program = dspy.Predict("question -> answer")
    found = []
    for lm in (one, two):
        with dspy.context(lm=lm):
            found.append(program(question="q").answer)
    assert found == ["1", "2"]


def test_only_models_become_lms() -> None:
    with pytest.raises(ConfigurationError, match="RunnableLambda"):
        langchain_lm(RunnableLambda(lambda value: value))


CONVERSATION = [
    SystemMessage("Be {brief}."),
    HumanMessage("hi"),
    AIMessage("", tool_calls=[{"name": "look", "args": {"word": "ü"}, "id": "c1"}]),
    ToolMessage("found", tool_call_id="c1"),
    HumanMessage(
        [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}]
    ),
]


def test_messages_survive_the_way_there_and_back() -> None:
    request = to_request(CONVERSATION, "test/x", {"temperature": 0.1})
    assert to_openai(from_request(request)) == to_openai(CONVERSATION)


def test_responses_survive_the_way_there_and_back() -> None:
    usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    message = AIMessage("text", tool_calls=[{"name": "f", "args": {"a": 1}, "id": "c"}], usage_metadata=usage)
    back = from_response(to_response(message, "m"))
    assert (back.content, back.tool_calls) == (message.content, message.tool_calls)
    assert {k: back.usage_metadata[k] for k in usage} == usage
    assert back.response_metadata["finish_reason"] == "tool_calls"
