"""Projection and mirror descent on the simplex (``algorithm.md`` 8.1)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asyndbt_dspy.core.simplex import (
    Layout,
    exponentiated_step,
    project,
    project_blocks,
    project_columns,
    shared,
)

points = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-20, 20, allow_subnormal=False))


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((2, 0), (1, 0)),
        ((0.2, 0.2, 0.2), (1 / 3, 1 / 3, 1 / 3)),
        ((-1, -1, -1), (1 / 3, 1 / 3, 1 / 3)),
        ((1.2, 0.4, -0.3), (0.9, 0.1, 0)),
        ((0.6, 0.6, 0.2), (7 / 15, 7 / 15, 1 / 15)),
    ],
)
def test_projection_of_known_points(point: tuple[float, ...], expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(project(np.array(point, dtype=np.float64)), expected, rtol=1e-12, atol=1e-15)


@given(points)
def test_projection_lands_on_the_simplex_and_is_idempotent(point: np.ndarray) -> None:
    projected = project(point)
    assert np.all(projected >= 0)
    assert projected.sum() == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(project(projected), projected, atol=1e-14)


@given(points)
def test_a_single_short_point_is_projected_as_it_is_among_others(point: np.ndarray) -> None:
    """Bit by bit: one is added up in Python, the other by numpy."""
    among = project(np.tile(point, (3, 1)))
    for alone in (project(point), project(point[None])[0]):
        assert alone.tobytes() == among[1].tobytes()


@given(points, st.floats(-100, 100))
def test_projection_ignores_a_constant_and_follows_permutations(point: np.ndarray, shift: float) -> None:
    np.testing.assert_allclose(project(point + shift), project(point), atol=1e-12)
    order = np.random.default_rng(len(point)).permutation(len(point))
    np.testing.assert_array_equal(project(point[order]), project(point)[order])


@given(points, st.integers(0, 2**32 - 1))
def test_projection_is_the_nearest_point(point: np.ndarray, seed: int) -> None:
    rivals = np.random.default_rng(seed).dirichlet(np.ones(len(point)), size=50)
    nearest = np.sum((project(point) - point) ** 2)
    assert np.all(np.sum((rivals - point) ** 2, axis=1) >= nearest - 1e-9)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_blocks_are_projected_one_by_one(sizes: list[int], seed: int) -> None:
    layout = Layout(tuple(sizes))
    vectors = np.random.default_rng(seed).normal(size=(3, layout.length))
    projected = project_blocks(layout, vectors)
    for row, vector in zip(projected, vectors, strict=True):
        for part in layout.slices:
            np.testing.assert_allclose(row[part], project(vector[part]), atol=1e-15)
        assert layout.is_distribution(row)


def test_blocks_of_no_level_are_no_problem() -> None:
    layout = Layout(())
    assert project_blocks(layout, np.zeros((2, 0))).shape == (2, 0)
    assert layout.uniform().shape == (0,)
    assert layout.argmax(np.zeros(0)) == ()
    assert layout.is_distribution(np.zeros(0))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 999))
def test_projection_derivative_against_finite_differences(sizes: list[int], seed: int) -> None:
    layout = Layout(tuple(sizes))
    rng = np.random.default_rng(seed)
    vector, directions = rng.normal(size=layout.length), rng.normal(size=(layout.length, 3))
    step = 1e-7
    projected = project_blocks(layout, vector)
    columns = project_columns(layout, np.column_stack([vector, directions]))
    np.testing.assert_allclose(columns[:, 0], projected, atol=1e-14)
    analytic = columns[:, 1:]
    for column in range(3):
        ahead = project_blocks(layout, vector + step * directions[:, column])
        behind = project_blocks(layout, vector - step * directions[:, column])
        if np.array_equal(ahead > 0, projected > 0) and np.array_equal(behind > 0, projected > 0):
            np.testing.assert_allclose((ahead - behind) / (2 * step), analytic[:, column], atol=1e-6)


def test_layout_reads_and_names_values_by_block() -> None:
    layout = Layout((2, 3, 3))
    assert layout.slices == (slice(0, 2), slice(2, 5), slice(5, 8))
    assert layout.runs == ((slice(0, 2), 2), (slice(2, 8), 3))
    vector = np.array([0.5, 0.5, 0.2, 0.3, 0.5, 0.1, 0.8, 0.1])
    assert layout.argmax(vector) == (0, 2, 1)  # a tie goes to arm 0
    assert layout.block_values(vector, (1, 0, 2)).tolist() == [0.5, 0.2, 0.1]


@pytest.mark.parametrize(
    "vector", [[0.5, 0.6], [1.5, -0.5], [np.nan, 1.0], [np.inf, 0.0], [1.0], [[0.5, 0.5]]], ids=str
)
def test_what_is_no_distribution(vector: list[float]) -> None:
    assert not Layout((2,)).is_distribution(np.array(vector))


@pytest.mark.parametrize(
    "vector",
    [
        [0.6, 0.6, 0.4, 0.4],
        [0.5, 0.5, np.nan, 1.0],
        [0.5, 0.5, 1.5, -0.5],
        [np.nan, -5.0, 0.5, 0.5],
        [0.5, 0.5, 0.0, 0.0],
    ],
    ids=str,
)
def test_every_block_has_to_be_a_distribution(vector: list[float]) -> None:
    layout = Layout((2, 2))
    assert layout.is_distribution(np.array([0.5, 0.5, 1.0, 0.0]))
    assert not layout.is_distribution(np.array(vector))


@given(st.floats(0, 0.5), st.floats(-50, 50), st.integers(0, 999))
def test_mirror_descent_stays_on_the_simplex_above_its_floor(floor: float, size: float, seed: int) -> None:
    layout = Layout((3, 2))
    rng = np.random.default_rng(seed)
    start = np.concatenate([rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(2))])
    moved = exponentiated_step(layout, start, rng.normal(size=5) * size, 3.0, floor)
    assert layout.is_distribution(moved)
    assert np.all(moved[:3] >= floor / 3 - 1e-15)
    assert np.all(moved[3:] >= floor / 2 - 1e-15)


def test_mirror_descent_multiplies_by_the_exponential() -> None:
    layout = Layout((2,))
    moved = exponentiated_step(layout, np.array([0.25, 0.75]), np.array([0.0, 1.0]), 2.0, 0.0)
    weights = np.array([0.25, 0.75 * np.exp(-2.0)])
    np.testing.assert_allclose(moved, weights / weights.sum(), rtol=1e-14)


def test_an_absent_arm_cannot_starve_the_others() -> None:
    moved = exponentiated_step(Layout((2,)), np.array([0.0, 1.0]), np.array([-1e6, 0.0]), 1.0, 0.0)
    assert moved.tolist() == [0.0, 1.0]


def test_equal_layouts_become_one_object_in_their_places() -> None:
    layouts = [Layout((2, 3)), Layout((4,)), Layout((2, 3))]
    found = shared(layouts)
    assert found == layouts
    assert found[0] is found[2] and found[0] is not found[1]
