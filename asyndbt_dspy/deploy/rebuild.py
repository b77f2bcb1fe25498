"""A program from the manifest alone, for ``dspy.Predict`` and ``dspy.ChainOfThought`` with plain types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Union

import dspy

from asyndbt_dspy.deploy.public_state import SAMPLING_KEYS
from asyndbt_dspy.errors import ArtifactError

REBUILDABLE: dict[str, type[dspy.Module]] = {
    "dspy.Predict": dspy.Predict,
    "dspy.ChainOfThought": dspy.ChainOfThought,
}
PLAIN: dict[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}
REASONING = "reasoning"


def program_class(program: dspy.Module) -> str:
    """Name of the program's class, for people and for ``rebuilt_program``; it is never imported."""
    for name, cls in REBUILDABLE.items():
        if type(program) is cls:
            return name
    return f"{type(program).__module__}.{type(program).__qualname__}"


def rebuilt_program(manifest: Mapping[str, Any]) -> dspy.Module:
    """A new program with the saved signature and the predictor's own settings, and nothing else.

    Raises:
        ArtifactError: another class, a field whose type JSON does not describe, or a setting that was not written.
    """
    name = manifest.get("program")
    cls = REBUILDABLE.get(name) if isinstance(name, str) else None
    predictors = manifest["signature"]["predictors"]
    if cls is None or len(predictors) != 1:
        raise ArtifactError(
            f"the artifact was saved from a {str(name)[:100]}, which cannot be rebuilt from it; "
            "give a program of the same structure as student=…"
        )
    predictor, record = next(iter(predictors.items()))
    config = _config(manifest, predictor)
    fields: dict[str, tuple[Any, Any]] = {}
    try:
        for field in record["inputs"]:
            fields[field["name"]] = (_type(field), dspy.InputField(**_default(field)))
        for field in record["outputs"]:
            if cls is not dspy.ChainOfThought or field["name"] != REASONING:
                fields[field["name"]] = (_type(field), dspy.OutputField(**_default(field)))
        return cls(dspy.Signature(fields), **config)
    except ArtifactError:
        raise
    except Exception as error:
        # Field names and defaults come from a file: pydantic may refuse them in its own ways.
        raise ArtifactError(
            f"the saved signature cannot be rebuilt: {str(error)[:200]}; give student=…"
        ) from error


def _config(manifest: Mapping[str, Any], predictor: str) -> dict[str, Any]:
    """The saved settings of a predictor: of the sampling alone, whatever the file says."""
    records = manifest.get("config", {})
    record = records.get(predictor, {}) if isinstance(records, dict) else None
    sampling = record.get("sampling", {}) if isinstance(record, dict) else None
    if not isinstance(record, dict) or not isinstance(sampling, dict) or not set(sampling) <= SAMPLING_KEYS:
        raise ArtifactError("the manifest's config of the predictor is not one that is written")
    if record.get("left_out"):
        raise ArtifactError(
            f"the saved predictor had settings that are not written: {str(record['left_out'])[:200]}; give student=…"
        )
    return sampling


def _default(field: Mapping[str, Any]) -> dict[str, Any]:
    return {"default": field["default"]} if "default" in field else {}


def _type(field: Mapping[str, Any]) -> Any:
    found = _from_schema(field.get("schema"))
    if found is None:
        raise ArtifactError(
            f"field {field['name']!r} has type {field['type'][:100]!r}, which cannot be rebuilt; give student=…"
        )
    return found


def _from_schema(schema: Any) -> Any:
    """The type of a simple JSON schema, ``None`` for any other."""
    if not isinstance(schema, dict) or "title" in schema or "$ref" in schema or "$defs" in schema:
        return None
    kind, allowed = schema.get("type"), schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(allowed, list) and allowed and all(isinstance(v, str | int | bool) for v in allowed):
        return Literal[tuple(allowed)]
    if "anyOf" in schema and isinstance(schema["anyOf"], list) and schema["anyOf"]:
        parts = [_from_schema(part) for part in schema["anyOf"]]
        return None if None in parts else Union[tuple(parts)]  # noqa: UP007 - built at run time
    if kind == "array" and set(schema) == {"type", "items"}:
        item = _from_schema(schema["items"])
        return None if item is None else list[item]  # type: ignore[valid-type]
    return PLAIN.get(kind) if isinstance(kind, str) and set(schema) == {"type"} else None
