"""A ledger without a budget counts and never refuses."""

from __future__ import annotations

from asyndbt_dspy.core.budget import BudgetLedger, Charge


def test_a_ledger_without_caps_is_never_exhausted() -> None:
    ledger = BudgetLedger(None)
    numbers = [ledger.reserve(Charge(prompt_tokens=10, completion_tokens=5)) for _ in range(3)]
    assert numbers == [1, 2, 3]
    assert ledger.exhausted(elapsed_s=1e9, metric_calls=10**9) is None
    assert ledger.spent.lm_calls == 3
