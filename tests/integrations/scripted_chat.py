"""A deterministic LM engine that plays a chat model: text, streams, tools and structured answers."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import dspy
from dspy.lm15 import (
    Message,
    Request,
    Response,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamStartEvent,
    TextDelta,
    TextPart,
    ToolCallDelta,
    ToolCallPart,
    Usage,
)

ANY_OBJECT = {"type": "object", "properties": {"setup": {"type": "string"}, "punchline": {"type": "string"}}}
"""What the engine answers where any JSON object will do."""


def default_answer(request: Request) -> str:
    last = request.messages[-1]
    said = last.text or " ".join(str(part) for part in last.parts)
    return f"You said: {said}"


class ChatEngine:
    """Answers with a tool call where tools are offered and nothing was looked up yet, else with text."""

    supports_function_calling = True
    supports_response_schema = True
    supported_params = frozenset(
        {"temperature", "max_tokens", "stop", "tools", "tool_choice", "response_format"}
    )

    def __init__(self, answer: Callable[[Request], str] = default_answer) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.streamed = 0

    def __deepcopy__(self, memo: dict) -> ChatEngine:
        return self

    def complete(self, request: Request) -> Response:
        self.requests.append(request)
        parts: list[Any] = []
        last = request.messages[-1]
        choice = request.config.tool_choice
        looked_up = any(part.type == "tool_result" for part in last.parts)
        if request.tools and not looked_up and (choice is None or choice.mode != "none"):
            allowed = choice.allowed if choice is not None else ()
            tool = next(t for t in request.tools if not allowed or t.name in allowed)
            parts.append(
                ToolCallPart(id="call_1", name=tool.name, input=filled(tool.parameters, last.text or ""))
            )
        elif request.config.response_format:
            schema = request.config.response_format.get("schema", ANY_OBJECT)
            parts.append(TextPart(json.dumps(filled(schema, last.text or ""))))
        else:
            parts.append(TextPart(self.answer(request)))
        read = sum(len(str(m.parts)) for m in request.messages)
        return Response(
            id="r1",
            model=request.model,
            message=Message.assistant(parts),
            finish_reason="tool_call" if parts[0].type == "tool_call" else "stop",
            usage=Usage(input_tokens=read, output_tokens=3, total_tokens=read + 3),
        )

    def events(self, request: Request) -> Iterator[Any]:
        self.streamed += 1
        response = self.complete(request)
        yield StreamStartEvent(id="r1", model=request.model)
        for index, part in enumerate(response.message.parts):
            if part.type == "text":
                for piece in re.findall(r"\s*\S+|\s+", part.text):
                    yield StreamDeltaEvent(delta=TextDelta(text=piece, part_index=index))
            else:
                delta = ToolCallDelta(
                    input=json.dumps(dict(part.input)), part_index=index, id=part.id, name=part.name
                )
                yield StreamDeltaEvent(delta=delta)
        yield StreamEndEvent(finish_reason=response.finish_reason, usage=response.usage)

    def stream(self, request: Request) -> Iterator[Any]:
        yield from self.events(request)


class AsyncChatEngine:
    def __init__(self, engine: ChatEngine) -> None:
        self.engine = engine

    def __deepcopy__(self, memo: dict) -> AsyncChatEngine:
        return self

    async def complete(self, request: Request) -> Response:
        return self.engine.complete(request)

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        for event in self.engine.events(request):
            yield event


def filled(schema: dict[str, Any], text: str, definitions: dict[str, Any] | None = None) -> Any:
    """A value that fits the schema, made of the text's own words and numbers."""
    definitions = definitions or schema.get("$defs", {})
    if "$ref" in schema:
        return filled(definitions[schema["$ref"].rsplit("/", 1)[-1]], text, definitions)
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return filled(schema["anyOf"][0], text, definitions)
    kind = schema.get("type", "object")
    if kind == "object":
        return {name: filled(sub, text, definitions) for name, sub in schema.get("properties", {}).items()}
    if kind == "array":
        return [filled(schema.get("items", {"type": "string"}), text, definitions)]
    numbers = re.findall(r"-?\d+", text)
    if kind == "integer":
        return int(numbers[0]) if numbers else 1
    if kind == "number":
        return float(numbers[0]) if numbers else 1.0
    return {"boolean": True, "null": None}.get(kind, text[:80] or "words")


def chat_lm(answer: Callable[[Request], str] = default_answer, name: str = "test/chat") -> dspy.LM:
    engine = ChatEngine(answer)
    return dspy.LM(name, engine=engine, async_engine=AsyncChatEngine(engine), cache=False)
