"""Fragments of the ``paper`` preset: BDPL's vocabulary of n-grams that hang together (arXiv:2201.08531)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import dspy

LONGEST_NGRAM = 5
MIN_PMI = 1.0
"""In nats. Neighbours of a lower PMI are cut apart. As in BDPL's published code, like the other two."""

MIN_COUNT = 5
"""Rarer pairs and n-grams are ignored, unless too few are left: shards are smaller than BDPL's data."""


def pmi_vocabulary(examples: Sequence[dspy.Example], output_field: str, size: int) -> list[str]:
    """The most frequent n-grams of the input texts, cut where neighbouring words have little to do with each
    other.

    Two neighbours ``a b`` hang together if ``log(count(a b) · pairs / (count(a) · count(b))) ≥ 1``. Texts are
    cut everywhere else, and what remains in one piece (five words at most) is an n-gram.

    Args:
        examples: Only those whose text may leave their worker: none of private workers.
        output_field: The field that holds the answer; its text is not used.
        size: The most n-grams to return, at least 1 (``N`` in the paper, 100).

    Returns:
        n-grams in lower case, the most frequent first, ties in alphabetical order; fewer than ``size`` if the
        texts have no more. The same examples give the same list in any order.
    """
    texts = [words for example in examples for words in _texts(example, output_field)]
    chosen: list[str] = []
    for min_count in range(MIN_COUNT, -1, -1):
        chosen = _ngrams(texts, min_count)[:size]
        if len(chosen) == size:
            break
    return chosen


def _texts(example: dspy.Example, output_field: str) -> list[list[str]]:
    inputs = example.inputs().toDict()
    values = [value for name, value in inputs.items() if name != output_field and isinstance(value, str)]
    texts = [[_bare(word) for word in value.lower().split()] for value in values]
    return [[word for word in words if word] for words in texts]


def _bare(word: str) -> str:
    """The word without punctuation around it."""
    start, end = 0, len(word)
    while start < end and not word[start].isalnum():
        start += 1
    while end > start and not word[end - 1].isalnum():
        end -= 1
    return word[start:end]


def _ngrams(texts: Sequence[Sequence[str]], min_count: int) -> list[str]:
    words = Counter(word for text in texts for word in text)
    pairs = Counter(pair for text in texts for pair in pairwise(text))
    total = sum(pairs.values())
    strong = {
        (first, second)
        for (first, second), count in pairs.items()
        if count > min_count and math.log(total * count / (words[first] * words[second])) >= MIN_PMI
    }
    found: Counter[str] = Counter()
    for text in texts:
        for piece in _pieces(text, strong):
            if len(piece) <= LONGEST_NGRAM:
                found[" ".join(piece)] += 1
    frequent = [(count, ngram) for ngram, count in found.items() if count > min_count]
    return [ngram for _, ngram in sorted(frequent, key=lambda pair: (-pair[0], pair[1]))]


def _pieces(text: Sequence[str], strong: set[tuple[str, str]]) -> list[list[str]]:
    pieces: list[list[str]] = []
    for number, word in enumerate(text):
        if number and (text[number - 1], word) in strong:
            pieces[-1].append(word)
        else:
            pieces.append([word])
    return pieces
