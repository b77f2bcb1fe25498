"""To production: a saved program that is JSON only, and prompts that other software can send.

``save_artifact`` / ``load_artifact`` write and read a folder that is safe to load, ``diff`` and
``evaluate_artifact`` compare and score such folders, ``export_prompt`` gives a predictor's messages with
placeholders, exactly as DSPy's adapter would send them. Each name is imported on first use: ``fill_messages`` needs
the standard library alone, and must not wait for DSPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyndbt_dspy.deploy.artifact import Artifact, load_artifact, read_artifact, save_artifact
    from asyndbt_dspy.deploy.comparison import ArtifactDiff, diff
    from asyndbt_dspy.deploy.evaluation import Evaluation, evaluate_artifact
    from asyndbt_dspy.deploy.filling import fill_messages
    from asyndbt_dspy.deploy.prompts import PredictorPrompt, export_prompt, find_predictor, format_inputs

__all__ = [
    "Artifact",
    "ArtifactDiff",
    "Evaluation",
    "PredictorPrompt",
    "diff",
    "evaluate_artifact",
    "export_prompt",
    "fill_messages",
    "find_predictor",
    "format_inputs",
    "load_artifact",
    "read_artifact",
    "save_artifact",
]

# Public name -> the module that defines it; a name that is not listed is an error.
_HOMES = {
    "Artifact": "asyndbt_dspy.deploy.artifact",
    "ArtifactDiff": "asyndbt_dspy.deploy.comparison",
    "Evaluation": "asyndbt_dspy.deploy.evaluation",
    "PredictorPrompt": "asyndbt_dspy.deploy.prompts",
    "diff": "asyndbt_dspy.deploy.comparison",
    "evaluate_artifact": "asyndbt_dspy.deploy.evaluation",
    "export_prompt": "asyndbt_dspy.deploy.prompts",
    "fill_messages": "asyndbt_dspy.deploy.filling",
    "find_predictor": "asyndbt_dspy.deploy.prompts",
    "format_inputs": "asyndbt_dspy.deploy.prompts",
    "load_artifact": "asyndbt_dspy.deploy.artifact",
    "read_artifact": "asyndbt_dspy.deploy.artifact",
    "save_artifact": "asyndbt_dspy.deploy.artifact",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
