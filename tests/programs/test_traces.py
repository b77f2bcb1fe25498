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

    async def run(self, stage: str, asked: list[Any]) -> list[None]:
        assert stage == "traces"
        self.asked = asked
        return [None] * len(asked)


def letters(pools: list[str], calls: int) -> list[tuple[str, str]]:
    """(worker, class) of each trace, by the classes of the workers' pools."""

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
    program, options = dspy.Predict(Letter), SearchSpaceOptions()
    found = asyncio.run(bootstrap_items(setup, program, shards, options, calls, 0.5))  # type: ignore[arg-type]
    assert found == ([], [])
    assert len({one.example.message for one in setup.asked}) == len(setup.asked), "no example twice"
    return [(one.worker, one.example.label) for one in setup.asked]


def test_traces_are_taken_of_every_class_as_often() -> None:
    # Classes come in blocks, as in a sorted file: the first few examples are of one class.
    pool = "".join(letter * 4 for letter in LETTERS)
    asked = letters([pool] * 3, 20)
    assert Counter(label for _, label in asked) == dict.fromkeys(LETTERS, 2)
    assert Counter(worker for worker, _ in asked) == {"w0": 7, "w1": 7, "w2": 6}


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
        DemoItem(f"{source}{number}", "w", True, "p", dspy.Example(), "a", 1, source)
        for number in range(4)
        for source in there
    ]
    assert [one.source for one in choose_demos(items, SearchSpaceOptions(demo_candidates=3), 0)] == [
        chosen
    ] * 3
