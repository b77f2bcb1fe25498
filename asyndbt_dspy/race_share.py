"""What is kept of the caps on LM calls, tokens and dollars for the final race, and how many rollouts the race can pay for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.engines.protocols import Engine
from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.metering import PROPOSER, WIRE_CAPS, Metering
from asyndbt_dspy.programs.evaluator import WorkerUse

_FITTED_AFTER = 0.5
"""Of the search's share: by then it is known what a rollout takes."""
_MARGIN = 1.25
"""The race's candidates show more demos than many of the search's do."""


class RaceShare:
    """Fits what is kept for the race to what the race can use, ends the search at the rest, and opens it in the race.

    A cap on metric calls is counted by the server, which keeps what its held-out examples can use. Of the other caps the
    same share is kept at first; what these come to in rollouts only the run itself shows.

    Args:
        uses: What the workers did so far, by name.
    """

    def __init__(self, metering: Metering, server: ServerState, uses: Mapping[str, WorkerUse]) -> None:
        self._metering = metering
        self._server = server
        self._uses = uses
        self._is_fitted = not metering.has_wire_caps
        self._is_over = False

    def observe(self, _: Any) -> None:
        """Something happened."""
        if self._server.phase == "race":
            self._metering.open_kept_back()
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
        cap = error.cap.replace("_", " ") or "budget"
        left = self._payable(is_whole=False)
        calls = None if left is None else int(left)
        engine.stop_search(f"the search's share of the cap on {cap} is spent", race=True, calls=calls)

    @property
    def _kept_back(self) -> float:
        return self._metering.ledger.kept_back

    def _payable(self, *, is_whole: bool) -> float | None:
        """Rollouts that every cap on the wire pays for, or what is left of it; ``None`` where nothing tells.

        What a rollout takes: LM calls and tokens as the LMs reported them for those that are over, and for every one of these
        as much more as retries, hedges and calls that were cut came to; a token costs what tokens cost so far.
        """
        uses, lines = self._uses.values(), self._metering.ledger.lines()
        rollouts, calls = sum(use.calls for use in uses), sum(use.lm_calls for use in uses)
        tokens = sum(use.prompt_tokens + use.completion_tokens for use in uses)
        workers = [line for name, line in lines.items() if name != PROPOSER]
        attempts = sum(line.attempts - line.in_flight for line in workers)
        answers = sum(line.answers for line in workers)
        if not (self._metering.has_wire_caps and rollouts and calls and answers):
            return None
        answered = sum(line.prompt_tokens + line.completion_tokens for line in workers)
        charged = sum(line.tokens for line in workers)
        dollars = sum(float(line.total_dollars) for line in workers)
        per_rollout = {"lm_calls": calls / rollouts * attempts / answers}
        if tokens and answered:
            per_rollout["tokens"] = tokens / rollouts * charged / answered
            per_rollout["dollars"] = per_rollout["tokens"] * dollars / charged
        spent, budget = self._metering.ledger.spent, self._metering.budget
        under_way = sum(line.in_flight for line in lines.values()) / attempts
        gone = {
            "lm_calls": spent.lm_calls,
            "tokens": spent.tokens + under_way * charged,
            "dollars": float(spent.dollars) + under_way * dollars,
        }
        found = [
            (cap - (0.0 if is_whole else gone[name])) / per_rollout[name]
            for name in WIRE_CAPS
            if (cap := getattr(budget, name)) is not None and per_rollout.get(name)
        ]
        return max(0.0, min(found)) if found else None
