"""Hashes of code, programs and examples: equal content, equal hash, in any process on any machine."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import enum
import functools
import hashlib
import inspect
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import dspy
from pydantic import BaseModel

from asyndbt_dspy.deploy.fingerprints import (
    canonical_json,
    hashable_json,
    jsonable,
    sha256_of,
    signature_record,
)
from asyndbt_dspy.lms.identity import lm_identity

_LIBRARIES = ("dspy.", "asyndbt_dspy.")
"""Code of these is told apart by their versions, which the manifest has."""
_PASSING = frozenset(
    {"callbacks", "history", "lm", "demos", "traces", "train", "signature", "stage", "_compiled"}
)
"""Attributes of a module that are hashed elsewhere, or that say nothing of what it answers."""
_DEPTH = 3
_OBJECT_DEPTH = 5
"""Of a callable object or a bound method: what it wraps is a step further away."""
_TIMES = datetime.date | datetime.time | datetime.timedelta
_SECRET = re.compile(r"api_?key|secret|passw|credential|authorization|(access|auth)_?token", re.IGNORECASE)
"""Names of private attributes that change nothing of what is answered, and do not travel to other nodes."""


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value``, in hexadecimal."""
    return sha256_of(canonical_json(value))


class FirstSeen:
    """Identities of functions and objects as they were when they were first asked for, while they live.

    Those that all candidates of a run share may count or remember what they are asked; that makes no other program of the
    next candidate.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, int], tuple[weakref.ref[Any], Any]] = {}

    def identity(self, subject: Any, depth: int, make: Callable[[Any, int], Any]) -> Any:
        key = (id(subject), depth)
        ref, found = self._found.get(key, (None, None))
        if ref is not None and ref() is subject:
            return found
        found = make(subject, depth)
        with contextlib.suppress(TypeError):  # not every kind of object has weak references
            self._found[key] = weakref.ref(subject, lambda _: self._found.pop(key, None)), found
        return found


def code_identity(subject: Any) -> Any:
    """JSON data that differs where a function, class or callable object may behave differently.

    Source text where there is one, else bytecode; defaults, closures, ``functools.partial`` arguments and attributes where
    they are data or code; of a ``dspy.Module`` also its predictors. Functions that it calls are not followed.
    """
    is_direct = isinstance(subject, types.FunctionType | functools.partial)
    return _Reader(follows_modules=True).code(subject, _DEPTH if is_direct else _OBJECT_DEPTH)


def code_name(subject: Any) -> str:
    """Where a function, class or callable object is defined."""
    while isinstance(subject, functools.partial):
        subject = subject.func
    named = subject if hasattr(subject, "__qualname__") else type(subject)
    return f"{named.__module__}.{named.__qualname__}"


def structure_identity(program: dspy.Module, first_seen: FirstSeen | None = None) -> Any:
    """Modules of a program by path: their classes' code and their plain settings; no instructions or demos."""
    reader = _Reader(follows_modules=False, first_seen=first_seen)
    return [
        [path, reader.code(type(module), _DEPTH), reader.state(module, _DEPTH)]
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
    return hashable_json(dict(example.items()) if isinstance(example, dspy.Example | Mapping) else example)


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


def _text(value: Any) -> str:
    return canonical_json(value).decode("utf-8", "surrogatepass")


def _attributes(subject: Any) -> Iterator[tuple[str, Any]]:
    """In the order of their names; what a ``cached_property`` keeps is none of them."""
    slots = [vars(one).get("__slots__", ()) for one in type(subject).__mro__]
    names = {name for one in slots for name in ((one,) if isinstance(one, str) else one)}
    for name in sorted(names | set(getattr(subject, "__dict__", {}))):
        is_kept = isinstance(getattr(type(subject), name, None), functools.cached_property)
        if hasattr(subject, name) and not is_kept and (name == "__wrapped__" or not name.startswith("__")):
            yield name, getattr(subject, name)


def _fields_of(value: Any) -> dict[str, Any] | None:
    """Of a record: a dataclass, a Pydantic model or an example."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    if isinstance(value, BaseModel):
        return dict(value)
    return dict(value.items()) if isinstance(value, dspy.Example) else None


def _is_data(value: Any, depth: int) -> bool:
    """Whether ``value`` says something and is data throughout, as far as it is read."""
    if isinstance(value, bool | int | float | str | bytes | bytearray):
        return True
    if isinstance(value, enum.Enum | Decimal | re.Pattern | _TIMES):
        return True
    if isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    elif isinstance(value, Mapping):
        if not all(key is None or _is_data(key, _DEPTH) for key in value):
            return False
        inner = list(value.values())
    else:
        inner = list((_fields_of(value) or {}).values())
    return bool(inner) and (depth <= 0 or all(one is None or _is_data(one, depth - 1) for one in inner))


class _Reader:
    """Makes data of code and of what it holds, to a depth.

    Args:
        follows_modules: Read the predictors of a ``dspy.Module`` that is met, and LMs; within a program, modules have a
            path of their own and the LMs are hashed elsewhere.
        first_seen: See there.
    """

    def __init__(self, *, follows_modules: bool, first_seen: FirstSeen | None = None) -> None:
        self._follows_modules = follows_modules
        self._first_seen = first_seen or FirstSeen()

    def code(self, subject: Any, depth: int) -> Any:
        """See ``code_identity``."""
        if isinstance(subject, functools.partial):
            arguments = [self.value(one, depth) for one in subject.args]
            named = {name: self.value(one, depth) for name, one in sorted(subject.keywords.items())}
            return ["partial", self.code(subject.func, depth), arguments, named]
        if isinstance(subject, types.MethodType):
            return ["method", self.code(subject.__func__, depth), self._owner(subject.__self__, depth)]
        if isinstance(subject, type):
            return [f"{subject.__module__}.{subject.__qualname__}", _source(subject)]
        if isinstance(subject, types.BuiltinFunctionType):
            return f"{subject.__module__}.{subject.__qualname__}"
        if isinstance(subject, types.FunctionType):
            return self._first_seen.identity(subject, depth, self._function)
        if isinstance(subject, dspy.Module) and self._follows_modules:
            return self._module(subject)
        return self._first_seen.identity(subject, depth, self._object)

    def state(self, subject: Any, depth: int) -> dict[str, Any]:
        """Attributes; private ones where they are data, or code of what is no program."""
        found = {}
        is_module = isinstance(subject, dspy.Module)
        is_library = is_module and f"{type(subject).__module__}.".startswith(_LIBRARIES)
        for name, value in _attributes(subject):
            if name.startswith("_") and (is_library or _SECRET.search(name)):
                continue
            if name in _PASSING and (is_module or not (self._follows_modules and name == "lm")):
                continue
            if name.startswith("_") and not _is_data(value, depth):
                # Of a private attribute that is made on demand, as connections are, nothing is to be seen.
                is_code = callable(value) or isinstance(value, dspy.BaseLM)
                if not is_code or not (self._follows_modules or name == "__wrapped__"):
                    continue
            found[name] = self.value(value, depth)
        return found

    def value(self, value: Any, depth: int) -> Any:
        """Data as it is, callables by their code, anything else by its type."""
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return repr(value)
        if isinstance(value, bytes | bytearray):
            return ["bytes", sha256_of(bytes(value))]
        if isinstance(value, enum.Enum):
            return ["enum", type(value).__qualname__, value.name, self.value(value.value, depth - 1)]
        if isinstance(value, Decimal | _TIMES):
            return [type(value).__qualname__, str(value)]
        if isinstance(value, re.Pattern):
            return ["pattern", self.value(value.pattern, depth), value.flags]
        if isinstance(value, set | frozenset) and depth > -_DEPTH:
            # The order of a set differs from process to process.
            return ["set", sorted(_text(self.value(one, depth - 1)) for one in value)]
        if depth <= 0:
            return type(value).__qualname__
        if isinstance(value, dspy.Module):
            return self._module(value) if self._follows_modules else type(value).__qualname__
        if isinstance(value, dspy.BaseLM):
            return lm_identity(value) if self._follows_modules else type(value).__qualname__
        if isinstance(value, Mapping):
            return [[self._key(key), self.value(one, depth - 1)] for key, one in value.items()]
        if isinstance(value, list | tuple):
            return [self.value(one, depth - 1) for one in value]
        if isinstance(value, dspy.Tool):
            return ["tool", value.name, self.code(value.func, depth - 1)]
        if callable(value):
            return self.code(value, depth - 1)
        fields = _fields_of(value)
        if fields is not None:
            named = {str(name): self.value(one, depth - 1) for name, one in fields.items()}
            return ["record", type(value).__qualname__, named]
        return type(value).__qualname__

    def _key(self, key: Any) -> str:
        is_text = key is None or isinstance(key, str | int | float | tuple)
        return str(key) if is_text else _text(self.value(key, _DEPTH))

    def _function(self, subject: types.FunctionType, depth: int) -> Any:
        closure = [
            self.value(cell.cell_contents, depth - 1) for cell in subject.__closure__ or () if _is_full(cell)
        ]
        defaults = [self.value(one, depth - 1) for one in subject.__defaults__ or ()]
        found = [f"{subject.__module__}.{subject.__qualname__}", _source(subject), defaults, closure]
        named = {name: one for name, one in (subject.__kwdefaults__ or {}).items() if one is not None}
        return [*found, self.value(named, depth)] if named else found

    def _object(self, subject: Any, depth: int) -> Any:
        return ["object", self.code(type(subject), depth), self.state(subject, depth - 1)]

    def _owner(self, subject: Any, depth: int) -> Any:
        """Of a bound method."""
        if isinstance(subject, type | dspy.Module) or depth <= 0:
            return self.value(subject, depth)
        return self.code(subject, depth + 1)  # deeper by no more: it may hold its own methods

    def _module(self, module: dspy.Module) -> Any:
        lms = [getattr(predictor, "lm", None) for _, predictor in module.named_predictors()]
        content = [structure_identity(module), predictors_identity(module), [lm_identity(one) for one in lms]]
        return ["module", type(module).__qualname__, digest(content)]
