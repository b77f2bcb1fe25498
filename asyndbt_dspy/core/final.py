"""Between search and race: what is kept back for it, what was learned, who runs how fast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.handover import Handover
from asyndbt_dspy.core.racing import RaceState
from asyndbt_dspy.core.roster import Member
from asyndbt_dspy.core.space import Candidate

if TYPE_CHECKING:
    from asyndbt_dspy.core.server import ServerState


def kept_back(config: AlgorithmConfig, members: Sequence[Member], calls: int | None) -> int:
    """Rollouts of the budget that belong to the race."""
    if not config.race:
        return 0
    if config.repeats and calls is not None:
        return int(calls * config.race_fraction)
    whole = (config.race_candidates + 1) * sum(member.held_out for member in members)
    return whole if calls is None else min(whole, int(calls * config.race_fraction))


def learned(server: ServerState) -> tuple[Any, ...]:
    """What decoding needs, of live workers in their order (arguments of ``decoding.decode`` and ``finalists``)."""
    alive = server.roster.living
    nominated = [server.nominations[number] for number in alive if number in server.nominations]
    allowed = tuple(server.members[number].allowed for number in alive)
    factors = server.effects.factors[np.array(alive, dtype=np.int64)]
    consensus = server.layout.argmax(server.arms.read(server.z))
    return server.space, server.config, server.keys, consensus, nominated, factors, allowed


def open_race(server: ServerState, challengers: Sequence[Candidate]) -> RaceState:
    """The race of live workers, each with its observed speed, over their examples and those of lost ones that they hold."""
    server.paces.refresh()
    living = {server.members[number].name: number for number in server.roster.living}
    handover = Handover(server.members)
    # What a search that ended early did not spend goes to the race.
    calls = server.race_calls + max(0, server.calls_left or 0)
    if server.race_most is not None:
        calls = min(calls, server.race_most)
    return RaceState(
        server.space.student,
        challengers,
        {one.name: one.held_out for one in server.members if handover.has_heir(one.name, living)},
        calls,
        server.config,
        speeds={name: server.paces.speed(number) for name, number in living.items()},
        living=living,
        handover=handover,
    )
