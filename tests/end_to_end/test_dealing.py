"""One trainset for workers that were described one by one, and limits for workers that were not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Worker
from asyndbt_dspy.compilation import prepare
from asyndbt_dspy.lms.scripted import AsyncScriptedEngine


class InFlight(AsyncScriptedEngine):
    """Answers after some turns of the loop, and notes how many requests were under way at most."""

    def __init__(self) -> None:
        super().__init__(kit.stairs(1), supports_schema=True)
        self.now = self.most = 0

    async def complete(self, request: Any) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        for _ in range(20):
            await asyncio.sleep(0)
        self.now -= 1
        return await super().complete(request)


def prepared(optimizer: AsynDBT, trainset: Any, valset: Any = None) -> Any:
    """The parts of a compile, before the search."""

    async def build() -> Any:
        run = await prepare(optimizer, dspy.Predict(kit.Sort), trainset, None, valset)
        await run.aclose()
        return run

    with dspy.context(lm=kit.color_lm()):
        return asyncio.run(build())


def messages(examples: Any) -> set[str]:
    return {one.message for one in examples}


def test_a_trainset_is_dealt_out_by_label_to_workers_with_lms_of_their_own() -> None:
    lms = [kit.color_lm(name) for name in ("first", "second", "third")]
    workers = [Worker(f"w{number}", lm=lm) for number, lm in enumerate(lms)]
    optimizer = kit.optimizer(workers=workers, mode="demos", budget=Budget(metric_calls=150))
    run = prepared(optimizer, kit.examples(84))
    parts = [messages(shard.worker.trainset) for shard in run.shards]
    assert set.union(*parts) == messages(kit.examples(84))
    assert sum(map(len, parts)) == 84
    for shard in run.shards:
        counts = [sum(one.label == label for one in shard.worker.trainset) for label in kit.LABELS]
        assert max(counts) - min(counts) <= 1
    assert {shard.group for shard in run.shards} == {"trainset"}
    asked = [kit.calls_of(lm) for lm in lms]
    with dspy.context(lm=None):
        better = optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(84))
    assert all(kit.calls_of(lm) > before for lm, before in zip(lms, asked, strict=True))
    with dspy.context(lm=kit.color_lm()):
        assert kit.score(better, kit.examples(30, start=100)) == 1.0
    assert all(worker.trainset is None for worker in workers)  # the user's own are as they were


def test_workers_with_shards_of_their_own_keep_them_beside_it() -> None:
    own = kit.examples(30, start=200)
    workers = [Worker("a"), Worker("own", own, share_demos=False), Worker("b")]
    run = prepared(kit.optimizer(workers=workers), kit.examples(60))
    first, kept, second = run.shards
    assert messages(kept.worker.trainset) == messages(own)
    assert messages(first.worker.trainset) | messages(second.worker.trainset) == messages(kit.examples(60))
    assert (first.group, kept.group, second.group) == ("trainset", "", "trainset")


def test_a_common_valset_is_dealt_out_beside_it() -> None:
    valset = kit.examples(20, start=300)
    run = prepared(kit.optimizer(workers=[Worker("a"), Worker("b")]), kit.examples(60), valset)
    assert {one for shard in run.shards for one in messages(shard.held_out)} == messages(valset)
    assert {shard.group for shard in run.shards} == {"valset"}


def test_examples_of_one_key_stay_together() -> None:
    optimizer = kit.optimizer(workers=[Worker("a"), Worker("b")], shard_key=lambda one: one.label == "red")
    run = prepared(optimizer, kit.examples(60))
    kinds = [{one.label == "red" for one in shard.worker.trainset} for shard in run.shards]
    assert sorted(kinds, key=str) == [{False}, {True}]


def test_a_run_with_dealt_shards_goes_on(tmp_path: Path) -> None:
    def run(lm: Any) -> str:
        optimizer = kit.optimizer(workers=[Worker("a"), Worker("b")], run_dir=tmp_path, resume=True)
        with dspy.context(lm=lm):
            return kit.state_of(optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60)))

    first = run(kit.color_lm())
    lm = kit.color_lm()
    assert run(lm) == first
    assert kit.calls_of(lm) == 0


@pytest.mark.parametrize(
    ("make", "trainset", "parts"),
    [
        (lambda: [Worker("a"), Worker("b")], None, ["['a', 'b']", "no shard of their own", "no trainset"]),
        (lambda: [Worker("a"), Worker("b", kit.examples(30))], None, ["['a']", "no trainset"]),
        (
            lambda: [Worker("a", share_demos=False)],
            kit.examples(60),
            ["'a' is private", "no trainset", "its own"],
        ),
        (
            lambda: [Worker("a", kit.examples(30))],
            (one for one in kit.examples(9)),
            ["trainset with 9 examples", "workers without a trainset"],
        ),
        (lambda: [Worker("a"), Worker("b"), Worker("c")], kit.examples(2), ["2 examples", "3 workers"]),
    ],
)
def test_data_that_cannot_be_dealt_out(make: Any, trainset: Any, parts: list[str]) -> None:
    lm = kit.color_lm()
    with dspy.context(lm=lm), pytest.raises(ConfigurationError) as caught:
        kit.optimizer(workers=make()).compile(dspy.Predict(kit.Sort), trainset=trainset)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert kit.calls_of(lm) == 0


@pytest.mark.parametrize(
    ("num_threads", "workers", "each"),
    [
        (None, None, [8, 8, 8]),
        (32, None, [11, 11, 10]),
        (2, None, [1, 1]),
        (1, None, [1]),
        (5, 4, [2, 1, 1, 1]),
    ],
)
def test_threads_are_of_all_workers_together(num_threads: Any, workers: Any, each: list[int]) -> None:
    run = prepared(kit.optimizer(workers=workers, num_threads=num_threads), kit.examples(84))
    assert [shard.worker.max_concurrency for shard in run.shards] == each


@pytest.mark.parametrize("num_threads", [1, 5])
def test_so_many_calls_are_in_flight_and_no_more(num_threads: int) -> None:
    engine = InFlight()
    optimizer = kit.optimizer(workers=None, num_threads=num_threads, deterministic=False)
    with dspy.context(lm=kit.lm_over(kit.stairs(1), engine)):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
    assert engine.most == num_threads


def test_a_rate_is_kept_where_there_is_only_a_number_of_workers() -> None:
    run = prepared(kit.optimizer(requests_per_minute=720, tokens_per_minute=1e6), kit.examples(60))
    assert {shard.worker.requests_per_minute for shard in run.shards} == {720}
    assert {shard.worker.tokens_per_minute for shard in run.shards} == {1e6}
    assert run.metering.is_on


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_threads": 0}, ["num_threads=0", "at least 1"]),
        ({"num_threads": 2, "workers": 3}, ["num_threads=2", "each of the workers (3)"]),
        ({"num_threads": 2.5}, ["num_threads=2.5", "whole number"]),
        ({"num_threads": 9, "workers": [Worker("a")]}, ["'num_threads': 9", "max_concurrency"]),
        (
            {"requests_per_minute": 60, "workers": [Worker("a")]},
            ["'requests_per_minute': 60", "Worker(", "requests_per_minute=…"],
        ),
        ({"requests_per_minute": 0}, ["requests_per_minute=0", "> 0"]),
        ({"tokens_per_minute": "60"}, ["tokens_per_minute='60'", "> 0"]),
    ],
)
def test_limits_that_cannot_be(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        kit.optimizer(**{"workers": None, **options})
    assert [part for part in parts if part not in str(caught.value)] == []
