"""The radix tree: what it shares, what it evicts, and that its bound holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from asyndbt_dspy.lms.local.prefix_cache import PrefixCache


def split_text(kv: str, length: int) -> tuple[str, str]:
    return kv[:length], kv[length:]


def remember(cache: PrefixCache, ids: list[int]) -> None:
    """Use a prompt once, as the scheduler does; a node's kv are its own tokens, as a string of characters."""
    node = cache.match(ids)
    if node.end < len(ids):
        node = cache.extend(node, ids[node.end :])
    cache.pin(node)
    for each in node.path():
        if each.kv is None:
            each.kv = "".join(map(chr, each.tokens))
    cache.unpin(node)


def spelled(cache: PrefixCache, ids: list[int]) -> str:
    """What the tree knows of the beginning of `ids`."""
    return "".join(node.kv for node in cache.match(ids).path())


def test_shares_the_beginning_and_splits_where_prompts_part() -> None:
    cache = PrefixCache(100, split_text)
    remember(cache, [1, 2, 3, 4, 5])
    remember(cache, [1, 2, 3, 9, 9])
    assert cache.tokens == 7
    assert spelled(cache, [1, 2, 3, 9, 9, 7]) == "\x01\x02\x03\x09\x09"
    assert spelled(cache, [1, 2, 8]) == "\x01\x02"
    assert spelled(cache, [4]) == ""


def test_evicts_the_least_recently_used_leaf_first() -> None:
    cache = PrefixCache(6, split_text)
    remember(cache, [1, 1, 1])
    remember(cache, [2, 2, 2])
    remember(cache, [1, 1, 1])
    remember(cache, [3, 3, 3])
    assert spelled(cache, [1, 1, 1]) == "\x01\x01\x01"
    assert spelled(cache, [2, 2, 2]) == ""
    assert cache.tokens == 6


def test_pinned_prefixes_outlive_the_bound_and_go_when_unpinned() -> None:
    cache = PrefixCache(2, split_text)
    node = cache.extend(cache.root, [1, 2, 3, 4])
    cache.pin(node)
    node.kv = "abcd"
    cache.enforce()
    assert cache.tokens == 4
    cache.unpin(node)
    assert cache.tokens == 0


def test_a_split_keeps_the_path_of_whoever_holds_the_node() -> None:
    cache = PrefixCache(100, split_text)
    node = cache.extend(cache.root, [1, 2, 3, 4])
    node.kv = "abcd"
    cache.pin(node)
    cache.match([1, 2, 9])
    assert [each.kv for each in node.path()] == ["ab", "cd"]
    assert node.end == 4
    cache.unpin(node)
    assert all(each.pins == 0 for each in cache.nodes())


def test_pending_nodes_that_nobody_waits_for_are_dropped() -> None:
    cache = PrefixCache(100, split_text)
    node = cache.extend(cache.root, [1, 2])
    cache.pin(node)
    cache.unpin(node)
    assert cache.tokens == 0
    assert not list(cache.nodes())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12), st.integers(0, 20), st.data()
)
def test_pinned_tokens_are_those_of_the_pinned_nodes(
    prompts: list[list[int]], bound: int, data: st.DataObject
) -> None:
    cache = PrefixCache(bound, split_text)
    held = []
    for prompt in prompts:
        node = cache.match(prompt)
        if node.end < len(prompt):
            node = cache.extend(node, prompt[node.end :])
        cache.pin(node)
        held.append(node)
        if data.draw(st.booleans()):
            cache.unpin(held.pop(data.draw(st.integers(0, len(held) - 1))))
        assert cache.pinned_tokens == sum(len(each.tokens) for each in cache.nodes() if each.pins)
        assert cache.tokens <= bound + cache.pinned_tokens
    for node in held:
        cache.unpin(node)
    assert cache.pinned_tokens == 0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=25), st.integers(0, 20))
def test_what_is_known_is_right_and_within_the_bound(prompts: list[list[int]], bound: int) -> None:
    cache = PrefixCache(bound, split_text)
    for prompt in prompts:
        remember(cache, prompt)
        assert cache.tokens == sum(len(node.tokens) for node in cache.nodes()) <= bound
        known = spelled(cache, prompt)
        assert known == "".join(map(chr, prompt))[: len(known)]
        for node in cache.nodes():
            assert node.kv == "".join(map(chr, node.tokens))
            assert node.pins == 0
