"""A radix tree over token ids that remembers what was already computed.

Every node holds a run of tokens and, once a pass has computed it, their keys and values; the path from the root
spells a prompt prefix. Two prompts that share a beginning share the nodes of that beginning: where they part, the
node is split. Nodes are created before they are computed, so that requests which arrive together and share a
prefix that nobody has computed yet wait for the same node.

Memory is bounded in tokens. What is used by a running request is pinned; of the rest, the least recently used leaf
goes first. The tree knows nothing of tensors: it stores what `store` is handed and cuts it with `split_kv`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Node:
    """A run of tokens in the tree.

    Attributes:
        tokens: The run; never empty except at the root.
        start: Position of the first token in the prompt.
        kv: Keys and values of the run, or None while it is pending.
        pins: How many running requests need the node.
        last_used: Logical time of the last use.
    """

    __slots__ = ("children", "kv", "last_used", "parent", "pins", "start", "tokens")

    def __init__(self, tokens: tuple[int, ...], start: int, parent: Node | None) -> None:
        self.tokens = tokens
        self.start = start
        self.parent = parent
        self.children: dict[int, Node] = {}
        self.kv: Any = None
        self.pins = 0
        self.last_used = 0

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    def path(self) -> list[Node]:
        """The nodes from below the root to this one."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes


class PrefixCache:
    """The tree, its memory bound and its clock.

    Args:
        max_tokens: Bound on the tokens kept for later requests, >= 0. Running requests may exceed it for as long as
            they run.
        split_kv: `split_kv(kv, n)` cuts the keys and values of a run after `n` tokens.
    """

    def __init__(self, max_tokens: int, split_kv: Callable[[Any, int], tuple[Any, Any]]) -> None:
        self.max_tokens = max_tokens
        self._split_kv = split_kv
        self.root = Node((), 0, None)
        self._clock = 0
        self.tokens = 0
        self.pinned_tokens = 0

    def match(self, ids: Sequence[int]) -> Node:
        """The deepest node, computed or pending, whose path is a beginning of `ids`; splits a node where they part."""
        node, position = self.root, 0
        while position < len(ids):
            child = node.children.get(ids[position])
            if child is None:
                break
            shared = _common_length(child.tokens, ids, position)
            if shared < len(child.tokens):
                if shared:
                    node = self.split(child, shared)
                break
            node = child
            position += shared
        return node

    def extend(self, node: Node, ids: Sequence[int]) -> Node:
        """Add a pending node with the tokens `ids` below `node`, which must have no child beginning with ids[0]."""
        child = Node(tuple(ids), node.end, node)
        node.children[ids[0]] = child
        self.tokens += len(child.tokens)
        return child

    def split(self, node: Node, length: int) -> Node:
        """Cut `node` after `length` tokens (0 < length < len) and return the new first part.

        The node object keeps its end, so that whoever holds it still holds the whole path; requests that pinned it
        pin both parts.
        """
        first = Node(node.tokens[:length], node.start, node.parent)
        assert node.parent is not None
        node.parent.children[first.tokens[0]] = first
        first.children[node.tokens[length]] = node
        first.pins, first.last_used = node.pins, node.last_used
        if node.kv is not None:
            first.kv, node.kv = self._split_kv(node.kv, length)
        node.parent, node.tokens, node.start = first, node.tokens[length:], node.start + length
        return first

    def pin(self, node: Node) -> None:
        """Keep the path of `node` until `unpin`, and count it as used now."""
        self._clock += 1
        for each in _upwards(node):
            if not each.pins:
                self.pinned_tokens += len(each.tokens)
            each.pins += 1
            each.last_used = self._clock

    def unpin(self, node: Node) -> None:
        """Give up one `pin` of `node`; drops pending nodes that nobody waits for, then enforces the bound."""
        for each in _upwards(node):
            each.pins -= 1
            if not each.pins:
                self.pinned_tokens -= len(each.tokens)
            if each.kv is None and not each.pins and not each.children:
                self._remove(each)
        self.enforce()

    def enforce(self) -> None:
        """Evict unpinned leaves, least recently used first, until the bound holds or only pinned nodes are left."""
        if self.tokens <= self.max_tokens:
            return
        leaves = [node for node in self.nodes() if not node.children and not node.pins]
        leaves.sort(key=lambda node: -node.last_used)
        while self.tokens > self.max_tokens and leaves:
            node = leaves.pop()
            parent = node.parent
            self._remove(node)
            if parent is not None and parent.parent is not None and not parent.children and not parent.pins:
                _insert_by_age(leaves, parent)

    def clear(self) -> None:
        """Forget everything, pinned nodes too: for an engine that closes or lost its thread."""
        self.root = Node((), 0, None)
        self.tokens = 0
        self.pinned_tokens = 0

    def nodes(self) -> Iterator[Node]:
        """All nodes below the root, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        if node.parent.children.get(node.tokens[0]) is node:
            del node.parent.children[node.tokens[0]]
            self.tokens -= len(node.tokens)
        node.kv = None


def _upwards(node: Node) -> Iterator[Node]:
    each: Node | None = node
    while each is not None and each.parent is not None:
        above = each.parent
        yield each
        each = above


def _common_length(tokens: Sequence[int], ids: Sequence[int], position: int) -> int:
    limit = min(len(tokens), len(ids) - position)
    length = 0
    while length < limit and tokens[length] == ids[position + length]:
        length += 1
    return length


def _insert_by_age(leaves: list[Node], node: Node) -> None:
    at = len(leaves)
    while at and leaves[at - 1].last_used < node.last_used:
        at -= 1
    leaves.insert(at, node)
