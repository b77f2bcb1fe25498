"""Rollouts as JSON, and back: scores exactly, traces with the values that the predictors saw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import dspy
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from asyndbt_dspy.deploy.fingerprints import canonical_json, jsonable
from asyndbt_dspy.errors import AsynDBTError
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs.rollout import Rollout

_PLAIN = (str, int, bool, type(None))
_APART = ("trace", "prediction")
"""Fields of a rollout that are text of the program; only runs whose trace was asked for need them again."""


class UnrecordableError(AsynDBTError):
    """A trace holds a value that JSON cannot carry and give back equal."""


@dataclass(frozen=True, slots=True)
class RecordedRollout:
    """A rollout that was paid for.

    Attributes:
        key: Content of program, example, LM and sampling, SHA-256.
        rollout: Without its trace, which is in ``trace``.
        usage: LM calls, prompt tokens and completion tokens.
        trace: As recorded, ``None`` where none was asked for.
        is_repeatable: The LM answers so every time: any run may use it.
        is_shared: An earlier run paid for it.
    """

    key: bytes
    rollout: Rollout
    usage: tuple[int, int, int]
    trace: Any = None
    is_repeatable: bool = False
    is_shared: bool = False

    @property
    def is_answer(self) -> bool:
        """Whether asking again would bring the same: a score, or an example that the LM refuses."""
        return self.rollout.score is not None or self.rollout.failure is FailureKind.EXAMPLE


def encode_rollout(rollout: Rollout, program: dspy.Module) -> dict[str, Any]:
    """JSON data of a rollout of ``program``; what is ``None`` is left out.

    Raises:
        UnrecordableError: see there.
    """
    plain = {one.name: getattr(rollout, one.name) for one in fields(Rollout) if one.name not in _APART}
    found: dict[str, Any] = {name: value for name, value in plain.items() if value is not None}
    if rollout.failure is not None:
        found["failure"] = rollout.failure.value
    found["seconds"] = round(rollout.seconds, 6)
    if rollout.trace is not None:
        found["trace"] = _encode_trace(rollout.trace, program)
        if rollout.prediction is not None:
            prediction = rollout.prediction
            is_fields = isinstance(prediction, dspy.Example | Mapping)
            found["prediction"] = jsonable(dict(prediction.items()) if is_fields else prediction)
    return found


def decode_rollout(entry: Mapping[str, Any]) -> RecordedRollout:
    """Inverse of ``encode_rollout``, with key and usage of the entry."""
    failure, prediction = entry.get("failure"), entry.get("prediction")
    plain: dict[str, Any] = {"score": None}
    for name in (one.name for one in fields(Rollout)):
        if name in entry and name not in _APART:
            plain[name] = tuple(entry[name]) if isinstance(entry[name], list) else entry[name]
    plain["failure"] = None if failure is None else FailureKind(failure)
    plain["prediction"] = dspy.Prediction(**prediction) if isinstance(prediction, Mapping) else prediction
    rollout = Rollout(**plain)
    key, usage = bytes.fromhex(entry["key"]), tuple(entry["usage"])
    return RecordedRollout(key, rollout, usage, entry.get("trace"), "repeatable" in entry, "shared" in entry)


def _encode_trace(trace: list[Any], program: dspy.Module) -> list[Any]:
    """(predictor's name, inputs, outputs) per call, ``None`` for calls of predictors that the program does not name."""
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    found: list[Any] = []
    for predictor, inputs, prediction in trace:
        name = names.get(id(predictor))
        if name is None or not isinstance(prediction, dspy.Prediction):
            found.append(None)  # the place of a call in its trace names the demo that is made of it
            continue
        signature = predictor.signature
        asked = {
            key: _encode_value(f.annotation, inputs[key]) for key, f in _held(signature.input_fields, inputs)
        }
        said = {
            key: _encode_value(f.annotation, prediction[key])
            for key, f in _held(signature.output_fields, prediction)
        }
        found.append([name, asked, said])
    return found


def decode_trace(trace: list[Any], program: dspy.Module) -> list[Any]:
    """The trace with the predictors of ``program``, as ``dspy.settings.trace`` holds it."""
    predictors = dict(program.named_predictors())
    found: list[Any] = []
    for call in trace:
        if call is None:
            found.append((None, {}, None))
            continue
        name, asked, said = call
        predictor = predictors[name]
        fields = predictor.signature.fields
        inputs = {key: _decode_value(fields[key].annotation, value) for key, value in asked.items()}
        outputs = {key: _decode_value(fields[key].annotation, value) for key, value in said.items()}
        found.append((predictor, inputs, dspy.Prediction(**outputs)))
    return found


def _held(fields: Mapping[str, Any], values: Any) -> list[tuple[str, Any]]:
    return [(name, field) for name, field in fields.items() if name in values]


def _encode_value(annotation: Any, value: Any) -> Any:
    """``[value]`` of plain JSON data, ``{"typed": …}`` of what the field's type can read again."""
    if is_json(value):
        return [value]
    try:
        plain = TypeAdapter(annotation).dump_python(value, mode="json", warnings="error")
        canonical_json(plain)
    except (PydanticUserError, PydanticSerializationError, TypeError, ValueError) as error:
        raise UnrecordableError(f"a {type(value).__qualname__} has no JSON form: {error}") from error
    again = _decode_value(annotation, {"typed": plain})
    if type(again) is not type(value) or again != value:
        raise UnrecordableError(f"a {type(value).__qualname__} does not come back equal from JSON")
    return {"typed": plain}


def _decode_value(annotation: Any, encoded: Any) -> Any:
    if isinstance(encoded, list):
        return encoded[0]
    try:
        return TypeAdapter(annotation).validate_python(encoded["typed"])
    except (PydanticUserError, ValidationError, TypeError) as error:
        raise UnrecordableError(f"a recorded value does not fit its field: {error}") from error


def is_json(value: Any) -> bool:
    """Whether JSON gives ``value`` back exactly, types included."""
    if type(value) is dict:
        return all(type(key) is str and is_json(one) for key, one in value.items())
    if type(value) is list:
        return all(map(is_json, value))
    return type(value) in _PLAIN or (type(value) is float and math.isfinite(value))
