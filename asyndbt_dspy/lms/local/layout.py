"""What one pass through the model computes: many runs of tokens packed into one row of tokens.

A pass holds items: pieces of shared prefixes, last turns of prompts, single generated tokens, and the branches of a
tree of labels. All of their tokens go through the linear layers as one matrix without padding. For attention,

- the rows of all items with one prefix attend to that prefix together, without a mask (a prefix group);
- each item attends to its own tokens, causally or along the branches of its tree (a tail group: items of like
  length, padded to the longest).

The two partial results are joined by their log-sum-exp, exactly. Index tensors and masks are made here once per pass
and used by every layer.

Shapes: N tokens in the pass, H query heads, V key/value heads, G = H / V, D the head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from asyndbt_dspy.lms.local.prefix_cache import Node

# Masked scores: finite, so that a row that is masked everywhere in a partial result has a log-sum-exp of about -1e30
# (weight zero when the parts are joined) instead of NaN.
MASKED = -1e30
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class TokenTree:
    """Tokens that branch: the inner nodes of the trie of an enumeration's labels.

    Attributes:
        tokens: T token ids, parents before children.
        depths: T distances from the last common token, >= 1.
        visible: [T, T] booleans, row i true at itself and its ancestors.
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    visible: np.ndarray


@dataclass
class PassItem:
    """New tokens of one sequence or one prefix node.

    Attributes:
        tokens: The new tokens in order, those of the tree last.
        start: Position of the first.
        path: Prefix nodes that come before, computed earlier or in this pass.
        node: The prefix node that these tokens compute, if any.
        row: Row of the slot store with the sequence's earlier own tokens and where the new ones go, or None.
        row_length: Tokens that the row already holds.
        tree: The tree at the end, if any.
        wanted: Indices into tokens whose next-token logits are needed.
    """

    tokens: list[int]
    start: int
    path: tuple[Node, ...]
    node: Node | None = None
    row: int | None = None
    row_length: int = 0
    tree: TokenTree | None = None
    wanted: tuple[int, ...] = ()
    first_row: int = field(default=0, init=False)

    @property
    def linear(self) -> int:
        """How many of the tokens are not part of the tree."""
        return len(self.tokens) - (len(self.tree.tokens) if self.tree else 0)


@dataclass
class PrefixGroup:
    """Rows `first:last` of the pass that attend to the same prefix; masks per attention window (None: no mask)."""

    nodes: tuple[Node, ...]
    first: int
    last: int
    masks: dict[int | None, torch.Tensor | None]


@dataclass
class TailGroup:
    """Items of like length whose own tokens are attended to in one padded call.

    Attributes:
        gather: [R, L] rows of the pass, padded with the item's first row.
        rows, item_index, token_index: For each real token: its row in the pass, and its place in `gather`.
        slot_rows: Rows of the slot store (None: keys and values are those of this pass, gathered like the queries).
        key_length: Keys per item, after padding.
        masks: Per attention window: [R, 1, L * G, key_length].
        plain: Whether `gather` has no padding and its rows are consecutive, from `first_row`.
    """

    gather: torch.Tensor
    rows: torch.Tensor
    item_index: torch.Tensor
    token_index: torch.Tensor
    slot_rows: list[int] | None
    key_length: int
    masks: dict[int | None, torch.Tensor | None]
    plain: bool
    first_row: int


@dataclass
class SlotWrite:
    """Which rows of the pass are appended to the slot store, and where (row * capacity + position)."""

    rows: torch.Tensor
    places: torch.Tensor


@dataclass
class PassLayout:
    """A pass, ready for a decoder; `items` are in packed order."""

    items: list[PassItem]
    token_ids: torch.Tensor
    positions: torch.Tensor
    wanted_rows: torch.Tensor
    prefix_groups: list[PrefixGroup]
    tail_groups: list[TailGroup]
    slot_write: SlotWrite | None
    longest: int


def build_layout(
    items: Sequence[PassItem],
    *,
    heads_per_key: int,
    windows: Sequence[int | None],
    slot_capacity: int,
    dtype: torch.dtype,
    device: torch.device,
) -> PassLayout:
    """Pack `items` and prepare groups, masks and indices.

    Args:
        items: At least one; reordered so that items with one prefix are neighbours.
        heads_per_key: G.
        windows: Attention windows that the model's layers use; None is full attention.
        slot_capacity: Tokens per row of the slot store.
        dtype: Of the masks.
        device: Where the model is.
    """
    ordered = sorted(items, key=lambda item: tuple(id(node) for node in item.path))
    row = 0
    for item in ordered:
        item.first_row = row
        row += len(item.tokens)
    token_ids = np.fromiter((t for item in ordered for t in item.tokens), np.int64, row)
    positions = np.concatenate([_positions(item) for item in ordered])
    wanted = [item.first_row + index for item in ordered for index in item.wanted]
    build = _Masks(heads_per_key, tuple(windows), dtype, device)
    longest = int(positions.max()) + 1
    return PassLayout(
        items=ordered,
        token_ids=torch.from_numpy(token_ids).to(device),
        positions=torch.from_numpy(positions).to(device),
        wanted_rows=torch.tensor(wanted, dtype=torch.long, device=device),
        prefix_groups=_prefix_groups(ordered, positions, build),
        tail_groups=_tail_groups(ordered, build),
        slot_write=_slot_write(ordered, slot_capacity, device),
        longest=longest,
    )


def _positions(item: PassItem) -> np.ndarray:
    linear = item.linear
    positions = np.arange(item.start, item.start + len(item.tokens), dtype=np.int64)
    if item.tree is not None:
        positions[linear:] = item.start + linear - 1 + np.asarray(item.tree.depths)
    return positions


class _Masks:
    """Makes additive masks for the windows of the model."""

    def __init__(
        self, heads_per_key: int, windows: tuple[int | None, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.heads_per_key = heads_per_key
        self.windows = windows
        self.dtype = dtype
        self.device = device

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """An index array on the model's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def additive(self, hidden: np.ndarray) -> torch.Tensor:
        """[..., L, K] booleans, true where hidden -> [..., 1, L * G, K] of 0 and MASKED.

        Made in numpy, with the bit pattern of the dtype: these arrays are small, and PyTorch would wake all cores
        for them.
        """
        masked = torch.tensor(MASKED, dtype=self.dtype)
        bits = masked.view(_BITS[masked.element_size()]).numpy()
        filled = hidden.astype(bits.dtype)
        filled *= bits
        repeated = np.repeat(filled, self.heads_per_key, axis=-2)
        mask = torch.from_numpy(np.expand_dims(repeated, -3)).view(self.dtype)
        return mask.to(self.device)


def _prefix_groups(items: list[PassItem], positions: np.ndarray, build: _Masks) -> list[PrefixGroup]:
    groups: list[PrefixGroup] = []
    for item in items:
        if not item.path:
            continue
        last = item.first_row + len(item.tokens)
        if groups and groups[-1].nodes == item.path:
            groups[-1].last = last
        else:
            groups.append(PrefixGroup(item.path, item.first_row, last, {}))
    for group in groups:
        keys = np.concatenate([np.arange(node.start, node.end) for node in group.nodes])
        queries = positions[group.first : group.last]
        for window in build.windows:
            if window is None or queries.max() - keys[0] < window:
                group.masks[window] = None
            else:
                hidden = queries[:, None] - keys[None, :] >= window
                group.masks[window] = build.additive(hidden[None])
    return groups


def _tail_groups(items: list[PassItem], build: _Masks) -> list[TailGroup]:
    buckets: dict[tuple[bool, int, int], list[PassItem]] = {}
    for item in items:
        queries = (len(item.tokens) - 1).bit_length()
        keys = (item.row_length + len(item.tokens) - 1).bit_length() if item.row is not None else 0
        # A row's keys are only read up to the longest of its group, so groups of like length waste little; short
        # rows share one group, since a call costs more than their padding.
        buckets.setdefault(
            (item.row is not None, queries, max(keys, 8) if item.row is not None else 0), []
        ).append(item)
    return [_tail_group(bucket, from_slots=key[0], build=build) for key, bucket in buckets.items()]


def _tail_group(items: list[PassItem], *, from_slots: bool, build: _Masks) -> TailGroup:
    if from_slots:
        items = sorted(items, key=lambda item: item.row or 0)
    lengths = np.array([len(item.tokens) for item in items])
    first_rows = np.array([item.first_row for item in items])
    longest = int(lengths.max())
    steps = np.arange(longest)
    real = steps[None, :] < lengths[:, None]
    gather = first_rows[:, None] + np.where(real, steps[None, :], 0)
    before = np.array([item.row_length if from_slots else 0 for item in items])
    key_length = int((before + lengths).max())
    hidden = np.arange(key_length)[None, None, :] > (before[:, None] + steps[None, :])[:, :, None]
    key_positions = query_positions = None
    for index, item in enumerate(items):
        if item.tree is not None:
            linear, first_key = item.linear, int(before[index]) + item.linear
            last = len(item.tokens)
            hidden[index, linear:last, first_key : first_key + last - linear] = ~item.tree.visible
    masks: dict[int | None, torch.Tensor | None] = {}
    trivial = longest == 1 and bool((before + lengths == key_length).all())
    full = None if trivial else build.additive(hidden)
    for window in build.windows:
        if window is None or key_length <= window:
            masks[window] = full
            continue
        if query_positions is None:
            query_positions, key_positions = _own_positions(items, longest, key_length, before)
        assert key_positions is not None
        far = query_positions[:, :, None] - key_positions[:, None, :] >= window
        masks[window] = build.additive(hidden | far)
    flat = gather[real]
    item_index, token_index = np.nonzero(real)
    consecutive = bool(real.all()) and bool((np.diff(flat) == 1).all() if len(flat) > 1 else True)
    return TailGroup(
        gather=build.tensor(gather),
        rows=build.tensor(flat),
        item_index=build.tensor(item_index),
        token_index=build.tensor(token_index),
        slot_rows=[item.row for item in items if item.row is not None] if from_slots else None,
        key_length=key_length,
        masks=masks,
        plain=consecutive,
        first_row=int(first_rows[0]),
    )


def _own_positions(
    items: list[PassItem], longest: int, key_length: int, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries [R, L] and keys [R, K] relative to the first own token of each item."""
    queries = before[:, None] + np.arange(longest)[None, :]
    keys = np.broadcast_to(np.arange(key_length), (len(items), key_length)).copy()
    for index, item in enumerate(items):
        if item.tree is not None:
            linear, last = item.linear, len(item.tokens)
            depths = int(before[index]) + linear - 1 + np.asarray(item.tree.depths)
            queries[index, linear:last] = depths
            keys[index, int(before[index]) + linear : int(before[index]) + last] = depths
    return queries, keys


def _slot_write(items: list[PassItem], capacity: int, device: torch.device) -> SlotWrite | None:
    rows: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for item in items:
        if item.row is not None:
            steps = np.arange(len(item.tokens))
            rows.append(item.first_row + steps)
            places.append(item.row * capacity + item.row_length + steps)
    if not rows:
        return None
    return SlotWrite(
        torch.from_numpy(np.concatenate(rows)).to(device), torch.from_numpy(np.concatenate(places)).to(device)
    )
