"""The shipped machines on a made-up problem: workers whose policy costs next to nothing, so that thousands can run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.effects import EffectKeys
from asyndbt_dspy.core.lower_level import Surrogate
from asyndbt_dspy.core.messages import Evaluate, Outcome, Scored
from asyndbt_dspy.core.policies import Batch, Estimate, Nomination, WorkerSpace
from asyndbt_dspy.core.server import Member, ServerState
from asyndbt_dspy.core.simplex import FloatArray
from asyndbt_dspy.core.space import Arm, Block, Candidate, Space
from asyndbt_dspy.core.worker import WorkerState

_NONE: frozenset[int] = frozenset()


def made_up_space(instructions: int = 6, demos: int = 24, slots: int = 4) -> Space:
    """One predictor with an instruction block and demo slots over one shared pool."""
    texts = (Arm(""), *(Arm(f"i:{number}") for number in range(1, instructions)))
    pool = (Arm(""), *(Arm(f"d:{number}") for number in range(demos)))
    demo_slots = [Block(f"plan/demos/{slot}", "plan", "demo", pool) for slot in range(slots)]
    return Space((Block("plan/instructions", "plan", "instructions", texts), *demo_slots))


class LightPolicy:
    """Draws at random and learns nothing, with messages of the size that the default policy sends."""

    def __init__(self, spaces: WorkerSpace, config: AlgorithmConfig, examples: int) -> None:
        self.spaces = spaces
        self.config = config
        self.examples = examples
        keys = EffectKeys.of(spaces.space, config.share_credit)
        self._known: FloatArray = np.zeros((2, len(keys.shared) if config.share_effects else 0))
        self._last: Candidate = spaces.space.student

    def draw(self, p: FloatArray, q: FloatArray, rng: np.random.Generator, minibatch: int) -> Batch:
        config, space = self.config, self.spaces.space
        sizes = [len(block.arms) for block in space.lower] + [len(arms) for arms in self.spaces.allowed]
        picks = (rng.random((config.draws, len(sizes))) * sizes).astype(np.int64).tolist()
        width = len(space.lower)
        candidates = tuple(self.spaces.candidate(row[:width], row[width:]) for row in picks)
        size = min(minibatch, self.examples)
        first = int(rng.integers(self.examples))
        row = tuple((first + step) % self.examples for step in range(size))
        none = np.zeros((0, 0), dtype=np.int64)
        self._last = candidates[0]
        return Batch(candidates, (row,) * config.draws, none, none, _NONE, _NONE)

    def update(self, p: FloatArray, q: FloatArray, batch: Batch, losses: Sequence[FloatArray]) -> Estimate:
        lower = np.zeros_like(p)
        for candidate, row in zip(batch.candidates, losses, strict=True):
            lower[candidate[0]] += float(np.nanmean(row)) - 0.5 if len(row) else 0.0
        self._known = self._known + (self._known.shape[1] > 0)
        return Estimate(lower, np.zeros_like(q), Surrogate(lower, p))

    def share(self) -> FloatArray:
        return self._known

    def merge(self, outside: FloatArray) -> None:
        """It learns nothing from others."""

    def nominate(self, p: FloatArray, q: FloatArray) -> tuple[Nomination, ...]:
        return (Nomination(self._last, 0.0, 0.1, 1),)


class CoinEvaluator:
    """Scores by a fixed toss per candidate and example: no program, no LM."""

    async def evaluate(self, request: Evaluate) -> Scored:
        rows = tuple(
            tuple(Outcome(float((hash(candidate) ^ number * 2654435761) % 7 > 2)) for number in examples)
            for candidate, examples in zip(request.candidates, request.examples, strict=True)
        )
        return Scored(request.worker, request.task, rows, sum(map(len, rows)))


def light_workers(
    workers: int,
    config: AlgorithmConfig,
    *,
    held_out: int,
    examples: int = 30,
    seed: int = 0,
    is_shared: bool = False,
) -> tuple[Space, list[Member], list[WorkerState]]:
    """``workers`` shipped workers ``w0``, ``w1``, … with light policies, and what a server has to know of them.

    Args:
        held_out, examples: Per worker.
        is_shared: They hold each other's race examples and have one LM.
    """
    group, lm = ("all", "lm") if is_shared else ("", "")
    space = made_up_space()
    spaces = WorkerSpace(space, tuple(tuple(range(len(block.arms))) for block in space.upper))
    members = [
        Member(f"w{number}", spaces.allowed, held_out, group=group, lm=lm) for number in range(workers)
    ]
    machines = [
        WorkerState(
            member.name,
            number,
            spaces,
            config,
            examples=examples,
            seed=seed,
            policy=LightPolicy(spaces, config, examples),
        )
        for number, member in enumerate(members)
    ]
    return space, members, machines


def light_machines(
    workers: int,
    config: AlgorithmConfig,
    *,
    calls: int | None,
    server_type: type[ServerState] = ServerState,
    **changes: Any,
) -> tuple[ServerState, list[WorkerState]]:
    """The shipped server and the workers of ``light_workers``, whose arguments ``changes`` are; ``calls`` is the budget."""
    space, members, machines = light_workers(workers, config, **changes)
    return server_type(space, members, config, calls), machines
