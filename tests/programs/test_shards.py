"""Shards and held-out parts: nothing lost, nothing twice, classes spread evenly."""

from __future__ import annotations

from collections import Counter

import dspy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs.checks import held_out, shards

CLASSES = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=2, max_size=60)


def trainset(count: int) -> list[dspy.Example]:
    return [dspy.Example(text=str(n), region=f"r{n % 5}").with_inputs("text") for n in range(count)]


@settings(max_examples=100, deadline=None)
@given(CLASSES, st.integers(1, 6), st.integers(0, 3))
def test_every_example_is_in_one_shard_and_classes_are_even(
    strata: list[str | None], count: int, seed: int
) -> None:
    count = min(count, len(strata))
    dealt = shards(trainset(len(strata)), count, strata=strata, seed=seed)
    assert sorted(index for shard in dealt for index in shard) == list(range(len(strata)))
    sizes = [len(shard) for shard in dealt]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    for label in set(strata):
        per_shard = [sum(strata[index] == label for index in shard) for shard in dealt]
        assert max(per_shard) - min(per_shard) <= 1
    assert dealt == shards(trainset(len(strata)), count, strata=strata, seed=seed)


def test_the_seed_matters() -> None:
    assert shards(trainset(30), 3, seed=0) != shards(trainset(30), 3, seed=1)


def test_a_key_keeps_examples_together() -> None:
    examples = trainset(30)
    five = shards(examples, 5, key=lambda example: example.region)
    assert [{examples[index].region for index in shard} for shard in five] == [{f"r{n}"} for n in range(5)]
    two = shards(examples, 2, key=lambda example: example.region)
    regions = [{examples[index].region for index in shard} for shard in two]
    assert regions[0] | regions[1] == {f"r{n}" for n in range(5)} and not regions[0] & regions[1]
    assert sorted(len(shard) for shard in two) == [12, 18]
    with pytest.raises(ConfigurationError, match="5 distinct keys, too few for 6 workers"):
        shards(examples, 6, key=lambda example: example.region)


@pytest.mark.parametrize("count", [0, -1, 4])
def test_too_many_or_too_few_shards(count: int) -> None:
    with pytest.raises(ConfigurationError, match=f"3 examples cannot be dealt out to {count} workers"):
        shards(trainset(3), count)


def test_strata_must_fit() -> None:
    with pytest.raises(ConfigurationError, match="3 examples, 2 strata"):
        shards(trainset(3), 2, strata=["a", "b"])


@settings(max_examples=100, deadline=None)
@given(CLASSES, st.floats(0.05, 0.95), st.integers(0, 3))
def test_held_out_is_a_split_in_proportion(strata: list[str | None], fraction: float, seed: int) -> None:
    shard = [100 + 2 * n for n in range(len(strata))]
    estimate, race = held_out(shard, fraction=fraction, seed=seed, strata=strata)
    assert estimate and race and sorted(estimate + race) == shard
    assert abs(len(race) - fraction * len(shard)) <= 1
    of = dict(zip(shard, strata, strict=True))
    raced = Counter(of[index] for index in race)
    for label, size in Counter(strata).items():
        assert abs(raced[label] - len(race) * size / len(shard)) < 1
    assert (estimate, race) == held_out(shard, fraction=fraction, seed=seed, strata=strata)


def test_held_out_of_the_usual_size() -> None:
    estimate, race = held_out(range(40))
    assert (len(estimate), len(race)) == (30, 10)
    assert held_out(range(40), seed=1) != (estimate, race)


def test_what_cannot_be_split() -> None:
    with pytest.raises(ConfigurationError, match="a shard of 1 examples cannot be split"):
        held_out([3])
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigurationError, match=f"got {fraction}"):
            held_out([1, 2, 3], fraction=fraction)
