"""The general path: any decoder of transformers, run through its own forward on packed tokens.

transformers lets a model call a registered attention function. Ours attends over the packed pass (see `layout`), so
that continuous batching and the prefix cache work for every architecture that supports the attention interface and
keeps one key/value shape in all layers. Architectures with a hand-written decoder (`fused_decoder`) are faster; this
one is their reference in the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.local.attention import KeyValueShape, PackedAttention
from asyndbt_dspy.lms.local.layout import PassLayout

ATTENTION_NAME = "asyndbt_packed"


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_attention: PackedAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers' models call: query [1, H, N, D], key and value [1, V, N, D]."""
    key_heads = key.shape[1]
    _, heads, tokens, size = query.shape
    queries = query[0].view(key_heads, heads // key_heads, tokens, size).transpose(1, 2).contiguous()
    output = packed_attention(
        int(module.layer_idx),  # type: ignore[arg-type]
        queries,
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=size**-0.5 if scaling is None else scaling,
        window=sliding_window,
    )
    return output.reshape(1, tokens, heads, size), None


class TransformersDecoder:
    """Runs packed passes through a model of transformers.

    Args:
        model: A causal language model in evaluation mode.

    Attributes:
        shape: Dimensions of its keys and values.
        windows: Attention windows that its layers use.
        context_tokens: Longest sequence that its positions allow.
        vocabulary: Number of logits.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        if not getattr(model, "_supports_attention_backend", False):
            raise ConfigurationError(
                f"architecture {config.model_type!r} does not support transformers' attention interface, "
                "which the local engine needs; use another model, or serve this one and reach it through LiteLLM"
            )
        self.shape = KeyValueShape(config.num_hidden_layers, key_heads, heads, head_size)
        self.windows = attention_windows(config)
        self.context_tokens = int(config.max_position_embeddings)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        AttentionInterface.register(ATTENTION_NAME, packed_attention_forward)
        model.set_attn_implementation(ATTENTION_NAME)
        self._model = model

    def run(self, layout: PassLayout, attention: PackedAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [wanted rows, vocabulary] of one pass and their log-sum-exp [wanted rows], float32."""
        output = self._model(
            input_ids=layout.token_ids.unsqueeze(0),
            position_ids=layout.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=layout.wanted_rows,
            packed_attention=attention,
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits, torch.logsumexp(logits, dim=-1)


def attention_windows(config: Any) -> tuple[int | None, ...]:
    """The distinct attention windows of a model's layers; None is full attention."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,)
    if not kinds:
        return (int(window), None)
    found: list[int | None] = []
    if "full_attention" in kinds:
        found.append(None)
    if "sliding_attention" in kinds:
        found.append(int(window))
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ConfigurationError(f"layers of kind {sorted(unknown)} are not supported by the local engine")
    return tuple(found)
