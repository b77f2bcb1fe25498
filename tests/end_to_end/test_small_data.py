"""Few examples: as many workers as these are enough for, and a race that can still tell programs apart."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Worker
from asyndbt_dspy.core.config import DEFAULT, PAPER
from asyndbt_dspy.sharding import Shard, make_workers, split_shards

STUDENT = dspy.Predict(kit.Sort)


def dealt(count: int, **options: Any) -> list[Worker]:
    """The default workers."""
    settings = {"shard_key": None, "has_valset": False, "seed": 0, "config": DEFAULT, **options}
    return make_workers(None, kit.examples(count), STUDENT, **settings)


def sizes_of(workers: list[Worker]) -> list[int]:
    return [len(one.trainset) for one in workers]


def shards_of(sizes: list[int], valset: Any = None) -> list[Shard]:
    workers = [Worker(f"w{number}", kit.examples(size, 1000 * number)) for number, size in enumerate(sizes)]
    return split_shards(workers, valset, STUDENT, DEFAULT, needs_pool=True, seed=0, is_fixed=False)


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(2, [2]), (23, [23]), (24, [12, 12]), (35, [18, 17]), (36, [12, 12, 12]), (120, [40, 40, 40])],
)
def test_three_workers_where_each_has_a_minibatch_beside_its_part_of_the_race(
    count: int, sizes: list[int]
) -> None:
    workers = dealt(count)
    assert sizes_of(workers) == sizes
    if count >= 12:
        dealt_to = [one.name for one in workers]
        shards = split_shards(workers, None, STUDENT, DEFAULT, needs_pool=True, seed=0, dealt_to=dealt_to)
        assert all(len(shard.estimate) >= DEFAULT.minibatch for shard in shards)


def test_nothing_is_kept_back_where_a_valset_is_given_or_no_race_is_run() -> None:
    assert sizes_of(dealt(18, has_valset=True)) == [6, 6, 6]
    assert sizes_of(dealt(17, has_valset=True)) == [9, 8]
    assert not PAPER.race and sizes_of(dealt(12, config=PAPER)) == [4, 4, 4]


def test_keys_bound_the_number_of_workers() -> None:
    assert sizes_of(dealt(60, shard_key=lambda one: int(one.message.split()[-1]) % 2)) == [30, 30]
    uneven = dealt(60, shard_key=lambda one: int(one.message.split()[-1]) // 27)
    assert sorted(sizes_of(uneven)) == [27, 33], "a shard of six has no minibatch beside its part of the race"


@pytest.mark.parametrize(
    ("sizes", "raced"),
    [
        ([12], [6]),  # half at most
        ([40], [20]),
        ([60], [24]),  # 24 where that is between a quarter and half
        ([20, 20, 20], [8, 8, 8]),
        ([40, 40, 40], [10, 10, 10]),  # a quarter at least
        ([8, 60], [2, 21]),  # a minibatch is left before more than a quarter is kept
    ],
)
def test_how_many_are_kept_back_for_the_race(sizes: list[int], raced: list[int]) -> None:
    assert [len(shard.held_out) for shard in shards_of(sizes)] == raced


def test_how_many_is_a_constant() -> None:
    workers = [Worker("w", kit.examples(100))]
    kept = [
        len(split_shards(workers, None, STUDENT, config, needs_pool=True, seed=0)[0].held_out)
        for config in (dataclasses.replace(DEFAULT, race_examples=count) for count in (0, 40, 90))
    ]
    assert kept == [25, 40, 50]


@pytest.mark.parametrize(("own", "kept"), [(9, 15), (16, 8), (60, 8)])
def test_what_others_bring_for_the_race_need_not_be_kept_back(own: int, kept: int) -> None:
    workers = [
        Worker("own", kit.examples(100), valset=kit.examples(own, 500)),
        Worker("none", kit.examples(30, 1000)),
    ]
    shards = split_shards(workers, None, STUDENT, DEFAULT, needs_pool=True, seed=0)
    assert [len(shard.held_out) for shard in shards] == [own, kept]


def test_a_shard_below_the_minibatch_is_told_of_and_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        shards = shards_of([60, 5])
    assert len(shards[1].estimate) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "worker 'w1' has 4 examples left to estimate on, so its minibatches have 4, not 6. With so few examples hardly any "
        "program can be told from the student; give it more if there are"
    ]


def test_many_shards_below_the_minibatch_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        shards_of([60, *[5] * 6, 4])
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "7 of 8 workers have 3 to 4 examples left to estimate on, so their minibatches have no more, not 6: "
        "'w1', 'w2', 'w3', 'w4', 'w5', …. With so few"
    )


def test_a_worker_whose_only_example_is_raced_on_is_refused() -> None:
    shared = kit.examples(4)
    raced = split_shards(
        [Worker("a", shared)], None, STUDENT, DEFAULT, needs_pool=True, seed=0, is_fixed=False
    )[0].held_out[0]
    workers = [Worker("a", shared), Worker("b", [raced])]
    with pytest.raises(ConfigurationError, match="worker 'b' has 0 examples left to estimate on"):
        split_shards(workers, None, STUDENT, DEFAULT, needs_pool=True, seed=0, is_fixed=False)


def compiled(count: int, **options: Any) -> tuple[AsynDBT, dspy.Module]:
    student = dspy.Predict(kit.Sort)
    optimizer = AsynDBT(
        kit.metric,
        budget=Budget(metric_calls=150),
        deterministic=True,
        progress=False,
        instructions={"self": [kit.MAGIC]},
        **options,
    )
    with dspy.context(lm=kit.color_lm(), adapter=dspy.JSONAdapter()):
        return optimizer, optimizer.compile(student, trainset=kit.examples(count))


def test_twenty_examples_are_enough_for_a_program_that_is_better() -> None:
    optimizer, program = compiled(20)
    assert optimizer.get_params()["workers"] is None
    assert [one.name for one in optimizer.result.workers] == ["worker-1"]
    assert program.signature.instructions == kit.MAGIC
    assert optimizer.result.candidates[0].examples <= 10 < optimizer.result.workers[0].calls


@pytest.mark.parametrize("count", [2, 5, 9])
def test_fewer_run_within_the_budget_too(count: int) -> None:
    optimizer, program = compiled(count)
    assert isinstance(program, dspy.Predict)
    assert 0 < optimizer.result.metric_calls <= 150 and len(optimizer.result.workers) == 1


def test_the_centralised_preset_has_its_one_worker() -> None:
    optimizer, _ = compiled(40, preset="cendbt", fragments=2)
    assert len(optimizer.result.workers) == 1 and optimizer.get_params()["workers"] == 1
