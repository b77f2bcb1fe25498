"""From the JSON schema that DSPy sends to a plan of how to decode the answer.

An answer is a sequence of segments: text that the schema forces, choices among finitely many labels (scored together,
with a distribution), and free parts that a grammar constrains token by token. So that both the model and DSPy's
parser see one layout, white space is fixed: as in the assistant messages of the prompt (demos) when they are indented
JSON, else compact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Beyond this many labels an enumeration is decoded token by token under a grammar, without a distribution.
MAX_LABELS = 512
# An integer between two bounds counts as an enumeration up to this many values.
MAX_INTEGER_RANGE = 101


@dataclass(frozen=True)
class Forced:
    """Text that the schema leaves no choice about."""

    text: str


@dataclass(frozen=True)
class Choice:
    """One of finitely many values.

    Attributes:
        field: Name of the output field; empty when the whole answer is the choice.
        labels: The values as keys of the distribution: strings as they are, others as JSON.
        texts: The values as they stand in the answer, white space before them included.
    """

    field: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Free:
    """A part under a grammar.

    Attributes:
        schema: JSON schema of the value as text.
        before: White space before the value.
        after: Forced text that ends the part; the grammar includes it, so that the end of numbers is decided.
    """

    schema: str
    before: str
    after: str


@dataclass(frozen=True)
class Unconstrained:
    """Text until the model ends its turn."""


Segment = Forced | Choice | Free | Unconstrained


@dataclass(frozen=True)
class AnswerPlan:
    """The segments of an answer, in order."""

    segments: tuple[Segment, ...]

    @property
    def finite(self) -> bool:
        """Whether a single choice decides the whole answer."""
        return sum(not isinstance(segment, Forced) for segment in self.segments) == 1 and any(
            isinstance(segment, Choice) for segment in self.segments
        )


def plan_answer(response_format: Mapping[str, Any] | None, *, indented: bool) -> AnswerPlan:
    """The plan for a request's `response_format` (None, json_object or json_schema).

    Args:
        response_format: As in `dspy.lm15.Config`.
        indented: Whether the answer's outermost object is written one field a line, as DSPy's demos are.
    """
    if response_format is None:
        return AnswerPlan((Unconstrained(),))
    if response_format.get("type") == "json_object":
        return AnswerPlan((Free('{"type": "object"}', "", ""),))
    schema = response_format["schema"]
    options = enumerate_values(schema, schema)
    if options is not None:
        texts = tuple(map(_json, options))
        if _one_begins_another(texts):
            # Nothing follows that would tell 1 from 10: to end the turn is a part of the choice.
            return AnswerPlan((Free(_json(schema), "", ""),))
        return AnswerPlan((Choice("", tuple(map(_label, options)), texts),))
    properties = _fixed_properties(schema)
    if properties is None:
        return AnswerPlan((Free(_json(schema), "", ""),))
    return AnswerPlan(tuple(_merge_forced(_object_segments(schema, properties, indented))))


def enumerate_values(schema: Any, root: Mapping[str, Any]) -> list[Any] | None:
    """All values that a schema allows, or None when they are not an enumeration."""
    schema = _resolve(schema, root)
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    values: list[Any] | None = None
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        values = list(schema["enum"])
    elif schema.get("type") == "boolean":
        values = [True, False]
    elif schema.get("type") == "null":
        values = [None]
    elif schema.get("type") == "integer":
        values = _integer_range(schema)
    else:
        branches = schema.get("anyOf") or schema.get("oneOf")
        if isinstance(branches, list) and branches:
            values = []
            for branch in branches:
                part = enumerate_values(branch, root)
                if part is None:
                    return None
                values.extend(part)
    if values is None:
        return None
    distinct = {_json(value): value for value in values}
    # {"type": "string", "enum": [...]} may list values of other types, which the schema then forbids.
    allowed = [value for value in distinct.values() if _has_type(value, schema.get("type"))]
    return allowed if 0 < len(allowed) <= MAX_LABELS else None


def _integer_range(schema: Mapping[str, Any]) -> list[Any] | None:
    low, high = schema.get("minimum"), schema.get("maximum")
    if not isinstance(low, int) or not isinstance(high, int) or "multipleOf" in schema:
        return None
    if "exclusiveMinimum" in schema or "exclusiveMaximum" in schema:
        return None
    return list(range(low, high + 1)) if 0 <= high - low < MAX_INTEGER_RANGE else None


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def _has_type(value: Any, kind: Any) -> bool:
    kinds = [kind] if isinstance(kind, str) else kind
    if not kinds:
        return True
    return any(
        isinstance(value, _TYPES.get(each, (object,))) and (each == "boolean" or not isinstance(value, bool))
        for each in kinds
    )


def _resolve(schema: Any, root: Mapping[str, Any]) -> Any:
    seen = 0
    while isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str) and seen < 32:
        target: Any = root
        for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            target = target.get(part) if isinstance(target, Mapping) and part else target
        if target is schema or target is None:
            return schema
        schema, seen = target, seen + 1
    return schema


_PLAIN_OBJECT_KEYS = frozenset(
    [
        "type",
        "properties",
        "required",
        "additionalProperties",
        "title",
        "description",
        "$defs",
        "definitions",
        "$schema",
    ]
)


def _fixed_properties(schema: Any) -> dict[str, Any] | None:
    """The properties of an object that has exactly these, in order, or None."""
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        return None
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        return None
    if schema.get("additionalProperties") is not False or set(schema.get("required") or ()) != set(
        properties
    ):
        return None
    return None if set(schema) - _PLAIN_OBJECT_KEYS else dict(properties)


def _object_segments(root: Mapping[str, Any], properties: Mapping[str, Any], indented: bool) -> list[Segment]:
    opening, separator, closing = ("{\n  ", ",\n  ", "\n}") if indented else ("{", ", ", "}")
    names = list(properties)
    segments: list[Segment] = [Forced(opening + _json(names[0]) + ":")]
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    for index, name in enumerate(names):
        after = closing if index == len(names) - 1 else separator + _json(names[index + 1]) + ":"
        options = enumerate_values(properties[name], root)
        if options is not None and len(options) == 1:
            segments.append(Forced(" " + _json(options[0]) + after))
        elif options is not None:
            texts = tuple(" " + _json(option) for option in options)
            segments += [Choice(name, tuple(map(_label, options)), texts), Forced(after)]
        else:
            schema = dict(properties[name]) if isinstance(properties[name], Mapping) else properties[name]
            if definitions and isinstance(schema, dict):
                schema |= definitions
            segments.append(Free(_json(schema), " ", after))
    return segments


def _one_begins_another(texts: Sequence[str]) -> bool:
    ordered = sorted(texts)
    return any(later.startswith(earlier) for earlier, later in pairwise(ordered))


def _merge_forced(segments: Sequence[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Forced) and merged and isinstance(merged[-1], Forced):
            merged[-1] = Forced(merged[-1].text + segment.text)
        else:
            merged.append(segment)
    return merged


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _label(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)
