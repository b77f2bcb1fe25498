"""The account of one run, shared by all of its workers, threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from asyndbt_dspy.core.budget import Budget, BudgetLedger, Charge, Spent
from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.lms.endpoints import Endpoints, blocks_a_loop
from asyndbt_dspy.lms.failures import Fate

_CLOSE_WAIT_S = 1.0
"""So long a ledger that is closed waits for attempts in threads, which nobody can cancel."""


@dataclass(frozen=True)
class LedgerLine:
    """What one worker had sent, and what it got for it.

    ``attempts = answers + refused + cut + those in flight``.

    Attributes:
        worker: Its name; empty for calls that belong to no worker.
        attempts: On the wire, retries and hedges included.
        answers: Attempts that brought an answer.
        refused: Attempts that the endpoint answered with an error; they cost no tokens.
        cut: Attempts that were cut or cancelled; the reservation was charged.
        prompt_tokens, completion_tokens: Of answers, as the provider measured them; of ``unmeasured`` ones, as they were
            estimated.
        cut_tokens: Charged for cut attempts; at least what the provider bills for them.
        dollars, cut_dollars: Likewise; 0 where the price is unknown (then ``unpriced`` counts).
        unpriced: Answers and cut attempts whose price is unknown.
        unmeasured: Answers without a report of their tokens. Under a cap on tokens or dollars the reservation is charged for
            them, the most that they can have taken; else a guess by their length.
        cache_hits: Calls answered from DSPy's cache: no attempt, no cost.
        waited_s: Seconds that attempts were held back by rate limits, summed.
    """

    worker: str
    attempts: int = 0
    answers: int = 0
    refused: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut_tokens: int = 0
    dollars: Decimal = Decimal(0)
    cut_dollars: Decimal = Decimal(0)
    unpriced: int = 0
    unmeasured: int = 0
    cache_hits: int = 0
    waited_s: float = 0.0

    @property
    def in_flight(self) -> int:
        """Attempts that have neither been answered nor given up."""
        return self.attempts - self.answers - self.refused - self.cut

    @property
    def tokens(self) -> int:
        """All that was charged."""
        return self.prompt_tokens + self.completion_tokens + self.cut_tokens

    @property
    def total_dollars(self) -> Decimal:
        """All that was charged; a lower bound where ``unpriced`` is above 0."""
        return self.dollars + self.cut_dollars

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; money as exact text."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {"dollars": str(self.dollars), "cut_dollars": str(self.cut_dollars)}


@dataclass(frozen=True)
class Attempt:
    """One attempt that is over, as observers of a ledger see it.

    Attributes:
        fate: ``None`` for an answer.
        charge: What was charged for it.
        number: Of its reservation.
        is_priced: Whether ``charge.dollars`` is known.
        is_measured: Whether ``charge`` is what the provider reported; else it is an estimate.
        waited_s: Seconds that rate limits held it back.
    """

    worker: str
    model: str
    fate: Fate | None
    charge: Charge
    is_priced: bool = True
    is_measured: bool = True
    waited_s: float = 0.0
    number: int = 0


@dataclass(frozen=True)
class Reservation:
    """Held for one attempt of one worker."""

    number: int
    worker: str
    worst: Charge


@dataclass
class Ledger:
    """Caps, lines and endpoints of one run. Safe to use from every thread and event loop.

    Attributes:
        budget: The caps; ``None``: count only.
        kept_back: Share of each cap in [0, 1) that stays for the final race; see ``keep_back``.
        on_attempt: Called after each attempt, in whatever thread it ran (the journal listens here).
        on_reserve: Called with each reservation before its attempt may go out: what a process leaves unsettled when it
            dies is charged in full by the next one.
        on_withdraw: Called with each reservation whose attempt never was on the wire.
        endpoints: Rate limits of the run's endpoints.
    """

    budget: Budget | None = None
    kept_back: float = 0.0
    on_attempt: Callable[[Attempt], None] | None = None
    on_reserve: Callable[[Reservation], None] | None = None
    on_withdraw: Callable[[Reservation], None] | None = None
    endpoints: Endpoints = field(default_factory=Endpoints)

    def __post_init__(self) -> None:
        self._account = BudgetLedger(self.budget, kept_back=self.kept_back)
        self._lock = threading.Lock()
        self._lines: dict[str, LedgerLine] = {}
        self._waiting: list[Callable[[], None]] = []
        self._is_closed = False

    # -- reading

    def line(self, worker: str) -> LedgerLine:
        """The line of one worker, as it is now; an empty one where it has sent nothing."""
        with self._lock:
            return self._lines.get(worker, LedgerLine(worker))

    def lines(self) -> dict[str, LedgerLine]:
        """All lines by worker, as they are now."""
        with self._lock:
            return dict(self._lines)

    @property
    def spent(self) -> Spent:
        with self._lock:
            return self._account.spent

    def exhausted(self, *, elapsed_s: float = 0.0, metric_calls: int = 0) -> str | None:
        """See ``BudgetLedger.exhausted``."""
        with self._lock:
            return self._account.exhausted(elapsed_s=elapsed_s, metric_calls=metric_calls)

    def needs_bounds(self) -> bool:
        """Whether a cap on tokens or dollars makes every call's worst case matter."""
        return self.budget is not None and (self.budget.tokens is not None or self.budget.dollars is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: totals for ``restore``, and the lines."""
        with self._lock:
            return {
                "totals": self._account.to_dict(),
                "lines": {name: line.to_dict() for name, line in sorted(self._lines.items())},
            }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from ``to_dict`` of an earlier process; before the first call.

        Raises:
            ProtocolError: a call was made already.
        """
        with self._lock:
            self._account.restore(saved["totals"])
            for name, line in saved["lines"].items():
                money = {key: Decimal(line[key]) for key in ("dollars", "cut_dollars")}
                self._lines[name] = LedgerLine(**{**line, **money})

    # -- the life of an attempt

    def reserve(self, worker: str, worst: Charge, wake: Callable[[], None]) -> Reservation | None:
        """Hold the worst case, or return ``None`` and call ``wake`` once when it is worth asking again.

        Raises:
            BudgetExceededError: the call would pass a cap, or the ledger was closed.
        """
        with self._lock:
            if self._is_closed:
                raise BudgetExceededError("the run is over: what goes on in a thread makes no call any more")
            number = self._account.reserve(worst)
            if number is None:
                self._waiting.append(wake)
                return None
            self._add(worker, attempts=1)
            held = Reservation(number, worker, worst)
        if self.on_reserve is not None:
            self.on_reserve(held)
        return held

    async def areserve(self, worker: str, worst: Charge) -> Reservation:
        """Hold the worst case, waiting for calls in flight where only they stand in the way."""
        loop = asyncio.get_running_loop()
        while True:
            woken = asyncio.Event()
            reservation = self.reserve(worker, worst, lambda woken=woken: _set_from_afar(loop, woken))  # type: ignore[misc]
            if reservation is not None:
                return reservation
            await woken.wait()

    def reserve_blocking(self, worker: str, worst: Charge) -> Reservation:
        """``areserve`` for threads.

        Raises:
            BudgetExceededError: also where this is an event loop's own thread and only calls in flight stand in the way:
                those of that loop would never end.
        """
        while True:
            woken = threading.Event()
            reservation = self.reserve(worker, worst, woken.set)
            if reservation is not None:
                return reservation
            if blocks_a_loop():
                raise BudgetExceededError(
                    "an LM call on the event loop's own thread would have to wait for calls in flight to leave it a share "
                    "of the budget; make the metric or program async, or raise the budget"
                )
            woken.wait()

    def withdraw(self, held: Reservation) -> None:
        """The attempt never was on the wire."""
        with self._lock:
            self._account.withdraw(held.number)
            self._add(held.worker, attempts=-1)
        self._wake()
        if self.on_withdraw is not None:
            self.on_withdraw(held)

    def settle(
        self,
        held: Reservation,
        model: str,
        fate: Fate | None,
        actual: Charge | None = None,
        *,
        is_priced: bool = True,
        is_measured: bool = True,
        waited_s: float = 0.0,
    ) -> None:
        """The attempt is over.

        Args:
            fate: ``None``: it brought an answer.
            actual: What the answer cost; ``None``: not reported, the reservation is charged.
            is_priced: Whether its price is known.
            is_measured: Whether ``actual`` is what the provider reported.
        """
        if fate is Fate.UNSENT:
            self.withdraw(held)
            return
        is_measured = fate is not None or (is_measured and actual is not None)
        with self._lock:
            charged = self._settle(held, fate, actual)
            self._add(
                held.worker,
                unpriced=fate is not Fate.REFUSED and not is_priced,
                unmeasured=not is_measured,
                waited_s=waited_s,
            )
        self._wake()
        if self.on_attempt is not None:
            self.on_attempt(
                Attempt(held.worker, model, fate, charged, is_priced, is_measured, waited_s, held.number)
            )

    def _settle(self, held: Reservation, fate: Fate | None, actual: Charge | None) -> Charge:
        if fate is Fate.REFUSED:
            self._account.refuse(held.number)
            self._add(held.worker, refused=1)
            return Charge()
        if fate is Fate.CUT:
            charged = self._account.charge(held.number)
            self._add(held.worker, cut=1, cut_tokens=charged.tokens, cut_dollars=charged.dollars)
            return charged
        if actual is None:
            actual = self._account.charge(held.number)
        else:
            self._account.settle(held.number, actual)
        self._add(
            held.worker,
            answers=1,
            prompt_tokens=actual.prompt_tokens,
            completion_tokens=actual.completion_tokens,
            dollars=actual.dollars,
        )
        return actual

    def count_cache_hit(self, worker: str) -> None:
        with self._lock:
            self._add(worker, cache_hits=1)

    def keep_back(self, share: float) -> None:
        """See ``BudgetLedger.keep_back``; the final race begins with 0."""
        with self._lock:
            self._account.keep_back(share)
        self._wake()

    async def aclose(self) -> None:
        """Let no attempt go out any more, wait a second at most for those under way, and end the threads of the rate limits."""
        with self._lock:
            self._is_closed = True
        self._wake()
        loop = asyncio.get_running_loop()
        until = loop.time() + _CLOSE_WAIT_S
        try:
            while loop.time() < until:
                woken = asyncio.Event()
                with self._lock:
                    self._waiting.append(lambda woken=woken: _set_from_afar(loop, woken))  # type: ignore[misc]
                if not any(line.in_flight for line in self.lines().values()):
                    break
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(woken.wait(), until - loop.time())
        finally:
            self.endpoints.close()

    def _add(self, worker: str, **more: Any) -> None:
        line = self._lines.get(worker, LedgerLine(worker))
        self._lines[worker] = replace(
            line, **{name: getattr(line, name) + amount for name, amount in more.items()}
        )

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()


def _set_from_afar(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)
