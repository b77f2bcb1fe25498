"""Between LangChain's messages and DSPy's ``lm15`` requests and responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspy import lm15
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    AnyMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    convert_to_openai_messages,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call

FINISH_REASONS = {"tool_call": "tool_calls"}
"""Where lm15's name of a finish reason is not OpenAI's."""

TOOL_CHOICES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}
"""OpenAI's name of a tool choice for LangChain's; any other text is the name of a tool."""

OPENAI_STOP = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}


def to_openai(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """OpenAI-style dictionaries of LangChain messages."""
    converted = convert_to_openai_messages(list(messages))
    dicts = converted if isinstance(converted, list) else [converted]
    for message in dicts:
        if message.get("role") != "tool":
            # lm15 has no place for a participant's name.
            message.pop("name", None)
        if message.get("content") == [] or (message.get("content") == "" and message.get("tool_calls")):
            message["content"] = None
    return dicts


def to_request(messages: Sequence[BaseMessage], model: str, options: Mapping[str, Any]) -> lm15.Request:
    """The request for ``messages``.

    Args:
        messages: At least one.
        model: The LM's model string.
        options: OpenAI-style settings (temperature, max_tokens, stop, tools, tool_choice, response_format, …).

    Raises:
        ValueError, TypeError, lm15.UnsupportedFeatureError: a content block or setting that lm15 cannot carry.
    """
    body = {
        "model": model,
        "messages": to_openai(messages),
        **{k: v for k, v in options.items() if v is not None},
    }
    return lm15.request_from_openai_chat(body)


def from_request(request: lm15.Request) -> list[AnyMessage]:
    """LangChain messages of a request.

    Raises:
        lm15.UnsupportedFeatureError: a part that has no form in LangChain's chat messages.
    """
    found: list[AnyMessage] = []
    if request.system is not None:
        system = request.system if isinstance(request.system, str) else _content(request.system)
        found.append(SystemMessage(content=system))
    for message in request.messages:
        found.extend(_from_message(message))
    return found


def request_options(request: lm15.Request) -> dict[str, Any]:
    """The OpenAI-style settings of a request that are set, tools and tool choice aside."""
    config = request.config
    options: dict[str, Any] = {
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "top_p": config.top_p,
        "stop": list(config.stop) or None,
        "seed": config.seed,
        "frequency_penalty": config.frequency_penalty,
        "presence_penalty": config.presence_penalty,
        "response_format": response_format(config.response_format),
    }
    return {name: value for name, value in options.items() if value is not None}


def response_format(canonical: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's ``response_format`` of lm15's, which keeps the schema one level higher."""
    if canonical is None or canonical.get("type") != "json_schema" or "json_schema" in canonical:
        return dict(canonical) if canonical is not None else None
    inner = {key: value for key, value in canonical.items() if key != "type"}
    return {"type": "json_schema", "json_schema": {"name": "answer", **inner}}


def openai_tools(request: lm15.Request) -> list[dict[str, Any]]:
    """The request's function tools in OpenAI's form."""
    return [
        {
            "type": "function",
            "function": {
                "name": t.name,
                "description": t.description or "",
                "parameters": dict(t.parameters),
            },
        }
        for t in request.tools
        if t.type == "function"
    ]


def tool_choice(request: lm15.Request) -> str | None:
    """LangChain's ``tool_choice``: ``"any"``, ``"none"``, a tool's name, or ``None`` for the model's choice."""
    choice = request.config.tool_choice
    if choice is None:
        return None
    if len(choice.allowed) == 1:
        return choice.allowed[0]
    return {"required": "any", "none": "none"}.get(choice.mode)


def openai_tool_choice(choice: Any) -> Any:
    """OpenAI's form of a ``tool_choice`` that a chain bound to its model; a form that is not known stays as it is."""
    if choice is True:
        return "required"
    if isinstance(choice, str):
        return TOOL_CHOICES.get(choice) or _only_tool(choice)
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "tool" and choice.get("name"):
        return _only_tool(choice["name"])
    return TOOL_CHOICES.get(kind, choice) if isinstance(kind, str) else choice


def from_response(response: lm15.Response) -> AIMessage:
    """LangChain's message of a response: text, reasoning, tool calls, usage and finish reason."""
    calls, reasoning = [], []
    for part in response.message.parts:
        if part.type == "tool_call":
            calls.append(tool_call(name=part.name, args=dict(part.input), id=part.id))
        elif part.type == "thinking":
            reasoning.append(part.text)
    return AIMessage(
        content="".join(part.text for part in response.message.parts if part.type in ("text", "refusal")),
        tool_calls=calls,
        additional_kwargs={"reasoning_content": "".join(reasoning)} if reasoning else {},
        response_metadata={
            "model_name": response.model,
            "finish_reason": FINISH_REASONS.get(response.finish_reason, response.finish_reason),
        },
        usage_metadata=usage_metadata(response.usage),
    )


def usage_metadata(usage: lm15.Usage | None) -> UsageMetadata | None:
    """LangChain's token counts, ``None`` where none were reported."""
    if usage is None or (usage.input_tokens is None and usage.output_tokens is None):
        return None
    inputs, outputs = usage.input_tokens or 0, usage.output_tokens or 0
    counts = UsageMetadata(
        input_tokens=inputs, output_tokens=outputs, total_tokens=usage.total_tokens or inputs + outputs
    )
    if usage.cache_read_tokens is not None:
        counts["input_token_details"] = {"cache_read": usage.cache_read_tokens}
    if usage.reasoning_tokens is not None:
        counts["output_token_details"] = {"reasoning": usage.reasoning_tokens}
    return counts


def to_response(message: BaseMessage, model: str) -> lm15.Response:
    """The response that a LangChain model's message stands for."""
    metadata = message.response_metadata or {}
    reason = str(
        metadata.get("finish_reason") or metadata.get("stop_reason") or metadata.get("done_reason") or ""
    )
    calls = getattr(message, "tool_calls", None) or []
    dump: dict[str, Any] = {"role": "assistant", "content": text_of(message) or None}
    if calls:
        dump["tool_calls"] = [_openai_call(call, number) for number, call in enumerate(calls)]
    thinking = message.additional_kwargs.get("reasoning_content")
    if thinking:
        dump["reasoning_content"] = str(thinking)
    body: dict[str, Any] = {
        "id": message.id,
        "model": str(metadata.get("model_name") or metadata.get("model") or model),
        "choices": [
            {
                "index": 0,
                "message": dump,
                "finish_reason": OPENAI_STOP.get(reason, reason) or ("tool_calls" if calls else "stop"),
            }
        ],
    }
    counts = getattr(message, "usage_metadata", None)
    if counts:
        body["usage"] = {
            "prompt_tokens": counts["input_tokens"],
            "completion_tokens": counts["output_tokens"],
            "total_tokens": counts["total_tokens"],
            "prompt_tokens_details": {
                "cached_tokens": counts.get("input_token_details", {}).get("cache_read")
            },
        }
    return lm15.response_from_openai_chat(body, model=model)


def text_of(message: BaseMessage) -> str:
    """The text of a message, its blocks joined."""
    if isinstance(message.content, str):
        return message.content
    texts = (block if isinstance(block, str) else block.get("text", "") for block in message.content)
    return "".join(text for text in texts if isinstance(text, str))


def chunk_of(message: AIMessage) -> AIMessageChunk:
    """The whole message as one chunk, for models that do not stream."""
    calls = [
        {
            "name": c["name"],
            "args": json.dumps(c["args"]),
            "id": c["id"],
            "index": i,
            "type": "tool_call_chunk",
        }
        for i, c in enumerate(message.tool_calls)
    ]
    return AIMessageChunk(
        content=message.content,
        tool_call_chunks=calls,
        additional_kwargs=message.additional_kwargs,
        response_metadata=message.response_metadata,
        usage_metadata=message.usage_metadata,
    )


def _from_message(message: lm15.Message) -> list[AnyMessage]:
    results = [part for part in message.parts if part.type == "tool_result"]
    rest = [part for part in message.parts if part.type != "tool_result"]
    found: list[AnyMessage] = [
        ToolMessage(
            content=_content(part.content),
            tool_call_id=part.id,
            name=part.name,
            status="error" if part.is_error else "success",
        )
        for part in results
    ]
    if not rest:
        return found
    if message.role == "assistant":
        calls = [tool_call(name=p.name, args=dict(p.input), id=p.id) for p in rest if p.type == "tool_call"]
        shown = [part for part in rest if part.type not in ("tool_call", "thinking")]
        return [*found, AIMessage(content=_content(shown), tool_calls=calls)]
    if message.role in ("system", "developer"):
        return [*found, SystemMessage(content=_content(rest))]
    return [*found, HumanMessage(content=_content(rest))]


def _content(parts: Sequence[Any]) -> Any:
    """A string where all parts are text, else LangChain's content blocks."""
    if all(part.type in ("text", "refusal") for part in parts):
        return "".join(part.text for part in parts)
    return [_block(part) for part in parts]


def _block(part: Any) -> dict[str, Any]:
    if part.type in ("text", "refusal"):
        return {"type": "text", "text": part.text}
    if part.type == "image":
        url = part.url or (f"data:{part.media_type};base64,{part.data}" if part.data else None)
        if url is not None:
            image = {"url": url, **({"detail": part.detail} if part.detail else {})}
            return {"type": "image_url", "image_url": image}
    if part.type in ("audio", "document", "video") and part.data:
        kind = "file" if part.type == "document" else part.type
        return {"type": kind, "base64": part.data, "mime_type": part.media_type}
    raise lm15.UnsupportedFeatureError(
        f"a {part.type} part has no form in a LangChain chat message", feature=part.type
    )


def _only_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _openai_call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {
        "id": call.get("id") or f"call_{number}",
        "type": "function",
        "function": {"name": call["name"], "arguments": json.dumps(call["args"])},
    }
