"""Attention of a packed pass over shared prefixes, slots and the pass itself.

Shapes as in `layout`: N tokens, H query heads, V key/value heads, G = H / V, D the head size. Keys and values are kept
as [tokens, V, D]. Query heads that share a key head are laid out as further queries of that head, so that nothing is
repeated in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from asyndbt_dspy.lms.local.layout import PassLayout, PrefixGroup, TailGroup
from asyndbt_dspy.lms.local.slots import SlotStore


@dataclass(frozen=True)
class KeyValueShape:
    """Dimensions of the keys and values of a model."""

    layers: int
    key_heads: int
    query_heads: int
    head_size: int

    @property
    def heads_per_key(self) -> int:
        """G: how many query heads share a key head."""
        return self.query_heads // self.key_heads


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log-sum-exp of its scores.

    Args:
        queries: [B, V, Q, D].
        keys: [B, V, K, D].
        values: [B, V, K, D].
        mask: Additive, broadcast to [B, V, Q, K], or None.
        scale: Factor of the scores.

    Returns:
        [B, V, Q, D] in the dtype of the queries and [B, V, Q] in float32 (or wider).
    """
    if queries.device.type == "cpu":
        # PyTorch's fused CPU kernel behind scaled_dot_product_attention. The public function does not return the
        # log-sum-exp that joins partial results; test_local_attention.py fails when this name moves.
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, False, attn_mask=mask, scale=scale
        )
        return output, lse
    return attend_plainly(queries, keys, values, mask, scale)


def attend_plainly(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` in plain operations, for devices without a kernel that returns the log-sum-exp."""
    scores = torch.matmul(queries, keys.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).to(values.dtype)
    return torch.matmul(weights, values), lse


class PackedAttention:
    """Attention of one pass: stores new keys and values, then joins prefix and tail results for every row."""

    def __init__(self, layout: PassLayout, shape: KeyValueShape, slots: SlotStore) -> None:
        self._layout = layout
        self._shape = shape
        self._slots = slots

    def __call__(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attention of layer `layer`.

        Args:
            layer: Index of the layer.
            queries: [V, N, G, D], contiguous.
            keys: [N, V, D].
            values: [N, V, D].
            scale: Factor of the scores.
            window: How many positions back a token sees, or None.

        Returns:
            [N, V, G, D].
        """
        self._store(layer, keys, values)
        key_heads, tokens, group, size = queries.shape
        output = torch.empty((tokens, key_heads, group, size), dtype=queries.dtype, device=queries.device)
        lse = torch.empty((tokens, key_heads, group), dtype=torch.float32, device=queries.device)
        for tail in self._layout.tail_groups:
            self._tail(layer, tail, queries, keys, values, output, lse, scale, window)
        for prefix in self._layout.prefix_groups:
            self._prefix(layer, prefix, queries, output, lse, scale, window)
        return output

    def _store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for item in self._layout.items:
            if item.node is not None:
                last = item.first_row + len(item.tokens)
                item.node.kv[layer, 0].copy_(keys[item.first_row : last])
                item.node.kv[layer, 1].copy_(values[item.first_row : last])
        write = self._layout.slot_write
        if write is not None:
            self._slots.write(
                layer, write.places, keys.index_select(0, write.rows), values.index_select(0, write.rows)
            )

    def _tail(
        self,
        layer: int,
        tail: TailGroup,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        key_heads, _, group, size = queries.shape
        items, longest = tail.gather.shape
        flat = tail.gather.reshape(-1)
        own = queries.index_select(1, flat).view(key_heads, items, longest * group, size).transpose(0, 1)
        if tail.slot_rows is None:
            own_keys = keys.index_select(0, flat).view(items, longest, key_heads, size).transpose(1, 2)
            own_values = values.index_select(0, flat).view(items, longest, key_heads, size).transpose(1, 2)
        else:
            own_keys, own_values = self._slots.read(layer, tail.slot_rows, tail.key_length)
        part, part_lse = attend(own, own_keys, own_values, tail.masks[window], scale)
        part = part.reshape(items, key_heads, longest, group, size).permute(0, 2, 1, 3, 4)
        part_lse = part_lse.reshape(items, key_heads, longest, group).permute(0, 2, 1, 3)
        if tail.plain:
            first = int(tail.first_row)
            last = first + items * longest
            output[first:last].view(items, longest, key_heads, group, size).copy_(part)
            lse[first:last].view(items, longest, key_heads, group).copy_(part_lse)
        else:
            output.index_copy_(0, tail.rows, part[tail.item_index, tail.token_index])
            lse.index_copy_(0, tail.rows, part_lse[tail.item_index, tail.token_index])

    def _prefix(
        self,
        layer: int,
        prefix: PrefixGroup,
        queries: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        key_heads, _, group, size = queries.shape
        rows = slice(prefix.first, prefix.last)
        own = queries[:, rows].reshape(1, key_heads, -1, size)
        parts = [node.kv[layer] for node in prefix.nodes]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        part, part_lse = attend(
            own,
            joined[0].transpose(0, 1).unsqueeze(0),
            joined[1].transpose(0, 1).unsqueeze(0),
            prefix.masks[window],
            scale,
        )
        part = part.view(key_heads, -1, group, size).permute(1, 0, 2, 3)
        part_lse = part_lse.view(key_heads, -1, group).permute(1, 0, 2)
        # Two softmaxes over disjoint keys join as a weighted mean with weights proportional to exp(log-sum-exp).
        weight = torch.sigmoid(part_lse.float() - lse[rows]).to(output.dtype)
        output[rows].lerp_(part, weight.unsqueeze(-1))
