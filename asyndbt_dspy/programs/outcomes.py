"""What the algorithm sees of a rollout."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import fields

from asyndbt_dspy.core.messages import Evaluate, Outcome
from asyndbt_dspy.programs.rollout import Rollout

_SHARED_FIELDS = tuple(one.name for one in fields(Outcome) if one.name != "skipped")
"""They have the same names in both."""


def nowhere(request: Evaluate) -> tuple[tuple[Outcome, ...], ...]:
    """Rollouts that were cut short when their worker failed."""
    return tuple((Outcome(None),) * len(examples) for examples in request.examples)


async def shared(other: asyncio.Future[Outcome]) -> Outcome:
    """What somebody else's call comes to; missing if that is given up meanwhile."""
    try:
        return await asyncio.shield(other)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if not other.cancelled() or (sys.version_info >= (3, 11) and task is not None and task.cancelling()):
            raise
        return Outcome(None)


def as_outcome(rollout: Rollout) -> Outcome:
    return Outcome(**{name: getattr(rollout, name) for name in _SHARED_FIELDS})


def as_rollout(outcome: Outcome) -> Rollout:
    return Rollout(**{name: getattr(outcome, name) for name in _SHARED_FIELDS})
