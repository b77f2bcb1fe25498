"""What a chain's parser gave, written as the model's message again: for demos."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspy.adapters.utils import serialize_for_json
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.tool import tool_call
from langchain_core.output_parsers import (
    CommaSeparatedListOutputParser,
    MarkdownListOutputParser,
    NumberedListOutputParser,
    StrOutputParser,
)
from langchain_core.output_parsers.openai_tools import (
    JsonOutputKeyToolsParser,
    JsonOutputToolsParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable
from pydantic import BaseModel

from asyndbt_dspy.errors import ExportError
from langchain_asyndbt.messages import text_of

MESSAGE_TYPES: Mapping[str, type[BaseMessage]] = {
    "ai": AIMessage,
    "human": HumanMessage,
    "system": SystemMessage,
    "tool": ToolMessage,
}
TOOL_RESULT = "You have correctly called this tool."
"""What LangChain puts after a tool call of an example: providers refuse a call without a result."""


def as_message(value: Any) -> Any:
    """A message that was written as JSON becomes a message again; anything else stays as it is."""
    if isinstance(value, Mapping) and value.get("type") in MESSAGE_TYPES and "content" in value:
        return MESSAGE_TYPES[value["type"]](**{key: item for key, item in value.items() if key != "type"})
    return value


def as_shown(value: Any) -> Any:
    """A message with what a demo shows of it, text and tool calls; anything else stays as it is.

    The rest (headers, request ids, usage, reasoning) is the provider's, differs from run to run, and is nobody else's business.
    """
    if not isinstance(value, BaseMessage):
        return value
    calls = [{**call, "id": None} for call in getattr(value, "tool_calls", [])]
    return AIMessage(content=text_of(value), tool_calls=_with_ids(calls))


def parse(parser: Runnable[Any, Any] | None, message: BaseMessage) -> Any:
    """What the chain makes of the model's message: the message itself where there is no parser."""
    return message if parser is None else parser.invoke(message)


def answer_messages(parser: Runnable[Any, Any] | None, output: Any) -> list[BaseMessage]:
    """The model's message for ``output``, and the results of its tool calls.

    Args:
        parser: The chain's parser; ``None`` where the chain gives the message itself.
        output: What the parser gave or should give.

    Raises:
        ExportError: the parser would not read ``output`` back from any form known here.
    """
    output = as_message(output)
    for message in _forms(parser, output):
        if _reads_back(parser, message, output):
            return [message, *_tool_results(message)]
    name = type(parser).__name__ if parser is not None else "no parser"
    raise ExportError(f"{str(output)[:200]!r} cannot be written so that the chain reads it back ({name})")


def _forms(parser: Runnable[Any, Any] | None, output: Any) -> list[AIMessage]:
    """Messages that ``output`` may have come from, the likeliest first."""
    if isinstance(output, BaseMessage):
        calls = getattr(output, "tool_calls", [])
        return [AIMessage(content=text_of(output), tool_calls=_with_ids(calls))]
    plain = jsonable(output)
    if isinstance(parser, PydanticToolsParser | JsonOutputToolsParser):
        return [AIMessage(content="", tool_calls=_calls(parser, output, plain))]
    text = output.value if isinstance(output, enum.Enum) else output
    forms = []
    if isinstance(text, str):
        forms.append(text)
    if isinstance(plain, list):
        forms += _list_forms(parser, plain)
    if not isinstance(parser, StrOutputParser):
        forms.append(json.dumps(plain, ensure_ascii=False))
    forms.append(str(text))
    return [AIMessage(content=form) for form in dict.fromkeys(forms)]


def _list_forms(parser: Runnable[Any, Any] | None, items: Sequence[Any]) -> list[str]:
    texts = [str(item) for item in items]
    if isinstance(parser, CommaSeparatedListOutputParser):
        return [", ".join(texts)]
    if isinstance(parser, NumberedListOutputParser):
        return ["\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))]
    if isinstance(parser, MarkdownListOutputParser):
        return ["\n".join(f"- {text}" for text in texts)]
    return []


def _calls(parser: PydanticToolsParser | JsonOutputToolsParser, output: Any, plain: Any) -> list[Any]:
    values = output if isinstance(output, list) else [output]
    plains = plain if isinstance(plain, list) else [plain]
    calls = []
    for number, (value, item) in enumerate(zip(values, plains, strict=True)):
        if isinstance(parser, PydanticToolsParser):
            is_model = isinstance(value, BaseModel)
            name, args = (type(value) if is_model else parser.tools[0]).__name__, item
        elif isinstance(parser, JsonOutputKeyToolsParser):
            name, args = parser.key_name, item
        else:
            name, args = str(item.get("type")), item.get("args")
        if not isinstance(args, dict):
            raise ExportError(f"{str(value)[:200]!r} holds no arguments of a tool call")
        calls.append(tool_call(name=name, args=args, id=f"call_{number}"))
    return calls


def _with_ids(calls: Sequence[Any]) -> list[Any]:
    return [
        tool_call(name=c["name"], args=c["args"], id=c.get("id") or f"call_{n}") for n, c in enumerate(calls)
    ]


def _tool_results(message: AIMessage) -> list[BaseMessage]:
    return [ToolMessage(content=TOOL_RESULT, tool_call_id=call["id"] or "") for call in message.tool_calls]


def _reads_back(parser: Runnable[Any, Any] | None, message: AIMessage, output: Any) -> bool:
    try:
        parsed = parse(parser, message)
    except Exception:  # noqa: BLE001 - a parser may raise anything on a form that is not its own
        return False
    if isinstance(parsed, BaseMessage):
        # The chain gives the message itself: an example gives its text, or the message.
        return isinstance(output, BaseMessage) or text_of(parsed) == output
    return without_ids(jsonable(parsed)) == without_ids(jsonable(output))


def jsonable(value: Any) -> Any:
    """Plain JSON data of models, dictionaries and lists of them."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return serialize_for_json(value)


def without_ids(value: Any) -> Any:
    """Tool calls have made-up ids, which are no part of an answer."""
    if isinstance(value, list):
        return [without_ids(item) for item in value]
    if isinstance(value, dict) and set(value) == {"type", "args", "id"}:
        return {key: item for key, item in value.items() if key != "id"}
    return value
