"""The demos of a compile: labelled examples, and traces of the student or a teacher, as far as the budget has room for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import dspy

from asyndbt_dspy import preparation
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.programs.slots import DemoItem
from asyndbt_dspy.setup_rollouts import SetupRollouts
from asyndbt_dspy.sharding import Shard

if TYPE_CHECKING:
    from asyndbt_dspy.optimizer import AsynDBT

MOST_OF_SEARCH = 0.5
"""Part of the search's share of every cap after which no further trace begins, whatever they were expected to take: a
teacher may cost many times what the student does."""
_FRACTION = 0.12
_CALLS = 1_000
"""What ``_FRACTION`` is taken of at most where metric calls are not bounded."""


async def make_demos(
    optimizer: AsynDBT,
    student: dspy.Module,
    teacher: dspy.Module | None,
    shards: Sequence[Shard],
    setup: SetupRollouts,
    affordable: float,
    may_begin: Callable[[], bool],
) -> tuple[list[DemoItem], list[tuple[str, dspy.Example, Rollout]]]:
    """Demo arms, and the runs (worker, example, rollout) that traces were taken from.

    Args:
        affordable: Rollouts that the budget pays for, by what the first ones took; 0: that is not known.
        may_begin: Asked before each trace.
    """
    options, plain = optimizer.options, setup.evaluator.programs
    found = [] if options.mode == "instructions" else preparation.labelled_items(student, shards, options)
    rollouts: list[tuple[str, dspy.Example, Rollout]] = []
    wanted = preparation.wants_bootstrap(student, teacher, options, found)
    if wanted or preparation.asks_proposer(student, options):
        spend = setup.count("traces", _traces(optimizer.budget.metric_calls, affordable, setup.calls))
        program = teacher or plain.build(plain.space.student)
        threshold = max(0.5, optimizer.failure_score)
        traced, rollouts = await preparation.bootstrap_items(
            setup, program, student, shards, options, spend, threshold, may_begin
        )
        found = [*traced, *found] if wanted else found
    return preparation.choose_demos(found, options, optimizer.seed), rollouts


def _traces(metric_calls: int | None, affordable: float, made: int) -> int:
    """How many traces to take: a part of the rollouts that every cap pays for, and no more than are left."""
    calls = _CALLS if metric_calls is None else metric_calls
    if affordable:
        calls = min(calls, int(affordable))
    return max(0, min(int(calls * _FRACTION), calls - made))
