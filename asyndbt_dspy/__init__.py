"""AsynDBT for DSPy: optimize a program's instructions and demos over asynchronous, distributed workers.

    from asyndbt_dspy import AsynDBT

    optimized = AsynDBT(metric=metric, auto="light").compile(program, trainset=trainset)

Importing the package opens no connection and loads neither DSPy nor torch nor any optional library: each public
name is imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

# LiteLLM fetches a price table from the network when it is imported, unless told to use the one it ships.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

if TYPE_CHECKING:
    from asyndbt_dspy.core.budget import Budget
    from asyndbt_dspy.engines.local import LocalEngine
    from asyndbt_dspy.engines.ray import RayEngine
    from asyndbt_dspy.engines.simulated import SimulatedEngine
    from asyndbt_dspy.errors import (
        ArtifactError,
        AsynDBTError,
        BudgetExceededError,
        ConfigurationError,
        ExportError,
        JournalError,
        MetricError,
        NoLiveWorkersError,
        ProgramFailedError,
        ProtocolError,
        ResumeError,
        WorkerFailedError,
    )
    from asyndbt_dspy.lms.estimates import Estimate
    from asyndbt_dspy.lms.local import local_lm
    from asyndbt_dspy.lms.prices import Price
    from asyndbt_dspy.lms.scripted import scripted_lm
    from asyndbt_dspy.optimizer import AsynDBT
    from asyndbt_dspy.remote import RolloutHost
    from asyndbt_dspy.runs.result import Result
    from asyndbt_dspy.workers import Worker

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "AsynDBT",
    "AsynDBTError",
    "Budget",
    "BudgetExceededError",
    "ConfigurationError",
    "Estimate",
    "ExportError",
    "JournalError",
    "LocalEngine",
    "MetricError",
    "NoLiveWorkersError",
    "Price",
    "ProgramFailedError",
    "ProtocolError",
    "RayEngine",
    "Result",
    "ResumeError",
    "RolloutHost",
    "SimulatedEngine",
    "Worker",
    "WorkerFailedError",
    "local_lm",
    "scripted_lm",
]

# Public name -> the module that defines it; a name that is not listed is an error.
_HOMES = {
    "AsynDBT": "asyndbt_dspy.optimizer",
    "Budget": "asyndbt_dspy.core.budget",
    "Estimate": "asyndbt_dspy.lms.estimates",
    "LocalEngine": "asyndbt_dspy.engines.local",
    "Price": "asyndbt_dspy.lms.prices",
    "RayEngine": "asyndbt_dspy.engines.ray",
    "Result": "asyndbt_dspy.runs.result",
    "RolloutHost": "asyndbt_dspy.remote",
    "SimulatedEngine": "asyndbt_dspy.engines.simulated",
    "Worker": "asyndbt_dspy.workers",
    "local_lm": "asyndbt_dspy.lms.local",
    "scripted_lm": "asyndbt_dspy.lms.scripted",
    **{name: "asyndbt_dspy.errors" for name in __all__ if name.endswith("Error")},
}

# What a name needs beside the package's own dependencies: the extra, and the libraries that it cannot be imported without.
_EXTRAS = {
    "RayEngine": ("ray", ("ray",)),
    "local_lm": ("local", ("torch", "transformers", "llguidance")),
}


def _has_its_libraries(name: str) -> bool:
    _, libraries = _EXTRAS.get(name, ("", ()))
    # A stand-in that someone has put among the modules has no spec.
    return all((sys.modules.get(one) or importlib.util.find_spec(one)) is not None for one in libraries)


if not TYPE_CHECKING:
    # `import *`, pydoc and inspect ask for every name that is listed, and one that cannot be had would fail them all.
    __all__ = [name for name in __all__ if _has_its_libraries(name)]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        if name not in _EXTRAS:
            raise
        remedy = f"pip install 'asyndbt-dspy[{_EXTRAS[name][0]}]'"
        raise ModuleNotFoundError(f"{name} needs {error.name}: {remedy}", name=error.name) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
