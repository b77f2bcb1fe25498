"""LMs without a model, to measure what is around it (see local_engine.py)."""

from __future__ import annotations

import json
import math
from typing import Any

import dspy
import torch
from dspy.lm15 import Message, Request, Response, Usage

from asyndbt_dspy.lms.local.engine import AsyncLocalEngine, LocalCore, LocalEngine
from asyndbt_dspy.lms.local.models import LoadedModel, load_model
from asyndbt_dspy.lms.local.weights import find_model


class EmptyDecoder:
    """A decoder that computes no layers: the same logits for every row."""

    def __init__(self, real: Any) -> None:
        self.shape = real.shape
        self.windows = real.windows
        self.context_tokens = real.context_tokens
        self.vocabulary = real.vocabulary
        self.dtype = real.dtype
        self.device = real.device
        self._row = torch.zeros(1, real.vocabulary)

    def run(self, layout: Any, attention: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Equal logits for all tokens."""
        rows = len(layout.wanted_rows)
        return self._row.expand(rows, -1), torch.full((rows,), math.log(self.vocabulary))


class NullEngine:
    """Answers at once with a fixed label."""

    supports_response_schema = True
    supported_params = frozenset({"response_format"})

    def __init__(self, label: str) -> None:
        self._text = json.dumps({"label": label})

    def complete(self, request: Request) -> Response:
        """The fixed answer."""
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant(self._text),
            finish_reason="stop",
            usage=Usage(input_tokens=1, output_tokens=1),
        )


def null_lm(label: str) -> dspy.LM:
    """DSPy alone."""
    return dspy.LM("null/model", engine=NullEngine(label), cache=False)


def model_free_lm(model: str) -> dspy.LM:
    """The local engine with everything but the layers of the model."""
    source = find_model(model)
    real = load_model(source, torch.device("cpu"), torch.float32)
    loaded = LoadedModel(EmptyDecoder(real.decoder), real.tokenizer, real.ends)
    core = LocalCore(
        loaded,
        name=source.name,
        plain_template=source.plain_template,
        deterministic=False,
        max_batch_tokens=2048,
        prefix_cache_tokens=16384,
    )
    return dspy.LM(
        "empty/model", engine=LocalEngine(core, {}), async_engine=AsyncLocalEngine(core, {}), cache=False
    )
