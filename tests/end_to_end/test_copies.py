"""Examples that repeat, in one trainset or at several workers: none is both shown and raced on, and none is raced on twice."""

from __future__ import annotations

import logging
import re
from collections import Counter
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import Budget, Worker
from asyndbt_dspy.core.config import DEFAULT
from asyndbt_dspy.sharding import Shard, split_shards
from asyndbt_dspy.splitting import dealt, split

STUDENT = dspy.Predict(kit.Sort)


def messages(examples: Any) -> list[str]:
    return [one.message for one in examples]


def shards_of(trainsets: list[list[dspy.Example]], **options: Any) -> list[Shard]:
    workers = [Worker(f"w{number}", one) for number, one in enumerate(trainsets)]
    return split_shards(workers, None, STUDENT, DEFAULT, needs_pool=True, seed=0, **options)


TRAINSETS: dict[str, list[list[dspy.Example]]] = {
    "copies in one": [kit.examples(20) * 4],
    "equal ones": [kit.examples(60)] * 3,
    "partly equal ones": [kit.examples(60), kit.examples(60, start=30), kit.examples(40, start=200)],
    "copies dealt out": [(kit.examples(25) * 4)[number::3] for number in range(3)],
}


@pytest.mark.parametrize("kind", TRAINSETS)
def test_copies_are_on_one_side_at_all_workers_and_raced_on_once(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainsets = TRAINSETS[kind]
    with caplog.at_level(logging.WARNING):
        shards = shards_of(trainsets)
    assert "have the inputs of another one" in caplog.text
    raced = [message for shard in shards for message in messages(shard.held_out)]
    shown = {message for shard in shards for message in messages(shard.pool)}
    scored = {message for shard in shards for message in messages(shard.estimate)}
    assert len(raced) == len(set(raced)) >= 4
    assert not set(raced) & (shown | scored)
    assert not shown & scored, "nor is a candidate scored on what it shows"
    assert shown | scored | set(raced) == {message for one in trainsets for message in messages(one)}
    sizes = [len(shard.held_out) for shard in shards]
    assert kind != "equal ones" or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("own", [True, False])
def test_valsets_that_repeat_are_raced_on_once(own: bool, caplog: pytest.LogCaptureFixture) -> None:
    valset = kit.examples(6, start=500)
    workers = [
        Worker(f"w{number}", kit.examples(20, start=100 * number), valset=valset if own else None)
        for number in range(3)
    ]
    with caplog.at_level(logging.WARNING):
        shards = split_shards(workers, None if own else valset * 3, STUDENT, DEFAULT, needs_pool=True, seed=0)
    raced = [message for shard in shards for message in messages(shard.held_out)]
    assert sorted(raced) == sorted(messages(valset))
    assert "12 of 18 examples of valsets have the inputs of another one" in caplog.text


def test_without_copies_workers_are_split_each_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    trainsets = [kit.examples(100), kit.examples(100, start=100)]
    with caplog.at_level(logging.WARNING):
        both = shards_of(trainsets)
        alone = shards_of(trainsets[:1])
    assert not caplog.text
    assert both[0] == alone[0]
    assert [len(shard.held_out) for shard in both] == [25, 25]


def test_dealing_gives_each_example_to_one_of_its_holders() -> None:
    parts = [kit.examples(6), kit.examples(6), kit.examples(3, start=100)]
    found = dealt(parts)
    assert [len(one) for one in found] == [3, 3, 3]
    assert Counter(message for one in found for message in messages(one)) == Counter(
        {message for one in parts for message in messages(one)}
    )


def test_a_worker_that_is_not_split_keeps_what_nobody_races_on() -> None:
    first, second = split([kit.examples(12), kit.examples(12)], [0.25, None], STUDENT, [0, 1])
    assert len(second[0]) == 3 and second[1] == []
    assert messages(first[0]) == messages(first[1])


def memory(prompts: list[dict[str, str]]) -> str:
    """Right where a demo shows this very message, else wrong."""
    number = kit.number_in(prompts)
    shown = " ".join(one["content"] for one in prompts[:-1] if one["role"] == "user")
    known = re.search(rf"item {number}\\b", shown)
    return kit.answer(prompts, label=kit.right_label(number) if known else "red")


@pytest.mark.parametrize("kind", ["copies in one", "equal ones"])
def test_a_program_that_knows_its_demos_by_heart_does_not_win(kind: str) -> None:
    numbers = [number for number in range(24) if number % 3]
    data = [kit.example(number) for number in numbers]
    options: dict[str, Any] = {"workers": 1}
    if kind == "equal ones":
        options = {"workers": [Worker(f"w{number}", data) for number in range(4)]}
    made = kit.optimizer(budget=Budget(metric_calls=300), demos_per_class=4, **options)
    with dspy.context(lm=kit.make_lm(memory), adapter=dspy.JSONAdapter()):
        program = made.compile(STUDENT, trainset=data * 5 if kind == "copies in one" else None)
    assert made.result.winner == "student" and not program.demos
