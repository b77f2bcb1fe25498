"""The cap on metric calls of a run that goes on, over all its processes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.programs.paid_rollouts import RolloutGate

logger = logging.getLogger(__name__)


class Paid(Protocol):
    """What all processes of a run paid for.

    Attributes:
        paid: Completed rollouts so far.
        raised_at: As many when the budget was last raised; ``None``: it never was.
        unasked: Rollouts of earlier processes that were not asked for again.
    """

    paid: int

    @property
    def raised_at(self) -> int | None: ...
    @property
    def unasked(self) -> int: ...


def hold_cap(
    cap: int,
    book: Paid,
    server: ServerState,
    gate: RolloutGate,
    on_refused: Callable[[BudgetExceededError], None],
) -> None:
    """From now on ``gate`` turns away what would pass ``cap`` together with all that was ever paid for.

    The server counts what the run asks for. Where a run goes another way than before, because its budget was raised, it
    does not ask again for all that was paid for (the race of the smaller budget, say), and would pass the cap by as much.

    Args:
        on_refused: Told of each rollout that is turned away.
    """
    of_search = cap if book.raised_at is None else book.raised_at + _for_search(cap, book.raised_at, server)
    is_told = False

    def admits() -> bool:
        nonlocal is_told
        is_search = server.phase in ("search", "rounds")
        limit = of_search if is_search else cap
        if book.paid + gate.in_flight < limit:
            return True
        if not (is_search or is_told):
            is_told = True
            logger.warning(
                "The race ends at the cap of %d metric calls: %d that earlier processes paid for were not asked for again, "
                "and count. With a higher metric_calls= the run goes on from here, and is surer.",
                cap,
                book.unasked,
            )
        on_refused(BudgetExceededError(f"{limit} metric calls are paid for", cap="metric_calls"))
        return False

    gate.admits = admits


def _for_search(cap: int, before: int, server: ServerState) -> int:
    """What the search may have of the rollouts that a raise left: its share of them.

    Where the last steps of a search are short, those that are recorded are not repeated as long ones, and the race is of
    other finalists than before: it is kept no fewer rollouts than it had then.
    """
    kept_back = server.config.race_fraction if server.config.race else 0.0
    left = max(0, cap - before)
    of_race = kept_back * (max(before, left) if server.paces.tapers else left)
    return max(0, int(left - of_race))
