"""A scripted LM: its answer is a pure function of the request. For tests of the machinery, never for results."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from asyndbt_dspy.lms import distributions

Script = Callable[[list[dict[str, str]]], "str | tuple[str, dict[str, dict[str, float]]]"]
"""``messages -> answer``, or ``-> (answer, {field: {label: probability}})``; may raise a ``dspy.lm15`` error."""

_NUMBERS = itertools.count(1)


def scripted_lm(
    script: Script, *, name: str = "model", supports_schema: bool = True, **lm_options: Any
) -> dspy.LM:
    """A ``dspy.LM`` that answers by ``script``.

    Args:
        script: Receives the messages as ``{"role": …, "content": …}``.
        name: Part of the model string ``scripted/<name>``.
        supports_schema: Whether the engine declares ``response_format``, so that adapters send a JSON schema.
        lm_options: Further arguments of ``dspy.LM``; DSPy's cache is off unless asked for.
    """
    lm_options.setdefault("cache", False)
    lm_options.setdefault("num_retries", 0)
    engines = ScriptedEngine(script, supports_schema), AsyncScriptedEngine(script, supports_schema)
    return dspy.LM(f"scripted/{name}", engine=engines[0], async_engine=engines[1], **lm_options)


class _ScriptedBase:
    supports_function_calling = False
    supports_reasoning = False

    def __init__(self, script: Script, supports_schema: bool) -> None:
        self.script = script
        self.supports_response_schema = supports_schema
        extra = {"response_format"} if supports_schema else set()
        self.supported_params = frozenset({"temperature", "max_tokens", "stop", "seed", *extra})
        self.calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def answer(self, request: Request) -> Response:
        self.calls += 1
        said = self.script(_messages(request))
        text, probabilities = said if isinstance(said, tuple) else (said, {})
        for field, labels in probabilities.items():
            distributions.record(field, labels)
        return Response(
            id=f"scripted-{next(_NUMBERS)}",
            model=request.model,
            message=Message.assistant([TextPart(text)]),
            finish_reason="stop",
            usage=Usage(input_tokens=1, output_tokens=1),
            provider_data={distributions.PROVIDER_DATA_KEY: probabilities} if probabilities else None,
        )


class ScriptedEngine(_ScriptedBase):
    """``complete`` for threads."""

    def complete(self, request: Request) -> Response:
        return self.answer(request)


class AsyncScriptedEngine(_ScriptedBase):
    """``complete`` for tasks; gives way to other tasks once per call."""

    async def complete(self, request: Request) -> Response:
        await asyncio.sleep(0)
        return self.answer(request)


def _messages(request: Request) -> list[dict[str, str]]:
    system = request.system
    found = [{"role": "system", "content": _text(system)}] if system else []
    return found + [{"role": str(one.role), "content": _text(one.parts)} for one in request.messages]


def _text(parts: str | Sequence[Any]) -> str:
    return parts if isinstance(parts, str) else "".join(getattr(part, "text", "") for part in parts)
