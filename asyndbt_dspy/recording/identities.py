"""Hashes of code, programs and examples: equal content, equal hash, in any process on any machine."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import dspy

from asyndbt_dspy.deploy.fingerprints import canonical_json, jsonable, sha256_of, signature_record

_LIBRARIES = ("dspy.", "asyndbt_dspy.")
"""Code of these is told apart by their versions, which the manifest has."""
_PASSING = frozenset({"callbacks", "history", "lm", "demos", "traces", "train", "signature", "stage"})
"""Attributes of a module that are hashed elsewhere, or that say nothing of what it answers."""
_DEPTH = 3


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, in hexadecimal."""
    return sha256_of(canonical_json(value))


def code_identity(subject: Any, depth: int = _DEPTH) -> Any:
    """JSON data that differs where a function, class or callable object may behave differently.

    Source text where there is one, else bytecode; defaults, closures and ``functools.partial`` arguments where they are
    plain data. Functions that it calls are not followed.
    """
    if isinstance(subject, functools.partial):
        arguments = [_value(one, depth) for one in subject.args]
        named = {name: _value(one, depth) for name, one in sorted(subject.keywords.items())}
        return ["partial", code_identity(subject.func, depth), arguments, named]
    if isinstance(subject, types.MethodType):
        return ["method", code_identity(subject.__func__, depth), _value(subject.__self__, depth)]
    if isinstance(subject, types.FunctionType):
        closure = [
            _value(cell.cell_contents, depth - 1) for cell in subject.__closure__ or () if _is_full(cell)
        ]
        defaults = [_value(one, depth - 1) for one in subject.__defaults__ or ()]
        return [f"{subject.__module__}.{subject.__qualname__}", _source(subject), defaults, closure]
    if isinstance(subject, type):
        return [f"{subject.__module__}.{subject.__qualname__}", _source(subject)]
    if isinstance(subject, types.BuiltinFunctionType):
        return f"{subject.__module__}.{subject.__qualname__}"
    return ["object", code_identity(type(subject), depth), _state(subject, depth - 1)]


def code_name(subject: Any) -> str:
    """Where a function, class or callable object is defined."""
    while isinstance(subject, functools.partial):
        subject = subject.func
    named = subject if hasattr(subject, "__qualname__") else type(subject)
    return f"{named.__module__}.{named.__qualname__}"


def structure_identity(program: dspy.Module) -> Any:
    """Modules of a program by path: their classes' code and their plain settings; no instructions or demos."""
    return [
        [path, code_identity(type(module)), _state(module, _DEPTH)]
        for path, module in program.named_sub_modules()
        if isinstance(module, dspy.Module)
    ]


def predictors_identity(program: dspy.Module) -> Any:
    """Per predictor its fields, instructions, demos and settings; no LM."""
    found = []
    for name, predictor in program.named_predictors():
        signature = predictor.signature
        fields = [[key, jsonable(field.json_schema_extra or {})] for key, field in signature.fields.items()]
        found.append(
            [
                name,
                signature_record(signature)["sha256"],
                signature.instructions,
                fields,
                [_fields(demo) for demo in predictor.demos],
                jsonable(dict(getattr(predictor, "config", None) or {})),
            ]
        )
    return found


def example_digest(example: dspy.Example) -> str:
    """Of fields, values, and which of them are inputs."""
    inputs = sorted(getattr(example, "_input_keys", None) or ())
    return digest([_fields(example), inputs])


def data_identity(examples: Sequence[dspy.Example]) -> str:
    """Number of examples and a hash of all of them, in order."""
    whole = hashlib.sha256("".join(map(example_digest, examples)).encode()).hexdigest()
    return f"{len(examples)} examples, {whole}"


def versions() -> dict[str, str]:
    """Of the libraries whose code decides what a program sends."""
    return {"dspy": dspy.__version__, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}


def _fields(example: Any) -> Any:
    return (
        jsonable(dict(example.items())) if isinstance(example, dspy.Example | Mapping) else jsonable(example)
    )


@functools.lru_cache(maxsize=256)
def _source(subject: Any) -> str:
    """A hash of the source text, else of the bytecode; a library's code is told apart by its name."""
    if f"{subject.__module__}.".startswith(_LIBRARIES):
        return "library"
    try:
        return sha256_of(inspect.getsource(subject).encode("utf-8", "surrogatepass"))
    except (OSError, TypeError):
        pass  # written at a prompt: no source, hence the bytecode
    functions = [subject] if isinstance(subject, types.FunctionType) else vars(subject).values()
    codes = [one.__code__ for one in functions if isinstance(one, types.FunctionType)]
    return sha256_of(repr([_bytecode(code) for code in codes]).encode("utf-8", "surrogatepass"))


def _bytecode(code: types.CodeType) -> Any:
    return [code.co_code.hex(), code.co_names, [_constant(one) for one in code.co_consts]]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _bytecode(value)
    # The order of a set differs from process to process.
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _state(subject: Any, depth: int) -> Any:
    attributes = getattr(subject, "__dict__", {})
    return {
        name: _value(value, depth)
        for name, value in sorted(attributes.items())
        if not name.startswith("_") and name not in _PASSING
    }


def _value(value: Any, depth: int) -> Any:
    """Plain data as it is, callables by their code, anything else by its type."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    if depth <= 0:
        return type(value).__qualname__
    if isinstance(value, dspy.Module | dspy.BaseLM):
        return type(value).__qualname__  # a module has a path of its own
    if isinstance(value, Mapping):
        return [[str(key), _value(one, depth - 1)] for key, one in value.items()]
    if isinstance(value, list | tuple):
        return [_value(one, depth - 1) for one in value]
    if isinstance(value, dspy.Tool):
        return ["tool", value.name, code_identity(value.func, depth - 1)]
    if callable(value):
        return code_identity(value, depth - 1)
    return type(value).__qualname__
