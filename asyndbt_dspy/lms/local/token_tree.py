"""The trie of an enumeration's labels, and the exact distribution over them from one pass.

Each label is a run of tokens. The inner nodes of the trie are appended to the prompt as a tree (`TokenTree`): the
logits at the last common token score the first tokens, those at a node score its children. The probability of a label
is the product over its tokens of the model's next-token probabilities, divided by the sum of these products over the
labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyndbt_dspy.lms.local.layout import TokenTree


@dataclass(frozen=True)
class LabelTrie:
    """Labels as tokens.

    Attributes:
        common: Tokens that every label begins with; not scored, since they are forced.
        tree: Inner nodes below the common beginning, or None when every label is one further token.
        scored_rows, scored_tokens: For each edge: the row of logits that scores it (0: at the last common token,
            1 + i: at tree token i) and the token it leads to.
        edges_of_label: For each label: indices into these two.
    """

    common: tuple[int, ...]
    tree: TokenTree | None
    scored_rows: np.ndarray
    scored_tokens: np.ndarray
    edges_of_label: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        """How many rows of logits the labels need."""
        return 1 + (len(self.tree.tokens) if self.tree else 0)


def build_trie(labels: Sequence[Sequence[int]]) -> LabelTrie:
    """The trie of at least two distinct runs of tokens, none of which is the beginning of another."""
    shared = 0
    shortest = min(len(label) for label in labels)
    while shared < shortest - 1 and len({label[shared] for label in labels}) == 1:
        shared += 1
    tokens: list[int] = []
    depths: list[int] = []
    parents: list[int] = []
    node_of: dict[tuple[int, ...], int] = {(): -1}
    edge_of: dict[tuple[int, int], int] = {}
    rows: list[int] = []
    heads: list[int] = []
    label_edges: list[tuple[int, ...]] = []
    for label in labels:
        run = tuple(label[shared:])
        edges: list[int] = []
        for depth, token in enumerate(run):
            node = node_of[run[:depth]]
            key = (node, token)
            if key not in edge_of:
                edge_of[key] = len(rows)
                rows.append(node + 1)
                heads.append(token)
            edges.append(edge_of[key])
            longer = run[: depth + 1]
            if depth + 1 < len(run) and longer not in node_of:
                node_of[longer] = len(tokens)
                tokens.append(token)
                depths.append(depth + 1)
                parents.append(node)
        label_edges.append(tuple(edges))
    tree = TokenTree(tuple(tokens), tuple(depths), _visible(parents)) if tokens else None
    return LabelTrie(tuple(labels[0][:shared]), tree, np.array(rows), np.array(heads), tuple(label_edges))


def _visible(parents: Sequence[int]) -> np.ndarray:
    visible = np.eye(len(parents), dtype=bool)
    for index, parent in enumerate(parents):
        if parent >= 0:
            visible[index] |= visible[parent]
    return visible


def label_log_probabilities(trie: LabelTrie, edge_log_probabilities: np.ndarray) -> np.ndarray:
    """Normalised log-probabilities of the labels from those of the trie's edges (float64, one per label)."""
    sums = np.array([edge_log_probabilities[list(edges)].sum() for edges in trie.edges_of_label])
    highest = sums.max()
    normalised: np.ndarray = sums - (highest + np.log(np.exp(sums - highest).sum()))
    return normalised
