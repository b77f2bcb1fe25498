"""Copies of programs that share what must not be copied."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import dspy

_LARGE_BYTES = 2**20
_LONG = 1_000
_ARRAYS = ("numpy", "torch")
_CONTAINERS = (list, tuple, set, frozenset)
_WITHOUT_PARTS = (str, bytes, int, float, bool, type, types.ModuleType, types.FunctionType, type(None))


def copy_program(program: dspy.Module, shared: Mapping[int, Any] | None = None) -> dspy.Module:
    """A deep copy, but for ``shared``: the parts that the copy has in common with ``program``, by ``id``.

    Args:
        program: Never changed.
        shared: ``shared_parts(program)``, found out anew where ``None``.
    """
    return copy.deepcopy(program, dict(shared_parts(program) if shared is None else shared))


def shared_parts(program: dspy.Module) -> dict[int, Any]:
    """What a copy of ``program`` must share with it, by ``id``.

    These are the LMs, whose limits and history must stay in one place, wherever the program keeps them; arrays and
    tensors of 1 MiB and more (a search index), as a copy per candidate would fill the memory; and attributes that
    cannot be copied (locks, connections), as in ``dspy.Module.deepcopy``.
    """
    attributes = [value for _, module in program.named_sub_modules() for value in vars(module).values()]
    shared = {id(value): value for value in _reachable(attributes) if _stays_one(value)}
    if _can_be_copied(program, shared):
        return shared
    # Innermost modules first: a list of predictors can be copied once the connection that one of them holds
    # is shared.
    for value in reversed(attributes):
        if not isinstance(value, dspy.Module) and not _can_be_copied(value, shared):
            shared[id(value)] = value
    return shared


def _stays_one(value: Any) -> bool:
    if isinstance(value, dspy.BaseLM):
        return True
    # An array of numpy, a tensor of torch (which may not be installed); nothing else is asked for its size.
    size = getattr(value, "nbytes", None) if type(value).__module__.split(".")[0] in _ARRAYS else None
    return isinstance(size, int) and size >= _LARGE_BYTES


def _reachable(values: Iterable[Any]) -> Iterator[Any]:
    """``values``, what they hold as attributes, and what their containers hold; long containers are data."""
    waiting, seen = list(values), set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _WITHOUT_PARTS):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dspy.BaseLM):
            continue
        waiting.extend(_parts(value))


def _parts(value: Any) -> list[Any]:
    try:
        held = value.values() if isinstance(value, dict) else value if isinstance(value, _CONTAINERS) else ()
        return [*(held if len(held) <= _LONG else ()), *getattr(value, "__dict__", {}).values()]
    except Exception:  # noqa: BLE001 - a user's class answers such questions as it likes
        return []


def _can_be_copied(value: Any, shared: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(shared))
    except Exception:  # noqa: BLE001 - copying runs code of whatever the attributes are
        return False
    return True
