"""The packed forward against transformers' own, for every supported architecture and every kind of item."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from local_tiny import tiny_model

from asyndbt_dspy.lms.local.attention import PackedAttention, attend, attend_plainly
from asyndbt_dspy.lms.local.fused_decoder import FusedDecoder, supports
from asyndbt_dspy.lms.local.lanes import Lanes, split_pass
from asyndbt_dspy.lms.local.layout import PassItem, TokenTree, build_layout
from asyndbt_dspy.lms.local.prefix_cache import Node
from asyndbt_dspy.lms.local.slots import SlotStore
from asyndbt_dspy.lms.local.transformers_decoder import TransformersDecoder

KINDS = [("llama", None), ("mistral", 24), ("qwen2", None), ("qwen3", None), ("gemma3_text", 24)]
PREFIX = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]


def run(decoder: Any, slots: SlotStore, items: list[PassItem]) -> dict[int, torch.Tensor]:
    """Logits of one pass by the identity of the item."""
    layout = build_layout(
        items,
        heads_per_key=decoder.shape.heads_per_key,
        windows=decoder.windows,
        slot_capacity=slots.capacity,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    with torch.inference_mode():
        logits, normalizers = decoder.run(layout, PackedAttention(layout, decoder.shape, slots))
    torch.testing.assert_close(normalizers, torch.logsumexp(logits, -1))
    found: dict[int, torch.Tensor] = {}
    first = 0
    for item in layout.items:
        found[id(item)] = logits[first : first + len(item.wanted)].clone()
        first += len(item.wanted)
    return found


def pending(decoder: Any, tokens: list[int], parent: Node) -> Node:
    node = Node(tuple(tokens), parent.end, parent)
    shape = decoder.shape
    node.kv = torch.empty(
        (shape.layers, 2, len(tokens), shape.key_heads, shape.head_size), dtype=decoder.dtype
    )
    return node


def reference(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


def new_slots(decoder: Any) -> SlotStore:
    shape = decoder.shape
    return SlotStore(
        shape.layers, shape.key_heads, shape.head_size, decoder.dtype, decoder.device, max_tokens=4096
    )


@pytest.fixture(scope="module", params=KINDS, ids=[kind for kind, _ in KINDS])
def models(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The plain model, and decoders over two further copies (one changes the model's attention function)."""
    kind, window = request.param
    model = tiny_model(kind, window=window)
    assert supports(model)
    return {
        "plain": model,
        "fused": FusedDecoder(tiny_model(kind, window=window)),
        "transformers": TransformersDecoder(tiny_model(kind, window=window)),
    }


@pytest.mark.parametrize("which", ["fused", "transformers"])
def test_prefix_tails_and_trees_in_one_pass_equal_separate_sequences(
    models: dict[str, Any], which: str
) -> None:
    decoder = models[which]
    root = Node((), 0, None)
    shared = pending(decoder, PREFIX[:20], root)
    deeper = pending(decoder, PREFIX[20:], shared)
    tree = TokenTree((11, 12, 13), (1, 2, 1), np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=bool))
    items = [
        PassItem(list(shared.tokens), 0, (), node=shared),
        PassItem(list(deeper.tokens), 20, (shared,), node=deeper),
        PassItem([40, 41, 42, 11, 12, 13], 30, (shared, deeper), tree=tree, wanted=(2, 3, 4, 5)),
        PassItem([50, 51, 52, 53, 54], 20, (shared,), wanted=(0, 4)),
        PassItem([60], 0, (), wanted=(0,)),
    ]
    found = run(decoder, new_slots(decoder), items)
    plain = models["plain"]
    branches = [[*PREFIX, 40, 41, 42, *branch] for branch in ([], [11], [11, 12], [13])]
    expected = torch.stack([reference(plain, ids)[-1] for ids in branches])
    torch.testing.assert_close(found[id(items[2])], expected, atol=2e-4, rtol=2e-4)
    expected = reference(plain, [*PREFIX[:20], 50, 51, 52, 53, 54])[[20, 24]]
    torch.testing.assert_close(found[id(items[3])], expected, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(found[id(items[4])], reference(plain, [60]), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("which", ["fused", "transformers"])
def test_slots_keep_a_sequence_across_passes(models: dict[str, Any], which: str) -> None:
    decoder = models[which]
    slots = new_slots(decoder)
    slots.reserve(3, 8)
    rows = [slots.take() for _ in range(3)]
    sequences = [PREFIX[:5], PREFIX[5:14], PREFIX[14:16]]
    items = [
        PassItem(list(ids), 0, (), row=row, wanted=(len(ids) - 1,))
        for row, ids in zip(rows, sequences, strict=True)
    ]
    slots.reserve(3, 9)
    run(decoder, slots, items)
    for row, ids in zip(rows, sequences, strict=True):
        slots.lengths[row] = len(ids)
    # The first sequence ends: the last moves into its row.
    assert slots.give_back(0) == 2
    left = [(0, sequences[2]), (1, sequences[1])]
    slots.reserve(2, 40)
    for new in ([30], [31, 32, 33]):
        items = [
            PassItem(list(new), len(ids), (), row=row, row_length=len(ids), wanted=(len(new) - 1,))
            for row, ids in left
        ]
        found = run(decoder, slots, items)
        left = [(row, ids + new) for row, ids in left]
        for item, (_, ids) in zip(items, left, strict=True):
            torch.testing.assert_close(
                found[id(item)][0], reference(models["plain"], ids)[-1], atol=2e-4, rtol=2e-4
            )


def test_the_private_kernel_returns_output_and_log_sum_exp() -> None:
    # A name that is not public API: when PyTorch moves it, this says so before users do.
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 7, 7))
    mask = torch.randn(2, 1, 5, 7, generator=generator)
    output, lse = attend(queries, keys, values, mask, 0.3)
    plain, plain_lse = attend_plainly(queries, keys, values, mask, 0.3)
    torch.testing.assert_close(output, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.float(), plain_lse, atol=1e-5, rtol=1e-5)


def test_parts_of_a_pass_are_independent_and_complete() -> None:
    root = Node((), 0, None)
    first, second = Node((1,) * 400, 0, root), Node((2,) * 400, 0, root)
    deeper = Node((3,) * 100, 400, first)
    items = [
        PassItem(list(deeper.tokens), 400, (first,), node=deeper),
        PassItem(list(first.tokens), 0, (), node=first),
        PassItem(list(second.tokens), 0, (), node=second),
        *[PassItem([5] * 60, 500, (first, deeper), wanted=(0,)) for _ in range(10)],
        *[PassItem([6] * 60, 400, (second,), wanted=(0,)) for _ in range(10)],
    ]
    nodes, tails = split_pass(items, 2)
    assert sorted(id(item) for part in nodes + tails for item in part) == sorted(map(id, items))
    for part in nodes:
        computed = {id(item.node) for item in part}
        assert all(id(node) in computed for item in part for node in item.path)
    sizes = [sum(len(item.tokens) for item in part) for part in tails]
    assert max(sizes) - min(sizes) <= 60
    assert split_pass(items, 1) == [[items]]


def test_an_error_in_a_lane_reaches_the_caller_after_all_have_ended() -> None:
    lanes = Lanes(torch.device("cpu"))
    lanes.count = 2
    before = torch.get_num_threads()
    ended: list[int] = []

    def fail() -> None:
        raise RuntimeError("lane")

    with pytest.raises(RuntimeError, match="lane"):
        lanes.run([fail, lambda: ended.append(1)])
    assert ended == [1]
    assert torch.get_num_threads() == before
    lanes.close()


def test_results_of_one_pass_survive_the_next_on_the_same_thread() -> None:
    decoder = FusedDecoder(tiny_model())
    slots = new_slots(decoder)
    layouts = [
        build_layout(
            [PassItem(ids, 0, (), wanted=(len(ids) - 1,))],
            heads_per_key=decoder.shape.heads_per_key,
            windows=decoder.windows,
            slot_capacity=0,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        for ids in (PREFIX[:6], PREFIX[6:12])
    ]
    with torch.inference_mode():
        first, _ = decoder.run(layouts[0], PackedAttention(layouts[0], decoder.shape, slots))
        before = first.clone()
        decoder.run(layouts[1], PackedAttention(layouts[1], decoder.shape, slots))
    assert torch.equal(first, before)
