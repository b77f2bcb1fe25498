"""The demo's support-desk data: sizes, labels, and no repeated or near-repeated messages."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "examples" / "data" / "support_desk"
LABELS = {"billing", "delivery", "returns", "login", "malfunction", "question"}
PER_LABEL = {"train": 32, "test": 30}
MIN_WORDS, MAX_WORDS = 8, 80
MAX_JACCARD = 0.2


def load(part: str) -> list[dict[str, str]]:
    """The rows of one part, `train` or `test`."""
    lines = (DATA / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def load_all() -> list[dict[str, str]]:
    return load("train") + load("test")


def words(message: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", message.lower())


def five_grams(message: str) -> set[tuple[str, ...]]:
    tokens = words(message)
    return {tuple(tokens[i : i + 5]) for i in range(len(tokens) - 4)}


def jaccard(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    """Share of common 5-grams, in 0..1."""
    union = len(left | right)
    return len(left & right) / union if union else 0.0


@pytest.mark.parametrize("part", ["train", "test"])
def test_each_label_has_its_number_of_messages(part: str) -> None:
    counts = Counter(row["label"] for row in load(part))
    assert counts == dict.fromkeys(LABELS, PER_LABEL[part])


def test_rows_have_exactly_the_three_text_fields() -> None:
    for row in load_all():
        assert set(row) == {"id", "message", "label"}
        assert all(isinstance(value, str) and value == value.strip() and value for value in row.values())


def test_ids_are_unique_and_well_formed() -> None:
    ids = [row["id"] for row in load_all()]
    assert len(set(ids)) == len(ids) == 372
    assert all(re.fullmatch(r"sd-\d{3}", row_id) for row_id in ids)


def test_texts_are_unique_within_and_across_parts() -> None:
    texts = Counter(" ".join(words(row["message"])) for row in load_all())
    assert [text for text, count in texts.items() if count > 1] == []


def test_no_two_messages_share_much_wording() -> None:
    grams = {row["id"]: five_grams(row["message"]) for row in load_all()}
    close = [(a, b) for a, b in combinations(grams, 2) if jaccard(grams[a], grams[b]) > MAX_JACCARD]
    assert close == []


def test_near_copies_are_recognised() -> None:
    """The measure itself: a message with one word changed at its end counts as a near copy."""
    message = load("train")[0]["message"]
    near_copy = " ".join([*words(message)[:-1], "otherwise"])
    assert jaccard(five_grams(message), five_grams(near_copy)) > MAX_JACCARD


def test_message_lengths() -> None:
    lengths = {row["id"]: len(row["message"].split()) for row in load_all()}
    assert {i: n for i, n in lengths.items() if not MIN_WORDS <= n <= MAX_WORDS} == {}


@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_are_mixed_in_file_order(part: str) -> None:
    """A file sorted by label would have 5 changes of label; a shuffled one has about 5/6 of its rows."""
    labels = [row["label"] for row in load(part)]
    changes = sum(a != b for a, b in pairwise(labels))
    assert changes > len(labels) / 2
