"""Toy problems with known optimum (``algorithm.md`` 8) and small scripted ones: no program, no LM.

The toys run through the shipped machines: a policy with exact gradients stands where samples would, an evaluator reads
scores off a function.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.lower_level import Surrogate
from asyndbt_dspy.core.messages import (
    Evaluate,
    Outcome,
    RoundReply,
    RoundRequest,
    Scored,
    StepReply,
    StepRequest,
)
from asyndbt_dspy.core.policies import Batch, Estimate, Nomination, Policy, WorkerSpace
from asyndbt_dspy.core.server import Member, ServerState
from asyndbt_dspy.core.simplex import FloatArray
from asyndbt_dspy.core.space import Arm, Block, Space
from asyndbt_dspy.core.worker import WorkerState

Score = Callable[[str, tuple[int, ...], int, bool], float | None]
"""``(worker, candidate, example, held_out) -> score``; ``None`` is a missing rollout."""


def two_arm_space() -> Space:
    """One lower-level and one upper-level block of two arms each: ``r = p_0``, ``s = q_0``."""
    lower = Block("toy/instructions", "toy", "instructions", (Arm(""), Arm("i:1")))
    upper = Block("toy/demos/0", "toy", "demo", (Arm(""), Arm("d:1")))
    return Space((lower, upper))


def toy_spaces(space: Space) -> WorkerSpace:
    """Every worker may use every arm."""
    return WorkerSpace(space, tuple(tuple(range(len(block.arms))) for block in space.upper))


class ExactPolicy:
    """Base of policies that need no rollouts: exact gradients in place of samples."""

    def draw(self, p: FloatArray, q: FloatArray, rng: np.random.Generator, minibatch: int) -> Batch:
        none = np.zeros((0, 0), dtype=np.int64)
        return Batch((), (), none, none, frozenset(), frozenset())

    def share(self) -> FloatArray:
        return np.zeros((2, 0))

    def merge(self, outside: FloatArray) -> None:
        """Nothing is exchanged but p."""

    def nominate(self, p: FloatArray, q: FloatArray) -> tuple[Nomination, ...]:
        return ()


@dataclass
class QuadraticPolicy(ExactPolicy):
    """Lower loss ``1/2 (r - a - b s)^2``, upper loss ``1/2 (r - r*)^2 + w/2 (s - s*)^2`` on ``two_arm_space``.

    Attributes:
        a, b: Of the lower level.
        target, weight, upper_target: r*, w and s* of the upper level.
    """

    a: float
    b: float = 0.5
    target: float = 0.6
    weight: float = 0.25
    upper_target: float = 0.2

    def update(self, p: FloatArray, q: FloatArray, batch: Batch, losses: Sequence[FloatArray]) -> Estimate:
        gradient = np.array([p[0] - self.a - self.b * q[0], 0.0])
        curvature = np.array([[1.0, 0.0], [0.0, 0.0]])
        cross = np.array([[-self.b, 0.0], [0.0, 0.0]])
        lower = np.array([p[0] - self.target, 0.0])
        upper = np.array([self.weight * (q[0] - self.upper_target), 0.0])
        return Estimate(lower, upper, Surrogate(gradient, p, curvature, cross))


@dataclass
class AnchoredPolicy(ExactPolicy):
    """Both levels' loss ``curvature/2 |p - anchor|^2``; q stays where it is. ``curvature = 0``: p learns nothing.

    Attributes:
        anchor: Point that p is drawn to, shape ``[D]``.
        curvature: >= 0.
    """

    anchor: FloatArray
    curvature: float = 1.0

    def update(self, p: FloatArray, q: FloatArray, batch: Batch, losses: Sequence[FloatArray]) -> Estimate:
        gradient = self.curvature * (p - self.anchor)
        model = Surrogate(gradient, p, self.curvature * np.eye(len(p)))
        return Estimate(gradient, np.zeros_like(q), model)


def toy_machines(
    policies: Sequence[Policy], config: AlgorithmConfig, space: Space | None = None
) -> tuple[ServerState, list[WorkerState]]:
    """The shipped server and one shipped worker ``w0, w1, ..`` per policy, without a budget."""
    spaces = toy_spaces(space or two_arm_space())
    members = [Member(f"w{number}", spaces.allowed) for number in range(len(policies))]
    workers = [
        WorkerState(member.name, number, spaces, config, examples=1, policy=policy)
        for number, (member, policy) in enumerate(zip(members, policies, strict=True))
    ]
    return ServerState(spaces.space, members, config), workers


def step_reply(request: StepRequest, lower: FloatArray, upper: FloatArray | None = None) -> StepReply:
    """A worker's answer that says nothing but its p (and q): for scripted, frozen or lying workers."""
    none = np.zeros((2, request.effects.shape[1]))
    return StepReply(
        request.worker,
        request.version,
        lower,
        upper,
        gradient=np.zeros_like(lower),
        curvature=None,
        cross=None,
        effects=none,
        nominations=(),
        calls=0,
        missing=0,
        loss=0.0,
    )


def round_reply(request: RoundRequest, lower: FloatArray) -> RoundReply:
    """The same for a communication round."""
    return RoundReply(request.worker, request.version, request.number, lower, 0)


class NothingToScore:
    """Evaluator of problems whose batches are empty."""

    async def evaluate(self, request: Evaluate) -> Scored:
        return Scored(request.worker, request.task, tuple(() for _ in request.candidates), 0)


@dataclass
class TableEvaluator:
    """Scores candidates by a function, without a program or an LM.

    Attributes:
        score: ``(worker, candidate, example, held_out) -> score``; ``None`` is a missing rollout.
        cross_entropies: Report ``1 - score`` as the cross-entropy of the right answer and ``score - 0.5`` as its margin,
            too.
        cached: Rollouts cost nothing.
        calls: Rollouts asked for so far.
        requests: Every request, in the order of arrival.
    """

    score: Score
    cross_entropies: bool = False
    cached: bool = False
    calls: int = 0
    requests: list[Evaluate] = field(default_factory=list)

    async def evaluate(self, request: Evaluate) -> Scored:
        self.requests.append(request)
        return score_table(request, self)


def score_table(request: Evaluate, table: TableEvaluator) -> Scored:
    """What ``table`` says of ``request``; missing rollouts cost nothing."""
    rows = []
    for candidate, examples in zip(request.candidates, request.examples, strict=True):
        values = [table.score(request.worker, candidate, one, request.held_out) for one in examples]
        table.calls += len(values)
        rows.append(tuple(_outcome(value, table.cross_entropies) for value in values))
    calls = sum(outcome.score is not None for row in rows for outcome in row)
    return Scored(request.worker, request.task, tuple(rows), 0 if table.cached else calls)


def _outcome(score: float | None, has_distribution: bool) -> Outcome:
    if score is None or not has_distribution:
        return Outcome(score)
    return Outcome(score, 1.0 - score, score - 0.5)


def small_space(workers: int = 3, *, private: Sequence[int] = ()) -> Space:
    """One predictor: four instructions, and two demo slots in which each worker has two demos of its own.

    Args:
        private: Numbers of workers whose demos may not leave them.
    """
    demos = [
        Arm(f"d:w{worker}:{number}", home=f"w{worker}", shared=worker not in private)
        for worker in range(workers)
        for number in range(2)
    ]
    instructions = (Arm(""), *(Arm(f"i:{number}") for number in range(1, 4)))
    slots = [Block(f"toy/demos/{slot}", "toy", "demo", (Arm(""), *demos)) for slot in range(2)]
    return Space((Block("toy/instructions", "toy", "instructions", instructions), *slots))


def usable_arms(block: Block, worker: str) -> tuple[int, ...]:
    """Arm 0, the worker's own arms and those that others share."""
    return tuple(number for number, arm in enumerate(block.arms) if arm.shared or arm.home == worker)


def small_machines(
    config: AlgorithmConfig,
    *,
    workers: int = 3,
    calls: int | None = 240,
    examples: int = 12,
    held_out: int = 8,
    seed: int = 0,
    space: Space | None = None,
    use_distributions: bool = False,
) -> tuple[ServerState, list[WorkerState]]:
    """Shipped machines on a small scripted problem, with the policy that ``config`` names."""
    space = small_space(workers) if space is None else space
    names = [f"w{number}" for number in range(workers)]
    spaces = [WorkerSpace(space, tuple(usable_arms(block, name) for block in space.upper)) for name in names]
    server = ServerState(
        space,
        [Member(name, one.allowed, held_out) for name, one in zip(names, spaces, strict=True)],
        config,
        calls,
    )
    machines = [
        WorkerState(
            name, number, one, config, examples=examples, seed=seed, use_distributions=use_distributions
        )
        for number, (name, one) in enumerate(zip(names, spaces, strict=True))
    ]
    return server, machines


def additive_score(worker: str, candidate: tuple[int, ...], example: int, held_out: bool) -> float:
    """1 or 0 by a fixed toss per example whose odds the arms move: instruction 2 and demos 1 and 4 help, 3 harms."""
    worth = (0.0, 0.0, 0.2, -0.2)[candidate[0]]
    worth += 0.1 * len({arm for arm in candidate[1:] if arm in (1, 4)}) - 0.1 * candidate[1:].count(3)
    toss = zlib.crc32(f"{worker}/{example}/{held_out}".encode()) % 1000 / 1000
    return float(toss < 0.4 + worth)
