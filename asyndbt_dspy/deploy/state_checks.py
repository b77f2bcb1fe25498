"""Checks of ``program.json`` before DSPy reads it: known keys and plain values only, so that nothing can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyndbt_dspy.deploy.manifest import PROGRAM
from asyndbt_dspy.deploy.public_state import BUILTIN_LM_CLASS, ENGINES, LM_CLASS_KEY, LM_KEYS
from asyndbt_dspy.errors import ArtifactError

# `fields` holds DSPy's decision criteria; DSPy validates them itself.
PREDICTOR_KEYS = {"traces", "train", "demos", "signature", "lm", "fields"}
REQUIRED_KEYS = PREDICTOR_KEYS - {"fields"}
MARK = "augmented"


def check_state(state: Mapping[str, Any], fields: Mapping[str, Sequence[str]]) -> None:
    """Refuse a state that has anything but instructions, descriptions, demos and built-in LMs.

    Args:
        state: DSPy's states by predictor.
        fields: The signatures' field names in order, by predictor.

    Raises:
        ArtifactError: names the predictor and the key.
    """
    names = {name for name in state if name != "metadata"}
    if names != set(fields):
        raise ArtifactError(
            f"{PROGRAM} holds the predictors {_short(names)}, the student has {_short(fields)}"
        )
    if not isinstance(state.get("metadata"), dict | None):
        raise ArtifactError(f"{PROGRAM}: 'metadata' must be an object")
    for name, field_names in fields.items():
        _check_predictor(f"{PROGRAM}: predictor {name!r}", state[name], field_names)


def _check_predictor(where: str, state: Any, fields: Sequence[str]) -> None:
    if not isinstance(state, dict):
        raise ArtifactError(f"{where} must be an object")
    odd = sorted(set(state) - PREDICTOR_KEYS) + sorted(REQUIRED_KEYS - set(state))
    if odd:
        raise ArtifactError(f"{where}: unknown or missing keys {_short(odd)}")
    if state["traces"] != [] or state["train"] != []:
        raise ArtifactError(f"{where}: traces and train must be empty")
    if not isinstance(state.get("fields", {}), dict):
        raise ArtifactError(f"{where}: 'fields' must be an object")
    _check_signature(where, state["signature"], fields)
    _check_demos(where, state["demos"], fields)
    if state["lm"] is not None:
        _check_lm(where, state["lm"])


def _check_signature(where: str, signature: Any, fields: Sequence[str]) -> None:
    if not isinstance(signature, dict) or set(signature) != {"instructions", "fields"}:
        raise ArtifactError(f"{where}: signature must hold instructions and fields, nothing else")
    if not isinstance(signature["instructions"], str):
        raise ArtifactError(f"{where}: instructions must be a string")
    saved = signature["fields"]
    if not isinstance(saved, list) or len(saved) != len(fields):
        raise ArtifactError(f"{where}: signature must list {len(fields)} fields: {_short(fields)}")
    for item in saved:
        if not isinstance(item, dict) or set(item) != {"prefix", "description"}:
            raise ArtifactError(f"{where}: a field must hold prefix and description, nothing else")
        if not all(isinstance(text, str) for text in item.values()):
            raise ArtifactError(f"{where}: prefix and description must be strings")


def _check_demos(where: str, demos: Any, fields: Sequence[str]) -> None:
    if not isinstance(demos, list):
        raise ArtifactError(f"{where}: demos must be a list")
    for number, demo in enumerate(demos):
        if not isinstance(demo, dict) or not set(demo) <= {*fields, MARK}:
            raise ArtifactError(
                f"{where}: demo {number} must hold fields of the signature only: {_short(fields)}"
            )
        if not isinstance(demo.get(MARK, True), bool):
            raise ArtifactError(f"{where}: demo {number}: 'augmented' must be true or false")


def _check_lm(where: str, lm: Any) -> None:
    if not isinstance(lm, dict):
        raise ArtifactError(f"{where}: lm must be an object or null")
    if lm.get(LM_CLASS_KEY) != BUILTIN_LM_CLASS:
        raise ArtifactError(
            f"{where}: unknown LM class {str(lm.get(LM_CLASS_KEY))[:100]!r}; only {BUILTIN_LM_CLASS} is rebuilt. "
            "Give other LMs with load_artifact(..., lms={predictor: lm})"
        )
    odd = sorted(set(lm) - LM_KEYS)
    if odd:
        raise ArtifactError(f"{where}: lm has settings that are never saved: {_short(odd)}")
    if not isinstance(lm.get("model"), str) or not lm["model"]:
        raise ArtifactError(f"{where}: lm.model must be a non-empty string")
    if lm.get("engine", "auto") not in ENGINES:
        raise ArtifactError(f"{where}: lm.engine must be one of {', '.join(ENGINES)}")
    for key, value in lm.items():
        is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if not is_list and not isinstance(value, bool | int | float | str | None):
            raise ArtifactError(f"{where}: lm.{key} must be a plain value")


def _short(names: Any) -> str:
    text = ", ".join(repr(str(name)[:60]) for name in list(names)[:8])
    return f"[{text}{', …' if len(list(names)) > 8 else ''}]"
