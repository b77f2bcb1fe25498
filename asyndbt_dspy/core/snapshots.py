"""Plain data of a machine, complete: two machines that behave alike from here on have equal snapshots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.effects import EffectKeys
from asyndbt_dspy.core.policies import WorkerSpace
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.core.space import Space

_GIVEN = (Space, WorkerSpace, AlgorithmConfig, EffectKeys, Layout)
"""What a machine was built with and never changes."""


def snapshot(machine: object) -> dict[str, Any]:
    """Every attribute of ``machine`` that can change, as JSON data; not-a-number becomes ``"nan"``."""
    return {
        name: plain(value) for name, value in _attributes(machine).items() if not isinstance(value, _GIVEN)
    }


def plain(value: Any) -> Any:
    """``value`` as JSON data: arrays become lists, mappings lists of pairs (sorted), objects their attributes."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return sorted(([plain(key), plain(item)] for key, item in value.items()), key=repr)
    if isinstance(value, AbstractSet):
        return sorted((plain(item) for item in value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if _attributes(value) and not isinstance(value, _GIVEN):
        return [type(value).__name__, snapshot(value)]
    return type(value).__name__


def _attributes(value: object) -> dict[str, Any]:
    """Those of an object of ours; messages have slots."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    return getattr(value, "__dict__", {})
