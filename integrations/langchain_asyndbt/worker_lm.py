"""``langchain_lm``: any LangChain chat model as a DSPy LM."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy import lm15
from langchain_core.language_models import BaseChatModel, BaseLanguageModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.runnables import Runnable, RunnableBinding

from asyndbt_dspy.errors import ConfigurationError
from langchain_asyndbt.failures import as_lm15_errors
from langchain_asyndbt.messages import (
    from_request,
    openai_tools,
    request_options,
    text_of,
    to_response,
    tool_choice,
)
from langchain_asyndbt.model_attempts import AsyncEach, Each, as_raised, taken_apart, with_attempts
from langchain_asyndbt.tracing import child_config

SAMPLING_PARAMS = (
    "temperature",
    "max_tokens",
    "top_p",
    "stop",
    "seed",
    "frequency_penalty",
    "presence_penalty",
)


@dataclass
class ChainCall:
    """One call of a chain's own model, kept as it is.

    DSPy's requests cannot hold everything that LangChain's messages can (names, extra keys), so a chain's own
    messages go around them to the model, and its answer comes back the same way.

    Attributes:
        messages: What the chain sends.
        answer: What the model answered; ``None`` if it was not asked (DSPy's cache, another LM).
    """

    messages: list[BaseMessage]
    answer: Any = field(default=None)


chain_call: ContextVar[ChainCall | None] = ContextVar("langchain_asyndbt_chain_call", default=None)


def langchain_lm(
    chat_model: Runnable[Any, Any],
    *,
    model: str | None = None,
    supports_response_schema: bool | None = None,
    cache: bool = False,
    **options: Any,
) -> dspy.LM:
    """A ``dspy.LM`` that asks a LangChain model, sync and async, with tools, structured output and usage.

    Args:
        chat_model: A chat model, bound or not (``model.bind(…)``, ``model.with_config(…)``). It keeps its own
            retries: set them to 0 (``max_retries=0``), since DSPy retries what can be retried and nobody else sees them.
            Those of ``with_retry`` and the models of ``with_fallbacks`` count against an optimizer's budget, each attempt.
        model: The LM's model string; default ``langchain/<name of the model>``.
        supports_response_schema: Whether the model takes OpenAI's ``response_format`` with a JSON schema;
            default: what the model's profile says, else no.
        cache: DSPy's response cache. Its key knows the model string alone, not the model object: give each
            model its own string before turning it on.
        **options: Of ``dspy.LM``: ``temperature``, ``max_tokens``, ``num_retries``, …

    Raises:
        ConfigurationError: not a LangChain model.
    """
    inner = base_model(chat_model)
    if inner is None:
        raise ConfigurationError(
            f"langchain_lm needs a LangChain model or a binding of one, got {type(chat_model).__name__}; "
            "for a whole chain see optimize_chain"
        )
    profile = getattr(inner, "profile", None) or {}
    if supports_response_schema is None:
        supports_response_schema = bool(profile.get("structured_output"))
    engine = LangChainEngine(chat_model, supports_response_schema)
    return dspy.LM(
        model or f"langchain/{_model_name(inner)}",
        engine=engine,
        async_engine=AsyncLangChainEngine(engine),
        cache=cache,
        **options,
    )


def base_model(runnable: Any) -> BaseLanguageModel[Any] | None:
    """The language model inside bindings, fallbacks and configurable fields, ``None`` if there is none."""
    for _ in range(20):
        if isinstance(runnable, BaseLanguageModel):
            return runnable
        inner = [getattr(runnable, name, None) for name in ("bound", "runnable", "default")]
        runnable = next((item for item in inner if isinstance(item, Runnable)), None)
        if runnable is None:
            return None
    return None


class LangChainEngine:
    """A LangChain model as an engine of DSPy; errors are lm15's.

    One attempt per call, but of a model with retries or fallbacks (``with_retry``, ``with_fallbacks``): who counts attempts
    calls ``complete_each``, in which each of them is made through its ``each``.

    Attributes:
        chat_model: The model that is asked.
        supports_function_calling: Whether it takes tools.
        supports_response_schema: Whether it takes a JSON schema for its answer.
    """

    traces_in_langchain = True

    def __init__(self, chat_model: Runnable[Any, Any], supports_response_schema: bool = False) -> None:
        self.chat_model = chat_model
        inner = base_model(chat_model)
        self.supports_function_calling = (
            isinstance(inner, BaseChatModel) and type(inner).bind_tools is not BaseChatModel.bind_tools
        )
        self.supports_response_schema = supports_response_schema
        tools = ("tools", "tool_choice") if self.supports_function_calling else ()
        schema = ("response_format",) if supports_response_schema else ()
        self.supported_params = frozenset((*SAMPLING_PARAMS, *tools, *schema))

    def __deepcopy__(self, memo: dict[int, Any]) -> LangChainEngine:
        # A program that is copied keeps the one model, with its connection and its limits.
        return self

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Ask, with the model's retries and fallbacks."""
        model, messages, options = self._prepared(request)
        with as_lm15_errors(), _counted_outside():
            return self._finished(model.invoke(messages, child_config(), **options), request)

    def check_attempts(self) -> None:
        """Raise ``ConfigurationError`` where the attempts within a call cannot be told apart."""
        taken_apart(self.chat_model, lambda model: model)

    def complete_each(self, request: lm15.Request, each: Each) -> lm15.Response:
        """``complete``, with every attempt made through ``each``."""
        model, messages, options = self._prepared(request)
        apart = with_attempts(model, each, lambda answer: to_response(_as_message(answer), request.model))
        with as_lm15_errors(), _counted_outside(), as_raised():
            return self._finished(apart.invoke(messages, child_config(), **options), request)

    async def acomplete_each(self, request: lm15.Request, each: AsyncEach) -> lm15.Response:
        """``complete_each`` on the event loop."""
        model, messages, options = self._prepared(request)
        apart = with_attempts(model, each, lambda answer: to_response(_as_message(answer), request.model))
        with as_lm15_errors(), _counted_outside(), as_raised():
            return self._finished(await apart.ainvoke(messages, child_config(), **options), request)

    async def acomplete(self, request: lm15.Request) -> lm15.Response:
        """``complete`` on the event loop."""
        model, messages, options = self._prepared(request)
        with as_lm15_errors(), _counted_outside():
            return self._finished(await model.ainvoke(messages, child_config(), **options), request)

    def stream(self, request: lm15.Request) -> Iterator[Any]:
        """The answer as it comes."""
        model, messages, options = self._prepared(request)
        collected = _Collected(request.model)
        yield lm15.StreamStartEvent(model=request.model)
        with as_lm15_errors():
            for chunk in model.stream(messages, child_config(), **options):
                yield from collected.add(chunk)
        yield from self._ended(collected, request)

    async def astream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """The answer as it comes, on the event loop."""
        model, messages, options = self._prepared(request)
        collected = _Collected(request.model)
        yield lm15.StreamStartEvent(model=request.model)
        with as_lm15_errors():
            async for chunk in model.astream(messages, child_config(), **options):
                for event in collected.add(chunk):
                    yield event
        for event in self._ended(collected, request):
            yield event

    def _prepared(
        self, request: lm15.Request
    ) -> tuple[Runnable[Any, Any], list[BaseMessage], dict[str, Any]]:
        call = chain_call.get()
        messages = list(call.messages) if call is not None else list(from_request(request))
        options = request_options(request)
        model = self.chat_model
        tools = openai_tools(request)
        if tools:
            # A chain's own model has its tools bound; only another one is sent them in the request.
            model = _with_tools(model, tools, tool_choice(request))
        return model, messages, options

    def _finished(self, answer: Any, request: lm15.Request) -> lm15.Response:
        call = chain_call.get()
        if call is not None:
            call.answer = answer
        return to_response(_as_message(answer), request.model)

    def _ended(self, collected: _Collected, request: lm15.Request) -> Iterator[Any]:
        response = self._finished(collected.message(), request)
        yield from collected.tool_calls(response)
        yield lm15.StreamEndEvent(finish_reason=response.finish_reason, usage=response.usage)


class AsyncLangChainEngine:
    """The engine's counterpart for event loops."""

    traces_in_langchain = True

    def __init__(self, engine: LangChainEngine) -> None:
        self._engine = engine

    def __deepcopy__(self, memo: dict[int, Any]) -> AsyncLangChainEngine:
        return self

    async def complete(self, request: lm15.Request) -> lm15.Response:
        """Ask, with the model's retries and fallbacks."""
        return await self._engine.acomplete(request)

    async def complete_each(self, request: lm15.Request, each: AsyncEach) -> lm15.Response:
        """``complete``, with every attempt made through ``each``."""
        return await self._engine.acomplete_each(request, each)

    async def stream(self, request: lm15.Request) -> AsyncIterator[Any]:
        """The answer as it comes."""
        async for event in self._engine.astream(request):
            yield event


class _Collected:
    """The chunks of one answer, joined."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._whole: Any = None
        self._texts = itertools.count(1)

    def add(self, chunk: Any) -> Iterator[Any]:
        self._whole = chunk if self._whole is None else self._whole + chunk
        text = text_of(chunk) if isinstance(chunk, BaseMessage) else str(chunk)
        if text:
            yield lm15.StreamDeltaEvent(delta=lm15.TextDelta(text=text))

    def message(self) -> Any:
        whole = self._whole if self._whole is not None else AIMessage(content="")
        if isinstance(whole, AIMessageChunk):
            return AIMessage(
                content=whole.content,
                tool_calls=whole.tool_calls,
                additional_kwargs=whole.additional_kwargs,
                response_metadata=whole.response_metadata,
                usage_metadata=whole.usage_metadata,
                id=whole.id,
            )
        return whole

    def tool_calls(self, response: lm15.Response) -> Iterator[Any]:
        import json

        calls = [part for part in response.message.parts if part.type == "tool_call"]
        for index, part in enumerate(calls, start=1):
            delta = lm15.ToolCallDelta(
                input=json.dumps(dict(part.input)), part_index=index, id=part.id, name=part.name
            )
            yield lm15.StreamDeltaEvent(delta=delta)


def _counted_outside() -> Any:
    """The LM with this engine counts what an answer used; one within the model (``to_chat_model``) must not do it again."""
    return dspy.context(usage_tracker=None)


def _as_message(answer: Any) -> BaseMessage:
    return answer if isinstance(answer, BaseMessage) else AIMessage(content=str(answer))


def _with_tools(
    model: Runnable[Any, Any], tools: list[dict[str, Any]], choice: str | None
) -> Runnable[Any, Any]:
    """``bind_tools`` of the model inside, around the bindings outside, whose settings would be lost otherwise."""
    inner = base_model(model)
    if not isinstance(inner, BaseChatModel):
        raise lm15.UnsupportedFeatureError(f"{type(inner).__name__} takes no tools", feature="tools")
    try:
        bound = inner.bind_tools(tools, **({"tool_choice": choice} if choice else {}))
    except NotImplementedError as error:
        raise lm15.UnsupportedFeatureError(
            f"{type(inner).__name__} takes no tools", feature="tools"
        ) from error
    if model is inner:
        return bound
    kwargs = dict(bound.kwargs) if isinstance(bound, RunnableBinding) else {"tools": tools}
    return model.bind(**kwargs)


def _model_name(inner: Any) -> str:
    for attribute in ("model_name", "model", "model_id", "deployment_name"):
        name = getattr(inner, attribute, None)
        if isinstance(name, str) and name:
            return name
    return type(inner).__name__
