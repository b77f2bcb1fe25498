"""Where p and z begin: uniform, and with several predictors nearer to the student's own texts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT, PAPER
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.core.space import Arm, Block, Space
from asyndbt_dspy.core.starting import starting_distribution
from asyndbt_dspy.testing.toys import small_machines, small_space, two_predictor_space

UNIFORM = dataclasses.replace(DEFAULT, sparse_start=False)


def changes(space: Space, start: np.ndarray) -> float:
    """Texts that a draw is expected to change."""
    layout = Layout(tuple(len(block.arms) for block in space.lower))
    return sum(1.0 - float(start[part.start]) for part in layout.slices)


def instructions(predictor: str, arms: int, kind: str = "instructions") -> Block:
    keys = tuple(Arm(f"{predictor}:{number}" if number else "") for number in range(arms))
    return Block(f"{predictor}/{kind}", predictor, kind, keys)  # type: ignore[arg-type]


def test_one_predictor_begins_uniformly() -> None:
    space = small_space()
    assert starting_distribution(space, DEFAULT).tolist() == [0.25] * 4
    assert starting_distribution(space, UNIFORM).tolist() == [0.25] * 4


def test_of_two_predictors_each_begins_with_half_of_the_changes() -> None:
    space = Space((instructions("a", 6), instructions("b", 6)))
    start = starting_distribution(space, DEFAULT)
    assert start.tolist() == pytest.approx([7 / 12, *[1 / 12] * 5] * 2)
    assert changes(space, start) == pytest.approx(5 / 6)
    assert starting_distribution(space, UNIFORM).tolist() == pytest.approx([1 / 6] * 12)


@pytest.mark.parametrize("predictors", [2, 3, 7])
def test_a_draw_changes_as_many_texts_as_of_one_predictor(predictors: int) -> None:
    space = Space(tuple(instructions(f"p{number}", 5) for number in range(predictors)))
    assert changes(space, starting_distribution(space, DEFAULT)) == pytest.approx(0.8)
    assert changes(space, starting_distribution(space, UNIFORM)) == pytest.approx(0.8 * predictors)


def test_predictors_that_offer_no_choice_do_not_count() -> None:
    space = Space((instructions("a", 4), instructions("fixed", 1)))
    assert starting_distribution(space, DEFAULT).tolist() == [0.25] * 4 + [1.0]


def test_words_of_the_paper_begin_uniformly() -> None:
    space = Space((instructions("a", 4), instructions("b", 4), instructions("b", 3, "fragment")))
    start = starting_distribution(space, DEFAULT)
    assert start[:8].tolist() == pytest.approx([5 / 8, 1 / 8, 1 / 8, 1 / 8] * 2)
    assert start[8:].tolist() == pytest.approx([1 / 3] * 3)
    assert starting_distribution(space, PAPER).tolist() == pytest.approx([1 / 4] * 8 + [1 / 3] * 3)


def test_server_and_workers_begin_at_the_same_point() -> None:
    space = two_predictor_space()
    start = starting_distribution(space, DEFAULT)
    server, workers = small_machines(DEFAULT, space=space)
    assert start[0] > start[1]
    assert server.z.tolist() == start.tolist()
    assert all(row.tolist() == start.tolist() for row in server.p)
    assert all(worker.p.tolist() == start.tolist() for worker in workers)
