"""A predictor's prompt as literal messages and one last message with slots for the inputs.

The prompt is not rebuilt: DSPy's own adapter renders it with random marks as inputs, and the marks become the
slots. What would differ between such a prompt and the adapter's messages is refused.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import dspy
from dspy.adapters.types.base_type import CUSTOM_TYPE_START_IDENTIFIER
from dspy.adapters.types.base_type import Type as DspyType
from dspy.adapters.utils import format_field_value
from pydantic_core import PydanticUndefined

from asyndbt_dspy.errors import ExportError

EXACT_ADAPTERS = (dspy.ChatAdapter, dspy.JSONAdapter, dspy.XMLAdapter)
MARK_BYTES = 16


@dataclass(frozen=True)
class Slot:
    """The place of one input in the last message."""

    field: str


@dataclass(frozen=True)
class PredictorPrompt:
    """What an adapter sends for one predictor, with slots for the inputs.

    Attributes:
        predictor: Name in ``named_predictors()``.
        literal: (role, content) of all messages but the last: system text and demos.
        role: Role of the last message.
        last: Content of the last message: texts and slots in order.
        inputs: Names of the inputs, in the signature's order.
        defaults: Inputs with a default, as DSPy writes it; these may be left out.
        outputs: Names of the outputs.
        adapter: Name of the adapter's class.
    """

    predictor: str
    literal: tuple[tuple[str, str], ...]
    role: str
    last: tuple[str | Slot, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    adapter: str
    defaults: Mapping[str, str] = field(default_factory=dict)

    def messages(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages for inputs that are already written as text (see ``format_inputs``).

        Raises:
            ExportError: an input is missing.
        """
        filled = {**self.defaults, **values}
        missing = [name for name in self.inputs if name not in filled]
        if missing:
            raise ExportError(f"inputs are {list(self.inputs)}; missing: {missing}")
        content = "".join(filled[part.field] if isinstance(part, Slot) else part for part in self.last)
        return [*_as_messages(self.literal), {"role": self.role, "content": content}]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for ``fill_messages``: OpenAI-style messages and the placeholder of each input."""
        texts = [content for _, content in self.literal] + [p for p in self.last if isinstance(p, str)]
        placeholders = _unused_placeholders(self.inputs, texts)
        content = "".join(placeholders[p.field] if isinstance(p, Slot) else p for p in self.last)
        return {
            "messages": [*_as_messages(self.literal), {"role": self.role, "content": content}],
            "placeholders": placeholders,
            "defaults": dict(self.defaults),
            "outputs": list(self.outputs),
            "adapter": self.adapter,
        }


def find_predictor(program: dspy.Module, predictor: str | None = None) -> tuple[str, dspy.Predict]:
    """The predictor of that name, or the only one.

    Raises:
        ExportError: no such name, or no name given and not exactly one predictor.
    """
    named = dict(program.named_predictors())
    if predictor is None and len(named) == 1:
        return next(iter(named.items()))
    if predictor is None or predictor not in named:
        raise ExportError(f"name one of the program's predictors {list(named)}, got {predictor!r}")
    return predictor, named[predictor]


def export_prompt(
    program: dspy.Module, predictor: str | None = None, *, adapter: dspy.Adapter | None = None
) -> PredictorPrompt:
    """The prompt of one predictor, exactly as the adapter sends it.

    Args:
        program: Not changed.
        predictor: Name in ``named_predictors()``; may be left out where there is only one.
        adapter: ``ChatAdapter``, ``JSONAdapter`` or ``XMLAdapter``; default: the one of ``dspy.settings``.

    Raises:
        ExportError: something that a fixed prompt cannot express: another adapter, ``dspy.History``, images
            and other ``dspy.Type`` fields, tools, native reasoning, decision criteria, demos that become
            content blocks.
    """
    name, predict = find_predictor(program, predictor)
    adapter = adapter or dspy.settings.adapter or dspy.ChatAdapter()
    _check_exact(name, predict, adapter)
    signature, demos = predict.signature, list(predict.demos)
    first, second = ({n: _mark() for n in signature.input_fields} for _ in range(2))
    messages = adapter.format(signature, demos, dict(first))
    if not messages or any(not isinstance(m.get("content"), str) for m in messages):
        raise ExportError(f"predictor {name!r}: a demo holds content blocks (an image, say), not plain text")
    *literal, last = [(str(m["role"]), str(m["content"])) for m in messages]
    parts = _split(last[1], first)
    prompt = PredictorPrompt(
        predictor=name,
        literal=tuple(literal),
        role=last[0],
        last=parts,
        inputs=tuple(signature.input_fields),
        outputs=tuple(signature.output_fields),
        adapter=type(adapter).__name__,
        defaults=_defaults(signature),
    )
    # A second rendering with other marks: catches an adapter that treats a value by its content.
    if prompt.messages(second) != adapter.format(signature, demos, dict(second)):
        raise ExportError(f"predictor {name!r}: {type(adapter).__name__} renders inputs by their content")
    return prompt


def format_inputs(signature: type[dspy.Signature], values: Mapping[str, Any]) -> dict[str, str]:
    """Input values as DSPy's adapters write them into a prompt (JSON for models and dicts, and so on)."""
    return {
        name: format_field_value(field_info=info, value=values[name])
        for name, info in signature.input_fields.items()
        if name in values
    }


def _check_exact(name: str, predict: dspy.Predict, adapter: dspy.Adapter) -> None:
    if type(adapter) not in EXACT_ADAPTERS:
        known = ", ".join(cls.__name__ for cls in EXACT_ADAPTERS)
        raise ExportError(
            f"predictor {name!r}: the adapter is {type(adapter).__name__}; exact ones are {known}"
        )
    if getattr(predict, "fields", None):
        raise ExportError(f"predictor {name!r} has decision criteria, which depend on the LM that is called")
    if not predict.signature.input_fields:
        raise ExportError(f"predictor {name!r} has no inputs, so there is nothing to fill in")
    for field_name, info in predict.signature.fields.items():
        history = [dspy.History] if info.annotation is dspy.History else []
        for custom in (*history, *DspyType.extract_custom_type_from_annotation(info.rebuild_annotation())):
            raise ExportError(
                f"predictor {name!r}: field {field_name!r} is a {custom.__name__}, which DSPy renders by value "
                "or sends beside the messages (tools, native reasoning); replace it by text, or run the program "
                "itself"
            )
    for demo in predict.demos:
        if CUSTOM_TYPE_START_IDENTIFIER in str(dict(demo)):
            raise ExportError(f"predictor {name!r}: a demo holds a value of a custom DSPy type")


def _defaults(signature: type[dspy.Signature]) -> dict[str, str]:
    given = {n: f.default for n, f in signature.input_fields.items() if f.default is not PydanticUndefined}
    return format_inputs(signature, given)


def _mark() -> str:
    return f"mark{secrets.token_hex(MARK_BYTES)}"


def _split(content: str, marks: Mapping[str, str]) -> tuple[str | Slot, ...]:
    by_mark = {mark: name for name, mark in marks.items()}
    pieces = re.split("(" + "|".join(map(re.escape, by_mark)) + ")", content)
    found = [by_mark[piece] for piece in pieces if piece in by_mark]
    lost = sorted(set(marks) - set(found))
    if lost:
        raise ExportError(f"the adapter does not show the inputs {lost} in the last message")
    parts = (Slot(by_mark[piece]) if piece in by_mark else piece for piece in pieces)
    return tuple(part for part in parts if part != "")


def _unused_placeholders(inputs: Iterable[str], texts: list[str]) -> dict[str, str]:
    """``{{name}}``, with more braces where a text contains that already."""
    joined = "\n".join(texts)
    depth = 2
    while any("{" * depth + name + "}" * depth in joined for name in inputs):
        depth += 1
    return {name: "{" * depth + name + "}" * depth for name in inputs}


def _as_messages(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]
