"""To production: a saved program that is JSON only, and prompts that other software can send.

``save_artifact`` / ``load_artifact`` write and read a folder that is safe to load, ``diff`` and
``evaluate_artifact`` compare and score such folders, ``export_prompt`` gives a predictor's messages with
placeholders, exactly as DSPy's adapter would send them.
"""

from __future__ import annotations

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
