"""Outputs that are enumerations: ``Literal``, ``bool``, ``Enum``, and ``Optional`` or ``Annotated`` forms of
these.

A label is written as a string: ``str()`` of a literal value or of an enum member's value,
``"True"``/``"False"`` for ``bool``. These are the texts that DSPy puts into the prompt. ``None`` is never a
label of its own.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import dspy

MIN_LABELS = 2
"""An output with a single possible value tells nothing apart, so it is not treated as an enumeration."""


@dataclasses.dataclass(frozen=True)
class Enumeration:
    """An output field with a fixed set of answers.

    Attributes:
        field: Name of the output field.
        labels: The answers as strings, in the order of declaration, at least two, without repeats.
        member_names: For an ``Enum``: the label of each member's name. An LM may answer with the name.
    """

    field: str
    labels: tuple[str, ...]
    member_names: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def label_of(self, value: Any) -> str | None:
        """The label that ``value`` stands for, or ``None`` where it is none of them.

        Accepts the value itself, an enum member or its name, and a string that differs in case or outer
        blanks only.
        """
        if value is None:
            return None
        text = _text(value)
        return _matching(text, self.labels) or self.member_names.get(text.strip())


def enumeration(signature: type[dspy.Signature]) -> Enumeration | None:
    """The last enumerated output of ``signature``, or ``None`` where no output is an enumeration."""
    for name, output in reversed(list(signature.output_fields.items())):
        values = _values(output.annotation)
        if values is not None and len(values) >= MIN_LABELS:
            return Enumeration(name, tuple(values), _member_names(output.annotation))
    return None


def enumerated_field(signature: type[dspy.Signature]) -> tuple[str, tuple[str, ...]] | None:
    """Name and labels (as strings) of the last enumerated output of ``signature``, or ``None``."""
    found = enumeration(signature)
    return None if found is None else (found.field, found.labels)


def example_labels(student: dspy.Module, examples: Sequence[dspy.Example]) -> list[str | None]:
    """The class of each example, for stratified shards and held-out parts.

    Returns:
        One label per example: that of the last predictor whose enumerated output is a label of the examples;
        all ``None`` where there is none.
    """
    for _, predictor in reversed(student.named_predictors()):
        found = enumeration(predictor.signature)
        if found is not None and any(found.field in example for example in examples):
            return [found.label_of(example.get(found.field)) for example in examples]
    return [None] * len(examples)


def _matching(text: str, labels: Sequence[str]) -> str | None:
    if text in labels:
        return text
    folded = text.strip().casefold()
    same = [label for label in labels if label.strip().casefold() == folded]
    return same[0] if len(same) == 1 else None


def _parts(annotation: Any) -> list[Any]:
    """The alternatives of a union, without ``None`` and without ``Annotated`` wrappers."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _parts(get_args(annotation)[0])
    if origin is Union or origin is types.UnionType:
        return [part for argument in get_args(annotation) for part in _parts(argument)]
    return [] if annotation is type(None) else [annotation]


def _member_names(annotation: Any) -> dict[str, str]:
    enums = [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, enum.Enum)]
    return {name: _text(member) for part in enums for name, member in part.__members__.items()}


def _values(annotation: Any) -> list[str] | None:
    """All answers as strings in order of declaration, or ``None`` if any alternative is open-ended."""
    parts = _parts(annotation)
    labels: dict[str, None] = {}
    for part in parts:
        if part is bool:
            labels.update({"True": None, "False": None})
        elif isinstance(part, enum.EnumMeta):
            members: Mapping[str, enum.Enum] = part.__members__
            labels.update({_text(member): None for member in members.values()})
        elif get_origin(part) is Literal:
            labels.update({_text(value): None for value in get_args(part) if value is not None})
        else:
            return None
    return list(labels) if parts else None


def _text(value: Any) -> str:
    return str(value.value) if isinstance(value, enum.Enum) else str(value)
