"""Cutting planes: validity, multipliers, life and death (``algorithm.md`` 8.5, 8.6)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyndbt_dspy.core import cuts
from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.lower_level import LowerEstimate
from asyndbt_dspy.core.messages import Instruction, Send, StepRequest
from asyndbt_dspy.core.rounds import RefreshSchedule
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.simplex import Layout
from asyndbt_dspy.testing.toys import AnchoredPolicy, step_reply, toy_machines

LAYOUT = Layout((3, 2))
CONFIG = AlgorithmConfig(plane_tolerance=0.1, plane_step=0.5, plane_damping=0.1, plane_drop=1e-3)
LIVE = np.ones(2)
NO_Q = np.zeros(0)


def random_points(seed: int, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points = np.concatenate(
        [rng.dirichlet(np.ones(3), size=(count, 3)), rng.dirichlet(np.ones(2), size=(count, 3))], axis=-1
    )
    return points[:, :2], points[:, 2]


def planes_at(seed: int, phi: LowerEstimate, config: AlgorithmConfig = CONFIG) -> tuple[cuts.Plane, ...]:
    p, z = random_points(seed)
    return cuts.refresh(LAYOUT, config, (), 0, p[0], z[0], phi, NO_Q, NO_Q, LIVE)


def estimate(seed: int) -> LowerEstimate:
    p, z = random_points(seed)
    return LowerEstimate(p[0], z[0])


def ball(
    seed: int, phi: LowerEstimate, block: int, radius: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random points with ``|x_i - phi_i|_1 <= radius`` in one block, some of them on the boundary's corners."""
    rng = np.random.default_rng(seed)
    part = LAYOUT.slices[block]
    width = 3 * LAYOUT.sizes[block]
    steps = rng.dirichlet(np.full(width, 0.3), size=count) * rng.choice([-1.0, 1.0], size=(count, width))
    steps *= radius * rng.uniform(size=(count, 1)) ** 0.1
    steps[:width] = np.eye(width) * radius
    p, z = np.tile(phi.p, (count, 1, 1)), np.tile(phi.z, (count, 1))
    p[:, :, part] += steps[:, : 2 * LAYOUT.sizes[block]].reshape(count, 2, -1)
    z[:, part] += steps[:, 2 * LAYOUT.sizes[block] :]
    return p, z


def left_hand_sides(plane: cuts.Plane, p: np.ndarray, z: np.ndarray) -> np.ndarray:
    return np.array([plane.value(one, other, NO_Q, LIVE, NO_Q) for one, other in zip(p, z, strict=True)])


def test_ten_thousand_feasible_points_satisfy_every_plane_of_the_same_estimate() -> None:
    phi = estimate(0)
    planes = [plane for seed in range(1, 6) for plane in planes_at(seed, phi)]
    assert len(planes) >= 8
    violated_without_epsilon = 0
    for number, plane in enumerate(planes):
        p, z = ball(number, phi, plane.block, CONFIG.plane_tolerance, 10_000 // len(planes) + 1)
        values = left_hand_sides(plane, p, z)
        assert values.max() <= 1e-12
        violated_without_epsilon += int(np.sum(values + CONFIG.plane_tolerance > 1e-9))
    # Printed (33) lacks the -epsilon: without it the planes cut feasible points off.
    assert violated_without_epsilon > 0


@given(st.integers(0, 500))
def test_the_point_that_made_a_plane_violates_it_by_its_distance_beyond_epsilon(seed: int) -> None:
    phi = estimate(seed + 1000)
    p, z = random_points(seed)
    distances = cuts.violation(LAYOUT, p[0], z[0], phi, LIVE)
    made = planes_at(seed, phi)
    assert [plane.block for plane in made] == [
        block for block, far in enumerate(distances) if far > CONFIG.plane_tolerance
    ]
    for plane in made:
        value = plane.value(p[0], z[0], NO_Q, LIVE, NO_Q)
        assert value == pytest.approx(distances[plane.block] - CONFIG.plane_tolerance, abs=1e-12)


def test_a_q_part_leaves_the_value_at_its_own_point_and_follows_q() -> None:
    rng = np.random.default_rng(3)
    p, z = random_points(5)
    base = estimate(6)
    phi = LowerEstimate(base.p, base.z, rng.normal(size=(2, 5, 4)), rng.normal(size=(5, 4)))
    q, owner = rng.dirichlet(np.ones(2), size=2).ravel(), np.repeat([0.0, 1.0], 2)
    (plane, *_) = cuts.refresh(LAYOUT, CONFIG, (), 0, p[0], z[0], phi, q, owner, LIVE)
    far = cuts.violation(LAYOUT, p[0], z[0], phi, LIVE)[plane.block]
    assert plane.value(p[0], z[0], q, LIVE, np.ones(4)) == pytest.approx(
        far - CONFIG.plane_tolerance, abs=1e-12
    )
    step = np.array([0.0, 0.0, 1e-3, 0.0])
    ahead = LowerEstimate(phi.p + phi.p_by_q @ step, phi.z + phi.z_by_q @ step)
    moved = cuts.violation(LAYOUT, p[0], z[0], ahead, LIVE)[plane.block] - far
    assert plane.value(p[0], z[0], q + step, LIVE, np.ones(4)) - (far - 0.1) == pytest.approx(
        moved, abs=1e-12
    )


@pytest.mark.parametrize(("value", "expected"), [(0.2, 0.385), (-1.0, 0.0)])
def test_update_of_a_multiplier(value: float, expected: float) -> None:
    plane = dataclasses.replace(planes_at(1, estimate(0))[0], multiplier=0.3)
    assert cuts.update_multiplier(CONFIG, plane, value).multiplier == pytest.approx(expected, abs=1e-15)


def test_no_plane_from_iteration_t1_on_nor_within_epsilon() -> None:
    p, z = random_points(1)
    phi = estimate(0)
    late = dataclasses.replace(CONFIG, plane_iterations=7)
    make = lambda config, t, at: cuts.refresh(LAYOUT, config, (), t, p[0], z[0], at, NO_Q, NO_Q, LIVE)  # noqa: E731
    assert make(late, 6, phi)
    assert not make(late, 7, phi)
    assert not make(CONFIG, 0, LowerEstimate(p[0], z[0]))
    distance = float(cuts.violation(LAYOUT, p[0], z[0], phi, LIVE).max())
    assert not make(dataclasses.replace(CONFIG, plane_tolerance=distance), 0, phi)
    assert make(dataclasses.replace(CONFIG, plane_tolerance=distance - 1e-9), 0, phi)


def test_a_plane_dies_after_two_low_updates_in_a_row() -> None:
    plane = planes_at(1, estimate(0))[0]
    once = cuts.update_multiplier(CONFIG, plane, -1.0)
    assert cuts.drop_idle((once,)) == (once,)
    assert cuts.drop_idle((cuts.update_multiplier(CONFIG, once, -1.0),)) == ()
    revived = cuts.update_multiplier(CONFIG, once, 1.0)
    assert revived.low == 0


def test_planes_are_keyed_by_their_signs_or_pile_up() -> None:
    p, z = random_points(1)
    first, second = estimate(0), estimate(0)
    shrunk = LowerEstimate(
        p[0] + 0.9 * (second.p - p[0]), z[0] + 0.9 * (second.z - z[0])
    )  # same signs, nearer
    counts = {}
    for rekey in (True, False):
        config = dataclasses.replace(CONFIG, rekey_planes=rekey)
        made = cuts.refresh(LAYOUT, config, (), 0, p[0], z[0], first, NO_Q, NO_Q, LIVE)
        made = tuple(dataclasses.replace(plane, multiplier=0.2, low=1) for plane in made)
        again = cuts.refresh(LAYOUT, config, made, 10, p[0], z[0], shrunk, NO_Q, NO_Q, LIVE)
        counts[rekey] = (len(made), len(again))
        kept = again[0]
        assert (kept.multiplier, kept.low) == (0.2, 1)
        expected = shrunk if rekey else first
        part = LAYOUT.slices[kept.block]
        constant = (
            -np.sum(kept.a[:, part] * expected.p[:, part]) - np.dot(kept.b[part], expected.z[part]) - 0.1
        )
        assert kept.offset + kept.offsets.sum() == pytest.approx(constant, abs=1e-12)
    assert counts[True] == (2, 2)
    assert counts[False] == (2, 4)


def test_planes_that_differ_only_in_a_lost_workers_signs_become_one() -> None:
    p, z = random_points(1)
    phi = estimate(0)
    (plane,) = [one for one in planes_at(1, phi) if one.block == 0]
    mirrored = dataclasses.replace(plane, a=plane.a * np.array([[1.0], [-1.0]]), multiplier=0.25)
    pair = (dataclasses.replace(plane, multiplier=0.5), mirrored)
    both = cuts.refresh(LAYOUT, CONFIG, pair, 1, p[0], z[0], phi, NO_Q, NO_Q, LIVE)
    assert len([one for one in both if one.block == 0]) == 2
    (merged,) = [
        one
        for one in cuts.refresh(LAYOUT, CONFIG, pair, 1, p[0], z[0], phi, NO_Q, NO_Q, np.array([1.0, 0.0]))
        if one.block == 0
    ]
    assert merged.multiplier == 0.75
    assert not merged.a[1].any()


# --------------------------------------------------------------------------- through the shipped server


def served(config: AlgorithmConfig) -> ServerState:
    """A server whose two workers pull to opposite corners, so that every refresh finds the block violated."""
    server, _ = toy_machines([AnchoredPolicy(np.array([1.0, 0.0]))] * 2, config)
    server.start()
    return server


def answer(server: ServerState, lowers: list[list[float]]) -> list[Instruction]:
    requests = [
        StepRequest(
            member.name, server.version, server.z, server.duals[0], server.z, np.zeros(2), np.zeros((2, 0))
        )
        for member in server.members
    ]
    instructions: list[Instruction] = []
    for request, lower in zip(requests, lowers, strict=True):
        reply = dataclasses.replace(step_reply(request, np.array(lower)), gradient=np.array([1.0, -1.0]))
        instructions = server.receive(reply)
    return instructions


SERVED = AlgorithmConfig(
    active_workers=2, max_staleness=1, share_effects=False, race=False, share_demos=False, round_step=0.5
)


def test_the_server_adds_a_plane_charges_it_and_pushes_with_it() -> None:
    server = served(SERVED)
    answer(server, [[0.8, 0.2], [0.9, 0.1]])
    assert [plane.multiplier for plane in server.planes] == [0.0]
    sent = answer(server, [[0.8, 0.2], [0.9, 0.1]])
    (plane,) = server.planes
    assert plane.multiplier > 0
    requests = [one.message for one in sent if isinstance(one, Send)]
    for number, request in enumerate(requests):
        assert isinstance(request, StepRequest)
        assert request.plane_push.tolist() == (plane.multiplier * plane.a[number]).tolist()


def test_the_server_adds_none_once_t1_is_reached() -> None:
    server = served(dataclasses.replace(SERVED, plane_iterations=0))
    answer(server, [[0.8, 0.2], [0.9, 0.1]])
    assert server.planes == ()
    assert server.estimate is None  # not even computed


def test_a_plane_without_multiplier_leaves_every_step_bit_identical() -> None:
    bare, planed = served(SERVED), served(SERVED)
    answer(bare, [[0.8, 0.2], [0.9, 0.1]])
    answer(planed, [[0.8, 0.2], [0.9, 0.1]])
    bare.planes = ()
    assert planed.planes
    still = dataclasses.replace(SERVED, plane_step=0.0)
    bare.config = planed.config = still
    lowers = [[0.3, 0.7], [0.7000000001, 0.2999999999]]
    sent = [answer(server, lowers) for server in (bare, planed)]
    assert bare.z.tobytes() == planed.z.tobytes()
    for one, other in zip(*sent, strict=True):
        assert isinstance(one, Send)
        assert isinstance(other, Send)
        assert isinstance(one.message, StepRequest)
        assert isinstance(other.message, StepRequest)
        assert one.message.plane_push.tobytes() == other.message.plane_push.tobytes()
        assert one.message.consensus.tobytes() == other.message.consensus.tobytes()


@pytest.mark.parametrize(
    ("buffered", "living", "due"),
    [(True, 255, [True, True, True]), (True, 400, [False, False, True]), (False, 400, [True, True, True])],
)
def test_with_very_many_workers_planes_wait_for_a_quarter_of_them(
    buffered: bool, living: int, due: list[bool]
) -> None:
    schedule = RefreshSchedule(AlgorithmConfig(plane_period=1, buffered_lower=buffered))
    assert [schedule.is_due(version, 40, living) for version in (1, 2, 3)] == due
    assert schedule.is_due(4, 40, 40)


def charged_planes(workers: int, width: int, seed: int) -> tuple[cuts.Plane, ...]:
    rng = np.random.default_rng(seed)
    a, d = (rng.choice([-1.0, 0.0, 1.0], (3, *shape)) for shape in ((workers, 5), (workers * width,)))
    charges = (0.7, 0.0, 1.3)
    return tuple(
        cuts.Plane(0, own, np.zeros(5), other, np.zeros(workers), 0.0, multiplier=charge)
        for own, other, charge in zip(a, d, charges, strict=True)
    )


@pytest.mark.parametrize("width", [0, 2])
def test_each_worker_is_pushed_with_its_own_row_of_the_sum_over_planes(width: int) -> None:
    workers = 4
    pushes = cuts.Pushes(LAYOUT, [Layout((2,))] * workers, [width] * workers)
    for seed in range(2):  # the planes change once
        planes = charged_planes(workers, width, seed)
        lower = sum(plane.multiplier * plane.a for plane in planes)
        upper = sum(plane.multiplier * plane.d for plane in planes).reshape(workers, width)
        for number in (2, 0, 1, 2, 3):
            push, push_upper = pushes.of(planes, number)
            np.testing.assert_array_equal(push, lower[number])
            np.testing.assert_array_equal(push_upper, upper[number] if width else np.zeros(2))
            push += 1.0  # a message's own
            if width:
                push_upper += 1.0
            else:
                with pytest.raises(ValueError, match="read-only"):
                    push_upper[0] = 1.0  # many messages share it


class Counted(np.ndarray):
    """Counts what is done with it."""

    passes = 0

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        Counted.passes += 1
        plain = [one.view(np.ndarray) if isinstance(one, Counted) else one for one in inputs]
        return getattr(ufunc, method)(*plain, **options)


def test_requests_between_two_changes_of_the_planes_share_one_sum() -> None:
    planes = tuple(
        dataclasses.replace(one, a=one.a.view(Counted)) if one.multiplier else one
        for one in charged_planes(60, 0, 0)
    )
    pushes, Counted.passes = cuts.Pushes(LAYOUT, [Layout((2,))] * 60, [0] * 60), 0
    for number in range(60):
        pushes.of(planes, number)
    assert Counted.passes == 2  # one for each plane that is charged
    pushes.of((*planes,), 1)
    assert Counted.passes == 4
