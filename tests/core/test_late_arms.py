"""Arms that join during a run: drawn by nobody before, by everybody afterwards, and nothing is renumbered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from asyndbt_dspy.core.config import DEFAULT
from asyndbt_dspy.core.final import learned
from asyndbt_dspy.core.late_arms import LateArms
from asyndbt_dspy.core.lower_level import Surrogate
from asyndbt_dspy.core.messages import (
    ArmsJoined,
    Evaluate,
    Outcome,
    RoundRequest,
    Scored,
    Send,
    StepRequest,
    Wait,
)
from asyndbt_dspy.core.policies import Batch, Estimate, WorkerSpace
from asyndbt_dspy.core.posterior import PosteriorPolicy
from asyndbt_dspy.core.server import Member, ServerState
from asyndbt_dspy.core.space import Arm, Block, Space
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.errors import ConfigurationError, ProtocolError


def instructions(name: str, arms: int, late: int) -> Block:
    keys = tuple(Arm(f"i:{name}:{number}" if number else "") for number in range(arms))
    return Block(f"{name}/instructions", name, "instructions", keys, late=late)


SPACE = Space(
    (instructions("a", 5, 2), instructions("b", 3, 0), Block("a/demos/0", "a", "demo", (Arm(""), Arm("d"))))
)


def test_until_it_joins_an_arm_counts_as_arm_0() -> None:
    arms = LateArms(SPACE)
    assert arms.open == (3, 3)
    p = np.array([0.1, 0.2, 0.3, 0.15, 0.25, 0.5, 0.25, 0.25])
    assert arms.read(p).tolist() == pytest.approx([0.5, 0.2, 0.3, 0, 0, 0.5, 0.25, 0.25])
    arms.join((5, 3))
    assert arms.read(p) is p


def test_what_joins_gets_half_of_all_that_was_there() -> None:
    arms = LateArms(SPACE)
    p = np.array([0.1, 0.2, 0.3, 0.15, 0.25, 0.5, 0.25, 0.25])
    before = arms.open
    arms.join((4, 3))
    # What arm 3 stood in for is arm 0's, and everybody gives in proportion. Arm 4 has not joined.
    expected = [0.5 * 0.25, 0.5 * 0.2, 0.5 * 0.3, 0.5, 0.5 * 0.25, 0.5, 0.25, 0.25]
    assert arms.admit(p, before).tolist() == pytest.approx(expected)
    assert arms.read(arms.admit(p, before))[4] == 0.0


def test_many_arms_that_join_get_their_part() -> None:
    arms = LateArms(Space((instructions("a", 5, 4),)))
    before = arms.open
    arms.join((5,))
    assert arms.admit(np.full(5, 0.2), before).tolist() == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("wanted", [(5,), (6, 3), (2, 3), (5, 2), (5.0, 3), (True, 3), [5, 3], None])
def test_what_does_not_fit_or_takes_arms_back_is_refused(wanted: Any) -> None:
    with pytest.raises(ProtocolError, match="opens"):
        LateArms(SPACE).check("it", wanted)


def test_a_block_keeps_arm_0_and_only_lower_levels_have_late_arms() -> None:
    with pytest.raises(ConfigurationError, match=r"3 late arms; it must be 0\.\.2"):
        instructions("a", 3, 3)
    with pytest.raises(ConfigurationError, match=r"1 late arms; it must be 0\.\.0"):
        Block("a/demos/0", "a", "demo", (Arm(""), Arm("d")), late=1)
    assert Space.from_dict(SPACE.to_dict()) == SPACE


class Run:
    """A server and two workers; an answer is right where arm 4 of the first block was drawn."""

    def __init__(self, **overrides: Any) -> None:
        config = dataclasses.replace(
            DEFAULT, active_workers=2, draws=3, minibatch=4, race=False, iterations=10**6, **overrides
        )
        spaces = WorkerSpace(SPACE, ((0, 1),))
        members = [Member(f"w{number}", spaces.allowed, 4) for number in range(2)]
        self.server = ServerState(SPACE, members, config, None)
        self.workers = {
            one.name: WorkerState(one.name, number, spaces, config, examples=40)
            for number, one in enumerate(members)
        }
        self.drawn: list[int] = []
        self.requests: list[StepRequest] = []

    def steps(self, count: int) -> Iterator[int]:
        """``count`` updates of z; yields their numbers."""
        instructions = list(self.server.start()) if not self.server.version else self.left
        while self.server.version < count:
            one = instructions.pop(0)
            if not isinstance(one, Send) or not hasattr(one.message, "worker"):
                continue
            request = one.message
            self.requests.append(request)  # type: ignore[arg-type]
            worker = self.workers[request.worker]
            [evaluate] = worker.receive(request)  # type: ignore[arg-type]
            assert isinstance(evaluate, Evaluate)
            self.drawn += [candidate[0] for candidate in evaluate.candidates]
            outcomes = tuple(
                tuple(Outcome(float(candidate[0] == 4)) for _ in examples)
                for candidate, examples in zip(evaluate.candidates, evaluate.examples, strict=True)
            )
            [reply] = worker.receive(Scored(worker.name, evaluate.task, outcomes, 12))
            assert isinstance(reply, Send)
            before = self.server.version
            instructions += self.server.receive(reply.message)  # type: ignore[arg-type]
            self.left = instructions
            if self.server.version > before:
                yield self.server.version


@pytest.mark.parametrize("policy", ["posterior", "score_function"])
def test_nobody_draws_an_arm_before_it_joins_and_the_search_finds_it_then(policy: str) -> None:
    run = Run(policy=policy)
    for _ in run.steps(20):
        pass
    assert set(run.drawn) <= {0, 1, 2} and {request.open for request in run.requests} == {()}
    assert run.server.layout.argmax(run.server.arms.read(run.server.z))[0] < 3
    [waits] = run.server.receive(ArmsJoined((5, 3)))
    assert isinstance(waits, Wait)
    asked = len(run.drawn)
    for _ in run.steps(80):
        pass
    late = run.drawn[asked:]
    assert 4 in late[:60]
    assert late[-60:].count(4) > 30, "the only arm that is ever right"
    assert run.server.layout.argmax(run.server.z)[0] == 4
    assert run.requests[-1].open == (5, 3)


def settled() -> tuple[PosteriorPolicy, np.ndarray]:
    """A policy that is sure of a perfect candidate, and a p by which arm 4 of the first block is hardly ever drawn."""
    policy = PosteriorPolicy(WorkerSpace(SPACE, ((0, 1),)), dataclasses.replace(DEFAULT, draws=2), 40)
    p, q = np.array([1, 0, 0, 0, 0, 1.0, 0, 0]), np.array([0.5, 0.5])
    good, bad = (1, 0, 1), (0, 0, 0)
    empty = np.zeros((2, 2), dtype=np.int64)
    examples = tuple(range(30))
    batch = Batch((good, bad), (examples, examples), empty, empty, frozenset(examples), frozenset(examples))
    policy.update(p, q, batch, [np.zeros(30), np.ones(30)])
    return policy, np.array([1.0, 0, 0, 0, 1e-12, 1.0, 0, 0])


def drawn(policy: PosteriorPolicy, p: np.ndarray, steps: int) -> list[tuple[int, ...]]:
    q = np.array([0.5, 0.5])
    return [
        one for step in range(steps) for one in policy.draw(p, q, np.random.default_rng(step), 4).candidates
    ]


def test_what_joins_is_tried_once_with_the_best_demos_however_good_the_rest_is() -> None:
    policy, p = settled()
    assert all(one[0] != 4 for one in drawn(policy, np.where(p == 1e-12, 0.0, p), 20))
    assert policy.late == [(0, 3), (0, 4)], "what has not joined waits"
    found = drawn(policy, p, 20)
    assert found[0] == (4, 0, 1)
    assert all(one[0] != 4 for one in found[1:]), "from then on it has its chance as any arm has"


def test_what_another_worker_has_tried_needs_no_first_trial_here() -> None:
    policy, p = settled()
    outside = np.zeros((2, len(policy.keys.shared)))
    outside[0, policy.keys.shared.index("text:a/instructions:4")] = 5.0
    policy.merge(outside)
    assert all(one[0] != 4 for one in drawn(policy, p, 20))
    assert policy.late == [(0, 3)]


def test_an_event_that_does_not_fit_changes_nothing() -> None:
    run = Run()
    run.server.start()
    before = run.server.snapshot()
    with pytest.raises(ProtocolError, match=r"it must be 3\.\.5"):
        run.server.receive(ArmsJoined((2, 3)))
    assert run.server.snapshot() == before


def test_in_the_race_nothing_joins() -> None:
    run = Run()
    run.server.start()
    run.server.phase = "race"
    [waits] = run.server.receive(ArmsJoined((5, 3)))
    assert isinstance(waits, Wait) and "over" in waits.reason
    assert run.server.arms.open == (3, 3)


class Watching:
    """A policy that notes the p that it is given, and has no opinion."""

    def __init__(self) -> None:
        self.seen: dict[str, np.ndarray] = {}

    def draw(self, p: Any, q: Any, rng: Any, minibatch: int) -> Batch:
        self.seen["draw"] = p
        none = np.zeros((0, 0), dtype=np.int64)
        return Batch(((0, 0, 0),), ((0,),), none, none, frozenset({0}), frozenset({0}))

    def update(self, p: Any, q: Any, batch: Any, losses: Any) -> Estimate:
        self.seen["update"] = p
        return Estimate(np.zeros(8), np.zeros(2), Surrogate(np.zeros(8), p))

    def share(self) -> Any:
        return np.zeros((2, 0))

    def merge(self, outside: Any) -> None: ...

    def nominate(self, p: Any, q: Any) -> tuple[Any, ...]:
        self.seen["nominate"] = p
        return ()


def scored(worker: WorkerState, request: Any) -> Any:
    [evaluate] = worker.receive(request)
    assert isinstance(evaluate, Evaluate)
    [reply] = worker.receive(Scored("w", evaluate.task, ((Outcome(1.0),),), 1))
    assert isinstance(reply, Send)
    return reply.message


def step(version: int, *opened: int) -> StepRequest:
    zero, z = np.zeros(8), np.array([0.2] * 5 + [1 / 3] * 3)
    return StepRequest("w", version, z, zero, zero, np.zeros(2), np.zeros((2, 0)), open=tuple(opened))


def test_a_policy_never_sees_probability_of_what_has_not_joined() -> None:
    policy = Watching()
    config = dataclasses.replace(DEFAULT, penalty=0.0, floor=0.0, normalise=False)
    worker = WorkerState("w", 0, WorkerSpace(SPACE, ((0, 1),)), config, examples=4, policy=policy)
    reply = scored(worker, step(0))
    for kind in ("draw", "update", "nominate"):
        assert policy.seen[kind][:5].tolist() == pytest.approx([0.6, 0.2, 0.2, 0, 0]), kind
    assert reply.lower[:5].tolist() == pytest.approx([0.2] * 5), "what travels keeps its shape and its sum"
    request = RoundRequest("w", 1, 0, step(1).consensus, step(1).consensus, np.zeros(8))
    scored(worker, request)
    assert policy.seen["update"][:5].tolist() == pytest.approx([0.6, 0.2, 0.2, 0, 0])
    reply = scored(worker, step(1, 5, 3))
    assert policy.seen["draw"][:5].tolist() == pytest.approx([0.3, 0.1, 0.1, 0.25, 0.25])
    assert reply.lower[:5].tolist() == pytest.approx([0.3, 0.1, 0.1, 0.25, 0.25])
    scored(worker, step(2, 5, 3))
    assert policy.seen["draw"][:5].tolist() == pytest.approx([0.3, 0.1, 0.1, 0.25, 0.25]), "once"
    for wrong in ((6, 3), (4, 3), (5,)):
        with pytest.raises(ProtocolError, match="opens"):
            worker.receive(step(3, *wrong))


def test_what_never_joined_is_no_consensus() -> None:
    run = Run()
    run.server.z = np.array([0.1, 0.3, 0.1, 0.1, 0.4, 0.2, 0.3, 0.5])
    assert learned(run.server)[3] == (0, 2), "the closed arm's part is arm 0's"
    run.server.start()
    run.server.receive(ArmsJoined((5, 3)))
    assert learned(run.server)[3] == (4, 2)
