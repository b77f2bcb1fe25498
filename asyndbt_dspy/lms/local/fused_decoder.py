"""The fast path: a hand-written forward of Llama-like and Gemma 3 decoders over packed passes.

What makes it faster than the modules of transformers on the same weights:

- query, key and value projections are one matrix, gate and up projections are one; the weight of the norm before
  them is folded into the matrix (W (w * x) = (W diag(w)) x), so that a norm is one reduction and one product;
- residual sums are part of the matrix products (addmm), activations are computed in place;
- every intermediate result goes into a buffer that is kept between passes: fresh memory costs a page fault for every
  4 KB on first touch, which on a CPU takes longer than the arithmetic;
- the number of rows is rounded up, so that the kernel library meets few shapes and compiles few kernels;
- the last layer is computed for the rows whose logits are wanted only.

Supported: llama, mistral, qwen2, qwen3 and gemma3_text, where the configuration has nothing unusual; everything else
runs through `transformers_decoder`. The rotary tables come from the model's own module, so that all variants of
scaled positions are right.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from asyndbt_dspy.lms.local.attention import KeyValueShape, PackedAttention
from asyndbt_dspy.lms.local.layout import PassLayout
from asyndbt_dspy.lms.local.transformers_decoder import attention_windows

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
GEMMA_LIKE = ("gemma3_text",)
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Rows that go through the MLP at once: large enough for the matrix units, small enough for the caches.
_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class FusedLayer:
    """Weights of one layer; matrices are [in, out] views."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    after_attention: torch.Tensor | None
    after_mlp: torch.Tensor | None
    window: int | None
    kind: str
    scale: float


def supports(model: Any) -> bool:
    """Whether the hand-written forward computes what `model` would."""
    config = model.config
    if config.model_type not in LLAMA_LIKE + GEMMA_LIKE or getattr(config, "mlp_bias", False):
        return False
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        return False
    if getattr(config, "use_bidirectional_attention", False):
        return False
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "")
    attention = model.model.layers[0].self_attn
    return activation in _ACTIVATIONS and attention.o_proj.bias is None


class FusedDecoder:
    """Runs packed passes through fused copies of a model's weights; the model itself can be dropped afterwards.

    Args:
        model: A causal language model of transformers for which `supports` holds.
    """

    def __init__(self, model: Any) -> None:
        config = model.config
        base = model.model
        attention = base.layers[0].self_attn
        heads, head_size = config.num_attention_heads, attention.head_dim
        self.shape = KeyValueShape(config.num_hidden_layers, config.num_key_value_heads, heads, head_size)
        self.windows = attention_windows(config)
        self.context_tokens = int(config.max_position_embeddings)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._gemma = config.model_type in GEMMA_LIKE
        self._mistral = config.model_type == "mistral"
        self._eps = float(config.rms_norm_eps)
        self._hidden = int(config.hidden_size)
        self._inner = int(config.intermediate_size)
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        self._gelu = _ACTIVATIONS[activation] == "gelu_tanh"
        self._rotary = base.rotary_emb
        self._embedding = base.embed_tokens.weight.detach()
        self._embedding_scale = (
            float(torch.tensor(self._hidden**0.5, dtype=self.dtype)) if self._gemma else 1.0
        )
        self._final_norm = self._norm_weight(base.norm)
        self._head = model.get_output_embeddings().weight.detach().t()
        self.vocabulary = int(self._head.shape[1])
        kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * self.shape.layers)
        self._layers = [self._fuse(layer, kind) for layer, kind in zip(base.layers, kinds, strict=True)]
        # Each thread that runs a part of a pass has its own.
        self._kept = threading.local()

    def run(self, layout: PassLayout, attention: PackedAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [wanted rows, vocabulary] of one pass and their log-sum-exp [wanted rows], float32."""
        tokens = len(layout.token_ids)
        rows = _rounded(tokens)
        hidden = self._buffer("hidden", rows, self._hidden)
        hidden[tokens:].zero_()
        torch.index_select(self._embedding, 0, layout.token_ids, out=hidden[:tokens])
        if self._gemma:
            hidden.mul_(self._embedding_scale)
        tables = {
            kind: self._rotary_tables(layout.positions, kind) for kind in {each.kind for each in self._layers}
        }
        for index, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, hidden, tokens, tables[layer.kind])
            mixed = attention(index, queries, keys, values, scale=layer.scale, window=layer.window)
            if index == len(self._layers) - 1:
                return self._finish(layer, hidden, mixed, layout.wanted_rows)
            self._after_attention(layer, hidden, mixed.view(tokens, -1))
        raise AssertionError("a model without layers")

    def _fuse(self, layer: Any, kind: str) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        before_mlp = layer.pre_feedforward_layernorm if self._gemma else layer.post_attention_layernorm
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        biases = [each.bias for each in projections]
        # Mistral's layers all have the window of the configuration; the others know their own.
        window = getattr(attention.config if self._mistral else attention, "sliding_window", None)
        return FusedLayer(
            qkv=self._folded([each.weight for each in projections], layer.input_layernorm),
            qkv_bias=torch.cat(biases).detach() if biases[0] is not None else None,
            output=attention.o_proj.weight.detach().t(),
            gate_up=self._folded([mlp.gate_proj.weight, mlp.up_proj.weight], before_mlp),
            down=mlp.down_proj.weight.detach().t(),
            query_norm=self._norm_weight(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=self._norm_weight(attention.k_norm) if hasattr(attention, "k_norm") else None,
            after_attention=self._norm_weight(layer.post_attention_layernorm) if self._gemma else None,
            after_mlp=self._norm_weight(layer.post_feedforward_layernorm) if self._gemma else None,
            window=int(window) if window is not None and window in self.windows else None,
            kind=kind,
            scale=float(attention.scaling),
        )

    def _norm_weight(self, norm: Any) -> torch.Tensor:
        weight = norm.weight.detach().float()
        exact: torch.Tensor = 1.0 + weight if self._gemma else weight
        return exact.to(self.dtype)

    def _folded(self, weights: list[torch.Tensor], norm: Any) -> torch.Tensor:
        scale = norm.weight.detach().float()
        scale = 1.0 + scale if self._gemma else scale
        joined = torch.cat([weight.detach() for weight in weights])
        folded: torch.Tensor = (joined.float() * scale).to(self.dtype)
        return folded.t()

    def _buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] of a buffer that is kept; its content is undefined."""
        buffers: dict[str, torch.Tensor] = self._kept.__dict__
        kept = buffers.get(name)
        if kept is None or kept.shape[0] < rows:
            kept = torch.zeros((max(rows, 256), columns), dtype=self.dtype, device=self.device)
            buffers[name] = kept
        return kept[:rows]

    def _rotary_tables(self, positions: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [N, 1, D / 2]; both halves of the model's tables are equal."""
        arguments = (kind,) if self._gemma else ()
        cosines, sines = self._rotary(self._embedding[:1], positions.unsqueeze(0), *arguments)
        half = cosines.shape[-1] // 2
        return cosines[0, :, None, :half].to(self.dtype), sines[0, :, None, :half].to(self.dtype)

    def _normed(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Root-mean-square norm without a weight."""
        length = torch.linalg.vector_norm(source, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square_().div_(source.shape[-1]).add_(self._eps)).to(self.dtype)
        return torch.mul(source, scale, out=target)

    def _project(
        self, layer: FusedLayer, hidden: torch.Tensor, tokens: int, tables: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [V, N, G, D], keys and values [N, V, D] with positions applied."""
        shape = self.shape
        rows = hidden.shape[0]
        columns = layer.qkv.shape[1]
        normed = self._normed(hidden, self._buffer("normed", rows, self._hidden))
        joined = torch.mm(normed, layer.qkv, out=self._buffer("qkv", rows, columns))
        if layer.qkv_bias is not None:
            joined.add_(layer.qkv_bias)
        per_head = joined[:tokens].view(tokens, -1, shape.head_size)
        queries = per_head[:, : shape.query_heads]
        keys = per_head[:, shape.query_heads : shape.query_heads + shape.key_heads]
        values = per_head[:, shape.query_heads + shape.key_heads :]
        if layer.query_norm is not None and layer.key_norm is not None:
            queries = self._head_norm(queries, layer.query_norm)
            keys = self._head_norm(keys, layer.key_norm)
        turned = self._buffer("queries", rows * shape.query_heads, shape.head_size)[
            : tokens * shape.query_heads
        ]
        turned = turned.view(shape.key_heads, tokens, shape.heads_per_key, shape.head_size)
        as_grouped = queries.view(tokens, shape.key_heads, shape.heads_per_key, shape.head_size)
        _rotate(as_grouped, tables, turned.permute(1, 0, 2, 3))
        turned_keys = self._buffer("keys", rows * shape.key_heads, shape.head_size)[
            : tokens * shape.key_heads
        ]
        turned_keys = turned_keys.view(tokens, shape.key_heads, shape.head_size)
        _rotate(keys, tables, turned_keys)
        return turned, turned_keys, values

    def _head_norm(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        exact = heads.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self._eps)
        return (exact * scale).to(self.dtype) * weight

    def _after_attention(self, layer: FusedLayer, hidden: torch.Tensor, mixed: torch.Tensor) -> None:
        """Output projection and MLP, added to `hidden` in place; `mixed` may have fewer rows (the rest is padding)."""
        tokens = mixed.shape[0]
        rows = hidden.shape[0]
        padded = self._buffer("mixed", rows, mixed.shape[1])
        padded[:tokens] = mixed
        if layer.after_attention is None:
            hidden.addmm_(padded, layer.output)
        else:
            projected = torch.mm(padded, layer.output, out=self._buffer("normed", rows, self._hidden))
            hidden.add_(self._normed(projected, projected).mul_(layer.after_attention))
        for first in range(0, rows, _CHUNK_ROWS):
            self._mlp(layer, hidden[first : first + _CHUNK_ROWS])

    def _mlp(self, layer: FusedLayer, hidden: torch.Tensor) -> None:
        rows = hidden.shape[0]
        normed = self._normed(hidden, self._buffer("normed", rows, self._hidden))
        joined = torch.mm(normed, layer.gate_up, out=self._buffer("gate_up", rows, 2 * self._inner))
        gate, up = joined[:, : self._inner], joined[:, self._inner :]
        product = self._buffer("product", rows, self._inner)
        if self._gelu:
            torch.mul(functional.gelu(gate, approximate="tanh"), up, out=product)
        else:
            torch.mul(functional.silu(gate, inplace=True), up, out=product)
        if layer.after_mlp is None:
            hidden.addmm_(product, layer.down)
        else:
            projected = torch.mm(product, layer.down, out=normed)
            hidden.add_(self._normed(projected, projected).mul_(layer.after_mlp))

    def _finish(
        self, layer: FusedLayer, hidden: torch.Tensor, mixed: torch.Tensor, wanted: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rest of the last layer and the logits, for the wanted rows only."""
        count = len(wanted)
        if not count:
            return torch.empty((0, self.vocabulary), device=self.device), torch.empty(0, device=self.device)
        rows = _rounded(count)
        chosen = self._buffer("chosen", rows, self._hidden)
        chosen[count:].zero_()
        chosen[:count] = hidden.index_select(0, wanted)
        self._after_attention(layer, chosen, mixed.flatten(1).index_select(0, wanted))
        normed = self._normed(chosen, self._buffer("normed", rows, self._hidden)).mul_(self._final_norm)
        logits = torch.mm(normed, self._head, out=self._buffer("logits", rows, self.vocabulary))
        # A copy even in float32: the thread's next part reuses the buffer, perhaps before these are read.
        exact = logits[:count].to(torch.float32, copy=True)
        return exact, torch.logsumexp(exact, dim=-1)


def _rotate(source: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor) -> None:
    """Rotary positions: [N, ..., D] times tables [N, 1, D / 2], written to `target` of the same shape."""
    cosines, sines = tables
    if source.dim() == 4:
        cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    half = source.shape[-1] // 2
    first, second = source[..., :half], source[..., half:]
    target_first, target_second = target[..., :half], target[..., half:]
    torch.mul(first, cosines, out=target_first)
    target_first.addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=target_second)
    target_second.addcmul_(first, sines)


def _rounded(rows: int) -> int:
    """Rows of a pass, rounded up: the kernel library compiles a kernel for every number of rows it meets."""
    step = 8 if rows <= 64 else 32 if rows <= 512 else 128
    return -(-rows // step) * step
