"""Which examples traces are taken of, and which demos are offered."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Literal

import dspy
import kit
import pytest

from asyndbt_dspy import Worker
from asyndbt_dspy.preparation import SearchSpaceOptions, bootstrap_items, choose_demos
from asyndbt_dspy.programs.program_space import DemoItem, Source
from asyndbt_dspy.sharding import Shard

LETTERS = "abcdefghij"


class Asks:
    """In place of ``SetupRollouts``: notes what is asked for, and answers nothing."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def run(self, stage: str, asked: list[Any], may_begin: Any) -> list[None]:
        assert stage == "traces"
        self.asked = asked
        return [None] * len(asked)


def letters(pools: list[str], calls: int, program: dspy.Module | None = None) -> list[tuple[str, str]]:
    """(worker, class) of each trace, by the classes of the workers' pools; ``program``: a teacher."""

    class Letter(dspy.Signature):
        message: str = dspy.InputField()
        label: Literal["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"] = dspy.OutputField()

    shards = []
    for number, pool in enumerate(pools):
        examples = tuple(
            dspy.Example(message=f"{number}/{place}", label=label).with_inputs("message")
            for place, label in enumerate(pool)
        )
        shards.append(Shard(Worker(f"w{number}", kit.examples(2)), examples, examples, ()))
    setup = Asks()
    student, options = dspy.Predict(Letter), SearchSpaceOptions()
    work = bootstrap_items(setup, program or student, student, shards, options, calls, 0.5)  # type: ignore[arg-type]
    found = asyncio.run(work)
    assert found == ([], [])
    assert len({one.example.message for one in setup.asked}) == len(setup.asked), "no example twice"
    return [(one.worker, one.example.label) for one in setup.asked]


def test_traces_are_taken_of_every_class_as_often() -> None:
    # Classes come in blocks, as in a sorted file: the first few examples are of one class.
    pool = "".join(letter * 4 for letter in LETTERS)
    asked = letters([pool] * 3, 20)
    assert Counter(label for _, label in asked) == dict.fromkeys(LETTERS, 2)
    assert Counter(worker for worker, _ in asked) == {"w0": 7, "w1": 7, "w2": 6}


def test_the_student_says_what_the_classes_are_and_not_its_teacher() -> None:
    asked = letters(["a" * 10 + "b" * 10], 8, program=dspy.Predict("message -> label"))
    assert Counter(label for _, label in asked) == {"a": 4, "b": 4}


@pytest.mark.parametrize(("pools", "calls"), [(["aab", "b"], 4), (["", "ab"], 9)])
def test_a_pool_that_is_used_up_gives_no_more(pools: list[str], calls: int) -> None:
    expected = Counter(letter for pool in pools for letter in pool)
    asked = Counter(label for _, label in letters(pools, calls))
    assert sum(asked.values()) <= calls
    assert asked <= expected and set(asked) == set(expected)


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (("labelled", "corrected", "bootstrapped"), "bootstrapped"),
        (("labelled", "corrected"), "corrected"),
        (("labelled",), "labelled"),
    ],
)
def test_a_good_trace_is_preferred_and_then_a_corrected_one(
    there: tuple[Source, ...], chosen: Source
) -> None:
    items = [
        DemoItem(f"{source}{number}", "w", True, "p", dspy.Example(x=f"{source}{number}"), "a", 1, source)
        for number in range(4)
        for source in there
    ]
    assert [one.source for one in choose_demos(items, SearchSpaceOptions(demo_candidates=3), 0)] == [
        chosen
    ] * 3


def test_equal_traces_are_offered_once_and_the_better_one() -> None:
    def item(key: str, source: Source, **fields: Any) -> DemoItem:
        augmented = {} if source == "labelled" else {"augmented": True}
        return DemoItem(key, "w", True, "p", dspy.Example(**augmented, **fields), "a", 1, source)

    items = [
        item("c1", "corrected", topic="t", label="a"),
        item("b1", "bootstrapped", topic="t", label="a"),
        item("c2", "corrected", topic=["u"], label="a"),
        item("c3", "corrected", topic=["u"], label="a"),
        item("d1", "labelled", topic="t", label="a"),
    ]
    chosen = choose_demos(items, SearchSpaceOptions(), 0)
    assert [one.key for one in chosen] == ["b1", "c2"]
