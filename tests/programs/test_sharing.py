"""Who holds whose race examples, and that the core and the evaluator number them alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import dspy
import pytest

from asyndbt_dspy import Worker
from asyndbt_dspy.core.config import DEFAULT
from asyndbt_dspy.core.handover import Handover
from asyndbt_dspy.core.roster import Member
from asyndbt_dspy.sharding import OwnFirst, make_workers, race_examples, split_shards

STUDENT = dspy.Predict("question -> answer")


def examples(count: int, start: int = 0) -> list[dspy.Example]:
    return [
        dspy.Example(question=f"{number}", answer="yes").with_inputs("question")
        for number in range(start, start + count)
    ]


def shards_of(workers: list[Worker], valset: Any = None, *, one_trainset: bool = False) -> list[Any]:
    config = dataclasses.replace(DEFAULT, minibatch=4)
    dealt_to = [one.name for one in workers] if one_trainset else ()
    return split_shards(workers, valset, STUDENT, config, needs_pool=True, seed=0, dealt_to=dealt_to)


def test_shards_of_one_trainset_are_one_group() -> None:
    workers = make_workers(3, examples(60), STUDENT, DEFAULT, shard_key=None, has_valset=False, seed=0)
    assert {one.group for one in shards_of(workers, one_trainset=True)} == {"trainset"}


@pytest.mark.parametrize("has_valset", [True, False])
def test_workers_with_data_of_their_own_share_only_a_common_valset(has_valset: bool) -> None:
    workers = [
        Worker("a", examples(20)),
        Worker("b", examples(20, 100)),
        Worker("c", examples(20, 200), valset=examples(8, 300)),
    ]
    groups = [one.group for one in shards_of(workers, examples(12, 500) if has_valset else None)]
    assert groups == (["valset", "valset", ""] if has_valset else ["", "", ""])


def test_workers_that_hold_the_same_trainset_are_a_group() -> None:
    workers = [
        Worker("a", examples(20)),
        Worker("b", examples(20)),
        Worker("c", examples(20, 200)),
        Worker("d", examples(30)),
    ]
    first, second, *others = [one.group for one in shards_of(workers)]
    assert first == second != ""
    assert others == ["", ""]


def test_numbers_of_the_core_are_places_at_the_evaluator() -> None:
    workers = make_workers(3, examples(61), STUDENT, DEFAULT, shard_key=None, has_valset=False, seed=0)
    shards = shards_of(workers, one_trainset=True)
    found = race_examples(shards)
    handover = Handover([Member(one.worker.name, (), len(one.held_out), group=one.group) for one in shards])
    for shard in shards:
        name, seen = shard.worker.name, found[shard.worker.name]
        assert isinstance(seen, OwnFirst)
        assert len(seen) == sum(len(one.held_out) for one in shards) == len(seen[:])
        for holder in shards:
            for place, example in enumerate(holder.held_out):
                assert seen[handover.number(name, holder.worker.name, place)] is example


def test_an_ungrouped_worker_has_its_own_examples_alone() -> None:
    shards = shards_of([Worker("a", examples(20)), Worker("b", examples(20, 100))])
    assert race_examples(shards) == {one.worker.name: one.held_out for one in shards}


def test_a_common_valset_goes_to_workers_without_one_of_their_own() -> None:
    workers = [
        Worker("a", examples(20)),
        Worker("b", examples(20, 100)),
        Worker("c", examples(20, 200), examples(2, 300)),
    ]
    raced_on = [
        sorted(int(one.question) for one in shard.held_out) for shard in shards_of(workers, examples(5, 500))
    ]
    assert sorted(raced_on[0] + raced_on[1]) == [500, 501, 502, 503, 504]
    assert [len(one) for one in raced_on] == [3, 2, 2] and raced_on[2] == [300, 301]
