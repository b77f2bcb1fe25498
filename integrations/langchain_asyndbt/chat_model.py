"""``to_chat_model``: any DSPy LM, the local one included, as a LangChain chat model."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import dspy
from dspy import lm15

# The settings by which DSPy tells connection from generation; the import fails if DSPy moves them.
from dspy.clients.backend_selection import CLIENT_KEYS
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import ConfigDict

from langchain_asyndbt.failures import as_langchain_errors
from langchain_asyndbt.messages import chunk_of, from_response, to_request
from langchain_asyndbt.own_loop import from_own_loop
from langchain_asyndbt.tracing import TRACED_SETTING

# Settings of a `dspy.LM` that are for DSPy, not for the model.
DSPY_KEYS = CLIENT_KEYS | {"n", "num_generations", "rollout_id", "prompt_cache", "cache", "num_retries"}
# What callers of LangChain models pass along for tracing or for other providers' clients.
IGNORED_OPTIONS = frozenset(
    {"ls_structured_output_format", "strict", "parallel_tool_calls", "stream", "stream_usage"}
)


class DSPyChatModel(BaseChatModel):
    """A LangChain chat model that asks a DSPy LM.

    Attributes:
        lm: The LM; limits, ledger, retries and cache are those it has.
        temperature: Overrides the LM's.
        max_tokens: Overrides the LM's.
        stop: Stop texts of every call.
    """

    lm: Any
    temperature: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @property
    def _llm_type(self) -> str:
        return "dspy"

    @property
    def model_name(self) -> str:
        """The LM's model string."""
        return str(self.lm.model)

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name, "temperature": self.temperature, "max_tokens": self.max_tokens}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "dspy"
        params["ls_model_name"] = str(kwargs.get("model") or self.model_name)
        return params

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools; ``tool_choice``: a tool's name, ``"auto"``, ``"any"``, ``"required"`` or ``"none"``."""
        converted = [convert_to_openai_tool(tool) for tool in tools]
        choice = _openai_choice(tool_choice, converted)
        return super().bind(tools=converted, **({"tool_choice": choice} if choice else {}), **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers that fit ``schema``.

        Args:
            schema: A Pydantic model, a TypedDict or a JSON schema with a title.
            include_raw: Also return the message and the parsing error.
            method: ``"json_schema"`` (the LM is held to the schema where it can), ``"function_calling"`` or
                ``"json_mode"``.
            **kwargs: ``strict`` is accepted.
        """
        if method == "function_calling":
            name = convert_to_openai_tool(schema)["function"]["name"]
            model = self.bind_tools(
                [schema],
                tool_choice=name,
                ls_structured_output_format={"kwargs": {"method": method}, "schema": schema},
            )
            is_model = isinstance(schema, type) and is_basemodel_subclass(schema)
            parser: Runnable[Any, Any] = (
                PydanticToolsParser(tools=[schema], first_tool_only=True)
                if is_model
                else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
            )
        elif method in ("json_schema", "json_mode"):
            model = self.bind(
                response_format=_response_format(schema, method),
                ls_structured_output_format={"kwargs": {"method": method}, "schema": schema},
            )
            is_model = isinstance(schema, type) and is_basemodel_subclass(schema)
            parser = PydanticOutputParser(pydantic_object=schema) if is_model else JsonOutputParser()
        else:
            raise ValueError(f"method must be json_schema, function_calling or json_mode, got {method!r}")
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(
            parsed=(lambda answer: answer["raw"]) | parser, parsing_error=lambda _: None
        )
        unparsed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([unparsed], exception_key="parsing_error")

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        lm, request = self._request(messages, stop, kwargs)
        with as_langchain_errors():
            return _result(_ask(lm, request))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        lm, request = self._request(messages, stop, kwargs)
        with as_langchain_errors():
            return _result(await _asked(lm, request))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        lm, request = self._request(messages, stop, kwargs)
        with as_langchain_errors():
            if not can_stream(lm, asynchronous=True):
                yield _chunk(chunk_of(from_response(await _asked(lm, request))))
                return
            async for chunk in _streamed(lm, request):
                yield _chunk(chunk)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        lm, request = self._request(messages, stop, kwargs)
        with as_langchain_errors():
            if not can_stream(lm, asynchronous=True):
                yield _chunk(chunk_of(from_response(_ask(lm, request))))
                return
            for chunk in from_own_loop(lambda: _streamed(lm, request)):
                yield _chunk(chunk)

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]
    ) -> tuple[dspy.BaseLM, lm15.Request]:
        """The LM to ask (another one where a call names another ``model``) and the request."""
        given = {name: value for name, value in options.items() if name not in IGNORED_OPTIONS}
        model = given.pop("model", None)
        lm = self.lm.copy(model=model) if model and model != self.lm.model else self.lm
        settings = getattr(lm, "kwargs", None) or {}
        own = {name: value for name, value in settings.items() if name not in DSPY_KEYS}
        mine = {"temperature": self.temperature, "max_tokens": self.max_tokens, "stop": self.stop}
        merged = {**own, **{n: v for n, v in mine.items() if v is not None}, **given}
        if stop is not None:
            merged["stop"] = stop
        return lm, to_request(messages, lm.model, merged)


def to_chat_model(lm: dspy.BaseLM, **options: Any) -> DSPyChatModel:
    """A LangChain chat model that asks ``lm``: sync, async, streaming, tools and structured output.

    Args:
        lm: Any DSPy LM.
        **options: ``temperature``, ``max_tokens``, ``stop`` and those of LangChain's models (``tags``, …).
    """
    return DSPyChatModel(lm=lm, **options)


def can_stream(lm: Any, *, asynchronous: bool) -> bool:
    """Whether DSPy can stream from ``lm``: its own engines do, one's own engine must have ``stream``."""
    spec = getattr(lm, "engine", None)
    if isinstance(spec, str):
        return True
    # DSPy has no public name for the async half of the pair; the streaming tests fail if it moves.
    engine = getattr(lm, "_async_engine_spec", None) if asynchronous else spec
    return callable(getattr(engine, "stream", None))


def _ask(lm: dspy.BaseLM, request: lm15.Request) -> lm15.Response:
    with dspy.context(**{TRACED_SETTING: True}):
        return lm(request)


async def _asked(lm: dspy.BaseLM, request: lm15.Request) -> lm15.Response:
    with dspy.context(**{TRACED_SETTING: True}):
        return await lm.acall(request)


class _Pipe:
    """What DSPy sends the pieces of a stream to. No task group: its scope must not span the caller's tasks."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()

    async def send(self, piece: Any) -> None:
        await self.pieces.put(piece)


async def _streamed(lm: dspy.BaseLM, request: lm15.Request) -> AsyncIterator[AIMessageChunk]:
    """DSPy's stream of one call: text as it comes, then what else the response holds."""
    pipe, ended = _Pipe(), object()

    async def call() -> lm15.Response:
        try:
            with dspy.context(send_stream=pipe, caller_predict=None, **{TRACED_SETTING: True}):
                return await lm.acall(request)
        finally:
            await pipe.send(ended)

    task = asyncio.create_task(call())
    shown = ""
    try:
        while (piece := await pipe.pieces.get()) is not ended:
            text = _text_of_piece(piece)
            if text:
                shown += text
                yield AIMessageChunk(content=text)
        last = chunk_of(from_response(await task))
    finally:
        task.cancel()
    whole = last.content if isinstance(last.content, str) else ""
    # An answer from DSPy's cache was never streamed.
    last.content = whole[len(shown) :] if whole.startswith(shown) else ""
    yield last


def _text_of_piece(piece: Any) -> str:
    choices = getattr(piece, "choices", None)
    delta = getattr(choices[0], "delta", None) if choices else None
    content = delta.get("content") if isinstance(delta, dict) else getattr(delta, "content", None)
    return content or ""


def _chunk(message: AIMessageChunk) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=message)


def _result(response: lm15.Response) -> ChatResult:
    message = from_response(response)
    info = {"finish_reason": message.response_metadata["finish_reason"]}
    return ChatResult(generations=[ChatGeneration(message=message, generation_info=info)])


def _openai_choice(choice: Any, tools: list[dict[str, Any]]) -> Any:
    if not choice:
        return None
    if choice is True or choice in ("any", "required"):
        return "required"
    names = [tool["function"]["name"] for tool in tools if "function" in tool]
    if isinstance(choice, str) and choice in names:
        return {"type": "function", "function": {"name": choice}}
    if isinstance(choice, dict) or choice in ("auto", "none"):
        return choice
    raise ValueError(f"tool_choice must be auto, any, required, none or one of {names}, got {choice!r}")


def _response_format(schema: dict[str, Any] | type, method: str) -> dict[str, Any]:
    if method == "json_mode":
        return {"type": "json_object"}
    # Strict: without it the schema allows further keys, and a small LM goes on writing them.
    converted = {
        key: value for key, value in convert_to_json_schema(schema, strict=True).items() if key != "strict"
    }
    name = re.sub(r"\W", "_", str(converted.get("title", "answer")))
    return {"type": "json_schema", "json_schema": {"name": name, "schema": converted, "strict": True}}


__all__ = ["DSPyChatModel", "can_stream", "to_chat_model"]
