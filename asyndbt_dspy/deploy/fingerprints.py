"""Hashes that say whether two signatures, data sets or files are the same. All are SHA-256, in hexadecimal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import dspy
from dspy.adapters.utils import get_annotation_name, serialize_for_json
from pydantic import PydanticUserError, TypeAdapter
from pydantic_core import PydanticUndefined


def canonical_json(value: Any) -> bytes:
    """``value`` as JSON with sorted keys and no blanks: equal values give equal bytes.

    Raises:
        ValueError: NaN or an infinity.
        TypeError: something that is no JSON.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")


def sha256_of(content: bytes) -> str:
    """SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()


def signature_record(signature: type[dspy.Signature]) -> dict[str, Any]:
    """Names, types and order of the fields, as plain JSON with their hash.

    Instructions and descriptions are not part of it: they are what an optimizer changes. The type's JSON
    schema is, so that a model or an enumeration that changed its content changes the hash.
    """
    fields = {
        "inputs": [_field_record(name, field) for name, field in signature.input_fields.items()],
        "outputs": [_field_record(name, field) for name, field in signature.output_fields.items()],
    }
    return {**fields, "sha256": sha256_of(canonical_json(fields))}


def program_record(program: dspy.Module) -> dict[str, Any]:
    """The signatures of all predictors, by name, with one hash for all."""
    predictors = {name: signature_record(p.signature) for name, p in program.named_predictors()}
    hashes = [[name, record["sha256"]] for name, record in predictors.items()]
    return {"predictors": predictors, "sha256": sha256_of(canonical_json(hashes))}


def data_record(examples: Iterable[Any]) -> dict[str, Any]:
    """Number and hash of examples (fields, values and which are inputs, in order). No text is kept."""
    digest = hashlib.sha256()
    count = 0
    for example in examples:
        fields = dict(example.items()) if isinstance(example, dspy.Example | Mapping) else {"value": example}
        inputs = sorted(getattr(example, "_input_keys", None) or ())
        digest.update(canonical_json([hashable_json(fields), inputs]))
        count += 1
    return {"examples": count, "sha256": digest.hexdigest()}


def jsonable(value: Any) -> Any:
    """``value`` as JSON data, by way of DSPy's own rules; what has no JSON form becomes its ``str``."""
    plain = serialize_for_json(value)
    try:
        canonical_json(plain)
    except (TypeError, ValueError):
        return str(value)
    return plain


def hashable_json(value: Any) -> Any:
    """``jsonable``, the same in every process: sets are sorted, as their order hangs on the process."""
    return jsonable(_with_sorted_sets(value))


def _with_sorted_sets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_sorted_sets(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_with_sorted_sets(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(hashable_json, value), key=canonical_json)
    return value


def _field_record(name: str, field: Any) -> dict[str, Any]:
    record: dict[str, Any] = {"name": name, "type": get_annotation_name(field.annotation)}
    schema = _schema(field.annotation)
    if schema is not None:
        record["schema"] = schema
    if field.default is not PydanticUndefined:
        record["default"] = jsonable(field.default)
    return record


def _schema(annotation: Any) -> Any:
    try:
        return TypeAdapter(annotation).json_schema()
    except (PydanticUserError, TypeError, ValueError, AttributeError):
        # A type without a JSON schema is told apart by its name alone.
        return None
