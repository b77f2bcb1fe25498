"""Keys and values of the tokens that belong to one running sequence only.

One row per sequence, all rows in one tensor per layer, so that the sequences that generate a token in the same pass
attend in one call. Rows in use are kept together at the beginning: when one is given back, the last moves into its
place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Rows are as long as a multiple of this.
ROW_STEP = 64


def whole_steps(tokens: int) -> int:
    """Tokens of a row that holds this many."""
    return -(-tokens // ROW_STEP) * ROW_STEP


class SlotStore:
    """Rows of keys and values, [layers, 2, rows, capacity, V, D]; grows by doubling, shrinks when empty.

    While it grows, what was stored is there twice.

    Args:
        layers: Layers of the model.
        key_heads: V.
        head_size: D.
        dtype: Of keys and values.
        device: Where the model is.
        max_tokens: Rows times capacity up to which it grows ahead of need.
    """

    def __init__(
        self,
        layers: int,
        key_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        max_tokens: int,
    ) -> None:
        self._max_tokens = max_tokens
        self._shape = (layers, key_heads, head_size)
        self._dtype = dtype
        self._device = device
        self.lengths: list[int] = []
        self._kv = self._allocate(0, 0)

    @property
    def capacity(self) -> int:
        """Tokens per row."""
        return int(self._kv.shape[3])

    def reserve(self, rows: int, tokens: int, most: int = 0) -> None:
        """Make room for `rows` rows of `tokens` tokens each; keeps what is stored.

        Args:
            rows: How many rows, at least as many as are taken.
            tokens: Of the longest.
            most: To how many tokens any row can come before it is given back, if that is known.
        """
        have_rows, have_tokens = int(self._kv.shape[2]), self.capacity
        if rows <= have_rows and tokens <= have_tokens:
            return
        new_rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows, 8)
        new_tokens = have_tokens if tokens <= have_tokens else whole_steps(max(tokens, have_tokens * 3 // 2))
        used = len(self.lengths)
        longest = max(self.lengths, default=0)
        if new_rows * new_tokens > self._max_tokens:
            # Growing ahead would pass the bound. What the rows can come to is within it, and is grown to at once.
            new_tokens = whole_steps(max(tokens, longest, most))
            new_rows = max(rows, self._max_tokens // new_tokens)
        grown = self._allocate(new_rows, new_tokens)
        grown[:, :, :used, :longest] = self._kv[:, :, :used, :longest]
        self._kv = grown

    def take(self) -> int:
        """Use a further row (after `reserve`) and return its index."""
        self.lengths.append(0)
        return len(self.lengths) - 1

    def give_back(self, row: int) -> int | None:
        """Free `row`; returns the index of the row that moved into its place, if one did."""
        last = len(self.lengths) - 1
        length = self.lengths[last]
        if row != last:
            self._kv[:, :, row, :length] = self._kv[:, :, last, :length]
            self.lengths[row] = length
        self.lengths.pop()
        if not self.lengths:
            self._kv = self._allocate(0, 0)
        return last if row != last else None

    def write(self, layer: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values ([n, V, D]) at `places` (row * capacity + position) of one layer."""
        flat = self._kv[layer].flatten(1, 2)
        flat[0].index_copy_(0, places, keys)
        flat[1].index_copy_(0, places, values)

    def read(self, layer: int, rows: Sequence[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `tokens` tokens of ascending `rows`: two tensors [rows, V, tokens, D]."""
        kv = self._kv[layer]
        is_run = rows[-1] - rows[0] + 1 == len(rows)
        chosen = kv[:, slice(rows[0], rows[-1] + 1) if is_run else list(rows), :tokens]
        return chosen[0].transpose(1, 2), chosen[1].transpose(1, 2)

    def clear(self) -> None:
        """Forget all rows."""
        self.lengths.clear()
        self._kv = self._allocate(0, 0)

    def _allocate(self, rows: int, tokens: int) -> torch.Tensor:
        layers, key_heads, head_size = self._shape
        shape = (layers, 2, rows, tokens, key_heads, head_size)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)
