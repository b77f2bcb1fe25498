"""What is kept of the caps on LM calls, tokens, dollars and seconds for the final race, and how many rollouts that comes to."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import Any

from asyndbt_dspy.core.messages import StopSearch
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.engines.protocols import Engine
from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.metering import PROPOSER, WIRE_CAPS, Metering
from asyndbt_dspy.programs.evaluator import WorkerUse
from asyndbt_dspy.programs.paid_rollouts import RolloutGate
from asyndbt_dspy.stopping import LONGEST_TIMER_S

logger = logging.getLogger(__name__)

_TIMED_CAPS = ("tokens", "dollars")
"""What calls under way may cost is reserved, so timing decides when such a cap refuses one."""
_FITTED_AFTER = 0.5
"""Of the search's share: by then it is known what a rollout takes."""
_MARGIN = 1.25
"""The race's candidates show more demos than many of the search's do."""
_SHORTEST_RACE = 12
"""Rollouts that a race is let try whatever the clock says: of two candidates on six examples."""


class RaceShare:
    """Fits what is kept for the race to what the race can use, ends the search at the rest, and opens it in the race.

    A cap on metric calls is counted by the server, which keeps what its held-out examples can use. Of the other caps the
    same share is kept at first; what these come to in rollouts only the run itself shows. Made in the compile's event loop
    when the search begins.

    Args:
        uses: What the workers did so far, by name.
        gate: That their rollouts pass. In the race those of the search that have not begun are not made any more: its steps
            count for their cost alone by then. Of a repeatable run they are, unless timing has its say anyway.
        is_repeatable: Whether the run is meant to be; it is told where that does not hold.
    """

    def __init__(
        self,
        metering: Metering,
        server: ServerState,
        uses: Mapping[str, WorkerUse],
        gate: RolloutGate,
        is_repeatable: bool = False,
    ) -> None:
        self._metering = metering
        self._server = server
        self._uses = uses
        self._gate = gate
        self._is_repeatable = is_repeatable
        self._is_timed = not is_repeatable
        self._is_fitted = not metering.has_wire_caps
        self._is_over = False
        self._loop = asyncio.get_running_loop()
        self._began_s, self._before = self._loop.time(), self._rollouts

    def observe(self, _: Any) -> None:
        """Something happened."""
        if self._server.phase == "race":
            self._metering.open_kept_back()
            if self._is_timed:
                self._gate.end_search()
        elif not self._is_fitted and self._metering.has_spent(_FITTED_AFTER * (1 - self._kept_back)):
            whole = self._payable(is_whole=True)
            if whole:
                self._is_fitted = True
                self._metering.ledger.keep_back(_MARGIN * self._server.race_calls / whole)

    def end_search(self, engine: Engine, error: BudgetExceededError) -> None:
        """A call was refused: on to the race with what was kept for it.

        In the race nothing need be done: what is refused there is missing at no cost, and it ends with what is known.
        """
        if self._is_over or self._server.phase not in ("search", "rounds"):
            return
        self._is_over = True
        if error.cap in _TIMED_CAPS:
            self._tell(f"cap on {error.cap}")
        cap = error.cap.replace("_", " ") or "budget"
        left = self._payable(is_whole=False)
        calls = None if left is None else int(left)
        engine.stop_search(
            StopSearch(f"the search's share of the cap on {cap} is spent", calls=calls, is_dry=True)
        )

    def end_search_in(self, engine: Engine, delay_s: float, left_s: float) -> asyncio.TimerHandle:
        """After ``delay_s`` the race begins, for which ``left_s`` are kept; the handle takes it back."""

        def over() -> None:
            if self._server.phase in ("search", "rounds"):
                self._tell("time budget")
                calls, is_early = self._in_time(left_s), not self._server.finalists()
                self._gate.end_search()
                # Where nothing is known to race yet, steps under way say first what they have.
                engine.stop_search(StopSearch("the time budget is spent", calls=calls, is_dry=is_early))

        return self._loop.call_later(min(max(0.0, delay_s), LONGEST_TIMER_S), over)

    def _tell(self, what: str) -> None:
        self._is_timed = True
        if self._is_repeatable:
            logger.warning(
                "The %s ended the search of a run with deterministic=True. Where that happens depends on timing, so "
                "another run may come to another program; only metric_calls and lm_calls end one repeatably",
                what,
            )

    @property
    def _rollouts(self) -> int:
        return sum(use.calls for use in self._uses.values())

    def _in_time(self, left_s: float) -> int | None:
        """Rollouts that ``left_s`` are enough for at the search's pace; ``None`` where it has none yet.

        Workers end first what they have begun, which is half done: rollouts, or whole steps where they are elsewhere.
        """
        done, elapsed_s = self._rollouts - self._before, self._loop.time() - self._began_s
        if not done or elapsed_s <= 0:
            return None
        steps = sum(self._server.step_calls(number) for number in self._server.roster.outstanding)
        begun = (self._gate.working if self._gate.in_flight else steps) / 2
        return max(_SHORTEST_RACE, math.floor(left_s * done / elapsed_s - begun))

    @property
    def _kept_back(self) -> float:
        return self._metering.ledger.kept_back

    def _payable(self, *, is_whole: bool) -> float | None:
        """Rollouts that every cap on the wire pays for, or what is left of it; ``None`` where nothing tells.

        What a rollout takes: LM calls and tokens as the LMs reported them for those that are over, and for every one of these
        as much more as retries, hedges and calls that were cut came to; a token costs what tokens cost so far. Where
        no tokens are reported, those that were charged say it, of unfinished rollouts too.
        """
        uses, lines = self._uses.values(), self._metering.ledger.lines()
        rollouts, calls = self._rollouts, sum(use.lm_calls for use in uses)
        tokens = sum(use.prompt_tokens + use.completion_tokens for use in uses)
        workers = [line for name, line in lines.items() if name != PROPOSER]
        attempts = sum(line.attempts - line.in_flight for line in workers)
        answers = sum(line.answers for line in workers)
        if not (self._metering.has_wire_caps and rollouts and attempts):
            return None
        answered = sum(line.prompt_tokens + line.completion_tokens for line in workers)
        charged = sum(line.tokens for line in workers)
        dollars = sum(float(line.total_dollars) for line in workers)
        sent = calls * attempts / answers if calls and answers else attempts
        used = tokens * charged / answered if tokens and answered else charged
        paid = used * dollars / charged if charged else dollars
        taken = {"lm_calls": sent / rollouts, "tokens": used / rollouts, "dollars": paid / rollouts}
        spent, budget = self._metering.ledger.spent, self._metering.budget
        under_way = sum(line.in_flight for line in lines.values()) / attempts
        gone = {
            "lm_calls": spent.lm_calls,
            "tokens": spent.tokens + under_way * charged,
            "dollars": float(spent.dollars) + under_way * dollars,
        }
        found = [
            (cap - (0.0 if is_whole else gone[name])) / taken[name]
            for name in WIRE_CAPS
            if (cap := getattr(budget, name)) is not None and taken[name]
        ]
        return max(0.0, min(found)) if found else None
