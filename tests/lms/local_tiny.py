"""Tiny models with random weights and a byte-level tokenizer, for tests that need a model but no weights."""

from __future__ import annotations

from typing import Any

import dspy
import torch
from dspy.lm15 import Config, Message, Request
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from asyndbt_dspy.lms.local.engine import AsyncLocalEngine, LocalCore, LocalEngine
from asyndbt_dspy.lms.local.fused_decoder import FusedDecoder
from asyndbt_dspy.lms.local.models import LoadedModel
from asyndbt_dspy.lms.local.transformers_decoder import TransformersDecoder

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> Any:
    """One token per byte, plus the two special tokens of the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|start|>", "<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|start|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def tiny_model(kind: str = "llama", *, context: int = 4096, window: int | None = None) -> Any:
    """A two- or three-layer model with random weights that are not symmetric in anything."""
    options: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": context,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    if window is not None:
        options |= {"sliding_window": window}
    if kind == "gemma3_text":
        options |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        options |= {"query_pre_attn_scalar": 16}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **options), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                # Large enough that next-token distributions are far from flat.
                parameter.mul_(6.0)
    return model


def tiny_lm(
    *,
    model: Any = None,
    fused: bool = True,
    max_batch_tokens: int = 2048,
    prefix_cache_tokens: int = 16384,
    max_running_tokens: int = 65536,
    decoder: Any = None,
    **lm_options: Any,
) -> dspy.LM:
    """A `dspy.LM` over a tiny model."""
    if decoder is None:
        model = tiny_model() if model is None else model
        decoder = FusedDecoder(model) if fused else TransformersDecoder(model)
    tokenizer = byte_tokenizer()
    core = LocalCore(
        LoadedModel(decoder, tokenizer, (257,)),
        name="tiny",
        plain_template=False,
        deterministic=True,
        max_batch_tokens=max_batch_tokens,
        prefix_cache_tokens=prefix_cache_tokens,
        max_running_tokens=max_running_tokens,
    )
    return dspy.LM(
        "local/tiny",
        engine=LocalEngine(core, {}),
        async_engine=AsyncLocalEngine(core, {}),
        cache=False,
        **lm_options,
    )


def scheduler_of(lm: dspy.LM) -> Any:
    """The scheduler behind an LM."""
    return lm.engine.core.scheduler


def request(text: str, **config: Any) -> Request:
    """A request of one user turn."""
    return Request(model="local/tiny", messages=(Message.user(text),), config=Config(**config))


def object_format(**properties: Any) -> dict[str, Any]:
    """A response format of an object with exactly these properties."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}
