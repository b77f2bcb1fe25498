"""Copies of programs that share what must not be copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import dspy


def copy_program(program: dspy.Module, shared: Mapping[int, Any] | None = None) -> dspy.Module:
    """A deep copy, but for ``shared``: the parts that the copy has in common with ``program``, by ``id``.

    Args:
        program: Never changed.
        shared: ``shared_parts(program)``, found out anew where ``None``.
    """
    return copy.deepcopy(program, dict(shared_parts(program) if shared is None else shared))


def shared_parts(program: dspy.Module) -> dict[int, Any]:
    """What a copy of ``program`` must share with it, by ``id``.

    These are the LMs, whose limits and history must stay in one place, and attributes that cannot be copied
    (locks, connections), as in ``dspy.Module.deepcopy``.
    """
    attributes = [value for _, module in program.named_sub_modules() for value in vars(module).values()]
    shared = {id(value): value for value in attributes if isinstance(value, dspy.BaseLM)}
    if _can_be_copied(program, shared):
        return shared
    # Innermost modules first: a list of predictors can be copied once the connection that one of them holds
    # is shared.
    for value in reversed(attributes):
        if not isinstance(value, dspy.Module) and not _can_be_copied(value, shared):
            shared[id(value)] = value
    return shared


def _can_be_copied(value: Any, shared: Mapping[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(shared))
    except Exception:  # noqa: BLE001 - copying runs code of whatever the attributes are
        return False
    return True
