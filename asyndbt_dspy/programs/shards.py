"""Drawing the shards of workers, and the part of a shard that is kept back for the final race."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import dspy

from asyndbt_dspy.errors import ConfigurationError

MIN_SHARD = 2
"""One example to estimate on and one to race on."""


def shards(
    trainset: Sequence[dspy.Example],
    count: int,
    *,
    key: Callable[[dspy.Example], Hashable] | None = None,
    strata: Sequence[str | None] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Deal the examples out to ``count`` workers.

    Args:
        trainset: All examples.
        count: Number of shards, between 1 and the number of examples (of distinct keys, with ``key``).
        key: Examples of one key stay together (a customer, a region). With more keys than shards the largest
            groups are dealt out first, each to the shard that is smallest so far.
        strata: The class of each example (``labels.example_labels``), used without ``key``: every shard gets
            its share of each class, and the sizes differ by one at most.
        seed: Of the shuffle.

    Returns:
        Indices into ``trainset``, ascending, per shard; every example is in exactly one shard.

    Raises:
        ConfigurationError: ``count`` or the length of ``strata`` does not fit.
    """
    if not 1 <= count <= len(trainset):
        raise ConfigurationError(
            f"{len(trainset)} examples cannot be dealt out to {count} workers; give at least 1 worker and "
            f"at least one example to each"
        )
    rng = random.Random(seed)
    if key is not None:
        return _by_key(trainset, count, key, rng)
    dealt: list[list[int]] = [[] for _ in range(count)]
    turn = 0
    for group in _groups(list(range(len(trainset))), strata, rng):
        for index in group:
            dealt[turn % count].append(index)
            turn += 1
    return [sorted(shard) for shard in dealt]


def held_out(
    shard: Sequence[int],
    *,
    fraction: float = 0.25,
    seed: int = 0,
    strata: Sequence[str | None] | None = None,
) -> tuple[list[int], list[int]]:
    """Split a shard into examples to estimate on and examples to race on.

    Args:
        shard: Indices of the worker's examples, at least two.
        fraction: Share to keep back for the race, above 0 and below 1.
        seed: Of the shuffle.
        strata: The class of each member of ``shard``, in the same order; both parts get their share of each
            class.

    Returns:
        (estimate, race): indices, ascending, in the proportions asked for as nearly as whole examples allow;
        neither is empty.

    Raises:
        ConfigurationError: a shard of fewer than two examples, or a fraction out of bounds.
    """
    if len(shard) < MIN_SHARD:
        raise ConfigurationError(
            f"a shard of {len(shard)} examples cannot be split; it needs at least {MIN_SHARD}, "
            f"or a valset of its own"
        )
    if not 0.0 < fraction < 1.0:
        raise ConfigurationError(f"the held-out fraction must be above 0 and below 1, got {fraction}")
    groups = _groups(list(shard), strata, random.Random(seed))
    wanted = race_count(len(shard), fraction)
    shares = _apportioned([len(group) for group in groups], wanted)
    race = sorted(index for group, share in zip(groups, shares, strict=True) for index in group[:share])
    kept_back = set(race)
    return sorted(index for index in shard if index not in kept_back), race


def race_count(count: int, fraction: float) -> int:
    """How many of ``count`` >= 2 examples are raced on: at least one, and not all."""
    return min(count - 1, max(1, round(fraction * count)))


def _apportioned(sizes: Sequence[int], wanted: int) -> list[int]:
    """Split ``wanted`` in proportion to ``sizes``, by largest remainders (ties: the larger group)."""
    total = sum(sizes)
    shares = [wanted * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda n: (-(wanted * sizes[n] % total), -sizes[n], n))
    for number in by_remainder[: wanted - sum(shares)]:
        shares[number] += 1
    return shares


def _groups(indices: list[int], strata: Sequence[str | None] | None, rng: random.Random) -> list[list[int]]:
    """The indices by class, classes in a fixed order, each shuffled; one group where there are no classes."""
    if strata is not None and len(strata) != len(indices):
        raise ConfigurationError(
            f"strata must have one entry per example: {len(indices)} examples, {len(strata)} strata"
        )
    by_class: dict[str | None, list[int]] = defaultdict(list)
    for index, stratum in zip(indices, strata or [None] * len(indices), strict=True):
        by_class[stratum].append(index)
    groups = [by_class[stratum] for stratum in sorted(by_class, key=lambda text: (text is None, text or ""))]
    for group in groups:
        rng.shuffle(group)
    return groups


def _by_key(
    trainset: Sequence[dspy.Example], count: int, key: Callable[[dspy.Example], Hashable], rng: random.Random
) -> list[list[int]]:
    by_key: dict[Any, list[int]] = defaultdict(list)
    for index, example in enumerate(trainset):
        by_key[key(example)].append(index)
    if len(by_key) < count:
        raise ConfigurationError(
            f"the key function gives {len(by_key)} distinct keys, too few for {count} workers; "
            f"use at most {len(by_key)} workers"
        )
    if len(by_key) == count:
        return list(by_key.values())
    groups = list(by_key.values())
    rng.shuffle(groups)
    dealt: list[list[int]] = [[] for _ in range(count)]
    for group in sorted(groups, key=len, reverse=True):
        min(dealt, key=len).extend(group)
    return [sorted(shard) for shard in dealt]
