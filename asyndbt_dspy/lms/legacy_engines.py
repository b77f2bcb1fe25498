"""LMs of the older kind, whose class has ``forward`` in place of an engine, and the answers that they give.

DSPy itself reads such an answer attribute by attribute, so that any object in the shape of a chat completion will do; in its
canonical form it takes dicts and pydantic models alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import dspy
import pydantic
from dspy.clients.engines import AsyncLegacyEngine, LegacyEngine
from dspy.lm15 import Request, Response


def legacy_engines(lm: dspy.BaseLM, *, is_async: bool) -> tuple[Any, Any]:
    """(an engine, an async engine or ``None``) that call ``lm.forward`` and ``lm.aforward``."""
    with warnings.catch_warnings():
        # DSPy 3.4 has no other way to an LM of the old kind, and drops both together in 3.5.
        warnings.simplefilter("ignore", DeprecationWarning)
        return _Forward(lm), _AsyncForward(lm) if is_async else None


def as_body(answer: Any) -> Any:
    """``answer`` with plain objects (a namespace, a dataclass, a named tuple, with or without slots) at any depth as dicts."""
    if answer is None or isinstance(answer, str | bytes | int | float | pydantic.BaseModel):
        return answer
    if isinstance(answer, dict):
        return {name: as_body(value) for name, value in answer.items()}
    if hasattr(answer, "_asdict"):
        return as_body(answer._asdict())
    if isinstance(answer, list | tuple):
        return [as_body(value) for value in answer]
    slots = [name for kind in type(answer).__mro__ for name in getattr(kind, "__slots__", ())]
    names = [name for name in (*getattr(answer, "__dict__", ()), *slots) if not name.startswith("_")]
    found = {name: as_body(getattr(answer, name)) for name in names if hasattr(answer, name)}
    return found or answer


# `_response` is private to DSPy 3.4; test_an_answer_may_be_any_object fails when it moves.
class _Forward(LegacyEngine):  # type: ignore[misc]
    def _response(self, raw: Any, request: Request) -> Response:
        return super()._response(raw if isinstance(raw, Response) else as_body(raw), request)  # type: ignore[no-any-return]


class _AsyncForward(AsyncLegacyEngine):  # type: ignore[misc]
    def _response(self, raw: Any, request: Request) -> Response:
        return super()._response(raw if isinstance(raw, Response) else as_body(raw), request)  # type: ignore[no-any-return]
