"""What a run may spend, and the account of what it has spent. Pure: no clock, no locks, no prices."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any

from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError, ProtocolError

_WHOLE = ("metric_calls", "lm_calls", "tokens")
_WIRE = ("lm_calls", "tokens", "dollars")
_NOTHING = Decimal(0)


@dataclass(frozen=True)
class Budget:
    """Hard caps of one run, any subset; ``None`` is no cap.

    Attributes:
        metric_calls: Completed rollouts (program and metric on one example), setup and final race included. >= 1.
        seconds: Wall-clock seconds, > 0, setup and final race included. The search ends when only the race's share of them
            is left; when all are over, no rollout begins any more, nothing waits for a rate limit, what is in flight
            ends (within about ten seconds if it takes far longer than usual), and the best program so far is returned.
        lm_calls: Attempts on the wire, retries and hedges included, > 0.
        tokens: Prompt and completion tokens together, > 0. Needs LMs with ``max_tokens``.
        dollars: US dollars, > 0. Needs LMs with ``max_tokens`` and a known price.

    Raises:
        ConfigurationError: a value that is no positive, finite number.
    """

    metric_calls: int | None = None
    seconds: float | None = None
    lm_calls: int | None = None
    tokens: int | None = None
    dollars: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            is_number = isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value <= 0:
                raise ConfigurationError(
                    f"Budget({field.name}={value!r}) must be a positive, finite number; leave it out for no cap"
                )
            if field.name in _WHOLE and value != int(value):
                raise ConfigurationError(f"Budget({field.name}={value!r}) must be a whole number")
            # 1e3 calls are counted down and sliced with; NumPy's numbers have no place in a journal.
            plain: float = int(value) if field.name in _WHOLE else value
            if type(plain) not in (int, float):
                plain = float(plain)
            object.__setattr__(self, field.name, plain)
        if all(getattr(self, field.name) is None for field in fields(self)):
            names = ", ".join(f"{field.name}=…" for field in fields(self))
            raise ConfigurationError(f"Budget() sets no cap at all; give at least one of {names}")


@dataclass(frozen=True)
class Charge:
    """Tokens and money of one attempt on the wire: what it may cost at most, or what it did cost.

    Attributes:
        prompt_tokens, completion_tokens: >= 0.
        dollars: >= 0 and exact, so that thousands of small sums do not drift.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: Decimal = _NOTHING

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Charge) -> Charge:
        return Charge(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.dollars + other.dollars,
        )


@dataclass(frozen=True)
class Spent:
    """What is gone for good, and what calls in flight may still take.

    Attributes:
        lm_calls: Attempts, those in flight included.
        tokens, dollars: Settled.
        reserved_tokens, reserved_dollars: Held for calls in flight.
        overruns: Attempts that were billed more than was reserved for them.
    """

    lm_calls: int = 0
    tokens: int = 0
    dollars: Decimal = _NOTHING
    reserved_tokens: int = 0
    reserved_dollars: Decimal = _NOTHING
    overruns: int = 0


class BudgetLedger:
    """The account of a run's attempts on the wire: reserve before, settle after.

    A reservation is in one of the states below; anything else is a ``ProtocolError``.

        reserve ──▶ held ──settle(actual)──▶ billed as measured
                     ├──── charge() ───────▶ billed in full: the attempt was cut, nobody knows what it cost
                     ├──── refuse() ───────▶ an attempt, but no tokens: the endpoint answered with an error
                     └──── withdraw() ─────▶ as if it had never been: the attempt never was on the wire

    Args:
        budget: The caps; ``None``: none, everything is only counted.
        kept_back: Share of each cap in [0, 1) that is refused until ``keep_back`` says less (for the final race).

    Raises:
        ConfigurationError: ``kept_back`` is not in [0, 1).
    """

    def __init__(self, budget: Budget | None = None, *, kept_back: float = 0.0) -> None:
        if not 0 <= kept_back < 1:
            raise ConfigurationError(f"kept_back={kept_back!r} must be in [0, 1)")
        self.budget = budget
        self.kept_back = kept_back
        self._held: dict[int, Charge] = {}
        self._next = 1
        self._lm_calls = 0
        self._settled = Charge()
        self._overruns = 0

    @property
    def spent(self) -> Spent:
        held = sum(self._held.values(), Charge())
        return Spent(
            self._lm_calls,
            self._settled.tokens,
            self._settled.dollars,
            held.tokens,
            held.dollars,
            self._overruns,
        )

    def cap(self, name: str) -> Decimal | None:
        """The cap ``lm_calls``, ``tokens`` or ``dollars`` that holds now, kept-back share taken off; ``None``: none."""
        whole = getattr(self.budget, name) if self.budget is not None else None
        if whole is None:
            return None
        return Decimal(str(whole)) * (1 - Decimal(str(self.kept_back)))

    def reserve(self, worst: Charge) -> int | None:
        """Hold the most that one attempt may cost.

        Returns:
            The reservation's number, or ``None`` where only calls in flight stand in the way: ask again when one of
            them has been settled.

        Raises:
            BudgetExceededError: the attempt would pass a cap whatever the calls in flight turn out to cost.
        """
        spent = self.spent
        # An attempt in flight is an attempt: only tokens and money may come back.
        asked = {
            "lm_calls": (Decimal(spent.lm_calls), _NOTHING, Decimal(1)),
            "tokens": (Decimal(spent.tokens), Decimal(spent.reserved_tokens), Decimal(worst.tokens)),
            "dollars": (spent.dollars, spent.reserved_dollars, worst.dollars),
        }
        must_wait = False
        for name, (gone, held, more) in asked.items():
            cap = self.cap(name)
            if cap is None or gone + held + more <= cap:
                continue
            if gone + more > cap:
                raise self._exceeded(name, gone, more, cap)
            must_wait = True
        if must_wait:
            return None
        number, self._next = self._next, self._next + 1
        self._held[number] = worst
        self._lm_calls += 1
        return number

    def settle(self, number: int, actual: Charge) -> None:
        """The attempt was answered, and cost this."""
        held = self._take(number)
        self._overruns += actual.tokens > held.tokens or actual.dollars > held.dollars
        self._settled += actual

    def charge(self, number: int) -> Charge:
        """The attempt was cut or cancelled: its reservation is spent. Returns it."""
        held = self._take(number)
        self._settled += held
        return held

    def refuse(self, number: int) -> None:
        """The endpoint answered with an error: an attempt, no tokens."""
        self._take(number)

    def withdraw(self, number: int) -> None:
        """The attempt never was on the wire."""
        self._take(number)
        self._lm_calls -= 1

    def keep_back(self, share: float) -> None:
        """From now on no more than ``share`` of every cap is kept back; 0: the whole of it may be spent."""
        self.kept_back = min(self.kept_back, share)

    def exhausted(self, *, elapsed_s: float = 0.0, metric_calls: int = 0) -> str | None:
        """The name of a cap that leaves nothing, not counting what calls in flight hold; ``None``: none does.

        Args:
            elapsed_s: Seconds since the run began.
            metric_calls: Completed rollouts.
        """
        if self.budget is None:
            return None
        spent = self.spent
        counted: Mapping[str, Decimal | float] = {
            "lm_calls": Decimal(spent.lm_calls),
            "tokens": Decimal(spent.tokens),
            "dollars": spent.dollars,
        }
        for name in _WIRE:
            cap = self.cap(name)
            if cap is not None and counted[name] >= cap:
                return name
        if self.budget.metric_calls is not None and metric_calls >= self.budget.metric_calls:
            return "metric_calls"
        if self.budget.seconds is not None and elapsed_s >= self.budget.seconds:
            return "seconds"
        return None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready totals; calls in flight count as cut, as they are when a process dies."""
        spent = self.spent
        dollars = spent.dollars + spent.reserved_dollars
        held = sum(self._held.values(), self._settled)
        return {
            "lm_calls": spent.lm_calls,
            "prompt_tokens": held.prompt_tokens,
            "completion_tokens": held.completion_tokens,
            "dollars": str(dollars),
            "overruns": spent.overruns,
        }

    def restore(self, totals: Mapping[str, Any]) -> None:
        """Begin with the totals of ``to_dict`` of an earlier process.

        Raises:
            ProtocolError: something was reserved already.
        """
        if self._next != 1:
            raise ProtocolError(
                "restore() after the first reservation; restore the ledger before the run begins"
            )
        self._lm_calls = int(totals["lm_calls"])
        self._settled = Charge(
            int(totals["prompt_tokens"]), int(totals["completion_tokens"]), Decimal(totals["dollars"])
        )
        self._overruns = int(totals["overruns"])

    def _take(self, number: int) -> Charge:
        held = self._held.pop(number, None)
        if held is None:
            raise ProtocolError(f"reservation {number} is not held: it was settled before, or never made")
        return held

    def _exceeded(self, name: str, gone: Decimal, more: Decimal, cap: Decimal) -> BudgetExceededError:
        kept = ""
        if self.kept_back:
            kept = f" ({self.kept_back:.0%} of the budget is kept back for the final race)"
        return BudgetExceededError(
            f"the next LM call may cost {_shown(name, more)}; {_shown(name, gone)} of {_shown(name, cap)} are "
            f"spent{kept}. The call was not made; raise Budget({name}=…) or lower max_tokens",
            cap=name,
        )


def _shown(name: str, amount: Decimal) -> str:
    if name == "dollars":
        return f"${amount:f}"
    return f"{int(amount):,} {'LM calls' if name == 'lm_calls' else name}"
