"""LM attempts in a journal: what a process reserved and settled, and what the next one finds spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from asyndbt_dspy.core.budget import Charge
from asyndbt_dspy.lms.failures import Fate
from asyndbt_dspy.lms.ledger import Attempt, Ledger, LedgerLine, Reservation

Write = Callable[[str, Mapping[str, Any]], None]
"""``(worker, entry)``; the empty name is the server. Whose attempts share a journal with others', its entries name."""


def record_spending(ledger: Ledger, write: Write) -> None:
    """From now on, write every reservation before its attempt goes out, and every attempt once it is over."""

    def reserved(held: Reservation) -> None:
        entry = {"kind": "reserved", "number": held.number, "worst": _charge(held.worst)}
        write(held.worker, entry)

    def withdrawn(held: Reservation) -> None:
        write(held.worker, {"kind": "withdrawn", "number": held.number})

    def settled(attempt: Attempt) -> None:
        write(
            attempt.worker,
            {
                "kind": "attempt",
                "number": attempt.number,
                "model": attempt.model,
                "fate": None if attempt.fate is None else attempt.fate.value,
                "charge": _charge(attempt.charge),
                "priced": attempt.is_priced,
                "waited_s": round(attempt.waited_s, 6),
                **({} if attempt.is_measured else {"estimated": True}),
            },
        )

    ledger.on_reserve, ledger.on_withdraw, ledger.on_attempt = reserved, withdrawn, settled


class SpentSoFar:
    """Adds up the attempts of earlier processes; what they left in flight counts as cut, and is charged in full."""

    def __init__(self) -> None:
        self._lines: dict[str, LedgerLine] = {}
        self._held: dict[tuple[str, int], tuple[str, Charge]] = {}

    def read(self, journal: str, entry: Mapping[str, Any]) -> None:
        """Take one entry of the journal of a worker, or of the server; entries of other kinds do nothing."""
        kind, worker = entry["kind"], entry.get("worker", journal)
        if kind == "reserved":
            prompt, completion, dollars = entry["worst"]
            self._held[journal, entry["number"]] = worker, Charge(prompt, completion, Decimal(dollars))
            self._add(worker, attempts=1)
        elif kind == "withdrawn":
            self._held.pop((journal, entry["number"]))
            self._add(worker, attempts=-1)
        elif kind == "attempt":
            self._held.pop((journal, entry["number"]))
            self._settle(worker, entry)
        elif kind == "process":  # numbers begin again, and what was in flight is lost
            self.cut(journal)

    def cut(self, journal: str) -> None:
        """The process that wrote ``journal`` is gone."""
        for key in [key for key in self._held if key[0] == journal]:
            worker, held = self._held.pop(key)
            self._add(worker, cut=1, cut_tokens=held.tokens, cut_dollars=held.dollars)

    @property
    def lines(self) -> Mapping[str, LedgerLine]:
        """What has been spent, by worker (the empty name: by none); what is in flight counts as attempts alone."""
        return self._lines

    @property
    def held(self) -> list[Charge]:
        """The most that each attempt may cost that is neither over nor known to be lost."""
        return [charge for _, charge in self._held.values()]

    def saved(self) -> dict[str, Any] | None:
        """What ``Ledger.restore`` takes; ``None`` where nothing was spent."""
        for journal in {journal for journal, _ in self._held}:
            self.cut(journal)
        if not self._lines:
            return None
        lines = self._lines.values()
        totals = {
            "lm_calls": sum(line.attempts for line in lines),
            "prompt_tokens": sum(line.prompt_tokens + line.cut_tokens for line in lines),
            "completion_tokens": sum(line.completion_tokens for line in lines),
            "dollars": str(sum((line.total_dollars for line in lines), Decimal(0))),
            "overruns": 0,
        }
        return {"totals": totals, "lines": {name: line.to_dict() for name, line in self._lines.items()}}

    def _settle(self, worker: str, entry: Mapping[str, Any]) -> None:
        prompt, completion, dollars = entry["charge"]
        fate, waited_s = entry["fate"], entry["waited_s"]
        if fate == Fate.REFUSED.value:
            self._add(worker, refused=1, waited_s=waited_s)
        elif fate is None:
            self._add(
                worker,
                answers=1,
                prompt_tokens=prompt,
                completion_tokens=completion,
                dollars=Decimal(dollars),
                unpriced=int(not entry["priced"]),
                unmeasured=int(entry.get("estimated", False)),
                waited_s=waited_s,
            )
        else:
            self._add(
                worker,
                cut=1,
                cut_tokens=prompt + completion,
                cut_dollars=Decimal(dollars),
                unpriced=int(not entry["priced"]),
                waited_s=waited_s,
            )

    def _add(self, worker: str, **more: Any) -> None:
        line = self._lines.get(worker, LedgerLine(worker))
        self._lines[worker] = replace(
            line, **{name: getattr(line, name) + amount for name, amount in more.items()}
        )


def _charge(charge: Charge) -> list[Any]:
    return [charge.prompt_tokens, charge.completion_tokens, str(charge.dollars)]
