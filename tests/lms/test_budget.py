"""Caps are never passed, whatever is in flight, in which order it comes back, and what becomes of it."""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyndbt_dspy.core.budget import Budget, BudgetLedger, Charge
from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError, ProtocolError

NAMES = ("metric_calls", "lm_calls", "tokens", "dollars", "seconds")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "10"])
def test_a_cap_that_is_no_positive_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"Budget\({name}=.*must be a positive, finite number"):
        Budget(**{name: value})


@pytest.mark.parametrize("name", ["metric_calls", "lm_calls", "tokens"])
def test_counts_are_whole(name: str) -> None:
    with pytest.raises(ConfigurationError, match="whole number"):
        Budget(**{name: 1.5})


@pytest.mark.parametrize("name", NAMES)
def test_each_cap_stands_alone(name: str) -> None:
    assert getattr(Budget(**{name: 2}), name) == 2


def test_no_cap_at_all_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sets no cap at all"):
        Budget()


def test_calls_in_flight_count_against_the_cap() -> None:
    ledger = BudgetLedger(Budget(lm_calls=3))
    assert [ledger.reserve(Charge()) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(BudgetExceededError, match=r"3 LM calls of 3 LM calls are spent") as caught:
        ledger.reserve(Charge())
    assert caught.value.cap == "lm_calls"


def test_an_attempt_that_never_was_on_the_wire_comes_back_and_a_refused_one_does_not() -> None:
    ledger = BudgetLedger(Budget(lm_calls=2))
    first, second = ledger.reserve(Charge(5)), ledger.reserve(Charge(5))
    assert first is not None
    assert second is not None
    ledger.withdraw(first)
    ledger.refuse(second)
    assert ledger.spent.lm_calls == 1
    assert ledger.spent.tokens == 0
    ledger.reserve(Charge())
    with pytest.raises(BudgetExceededError):
        ledger.reserve(Charge())


def test_only_calls_in_flight_in_the_way_means_wait() -> None:
    ledger = BudgetLedger(Budget(tokens=100))
    first = ledger.reserve(Charge(40, 40))
    assert first is not None
    assert ledger.reserve(Charge(20, 10)) is None
    ledger.settle(first, Charge(10, 10))
    assert ledger.reserve(Charge(20, 10)) is not None
    with pytest.raises(BudgetExceededError, match="may cost 81 tokens; 20 tokens of 100 tokens"):
        ledger.reserve(Charge(81))


def test_a_cut_attempt_costs_its_reservation() -> None:
    ledger = BudgetLedger(Budget(dollars=1))
    number = ledger.reserve(Charge(10, 20, Decimal("0.25")))
    assert number is not None
    assert ledger.charge(number) == Charge(10, 20, Decimal("0.25"))
    assert ledger.spent.dollars == Decimal("0.25")
    assert ledger.spent.reserved_dollars == 0


def test_a_reservation_ends_once() -> None:
    ledger = BudgetLedger()
    number = ledger.reserve(Charge())
    assert number is not None
    ledger.settle(number, Charge())
    for end in (ledger.charge, ledger.refuse, ledger.withdraw):
        with pytest.raises(ProtocolError, match="is not held"):
            end(number)


def test_a_bill_above_the_reservation_is_told() -> None:
    ledger = BudgetLedger(Budget(tokens=100))
    number = ledger.reserve(Charge(10))
    assert number is not None
    ledger.settle(number, Charge(11))
    assert ledger.spent.overruns == 1


def test_money_is_exact() -> None:
    ledger = BudgetLedger(Budget(dollars=0.01))
    for _ in range(100):
        number = ledger.reserve(Charge(dollars=Decimal("0.0001")))
        assert number is not None
        ledger.settle(number, Charge(dollars=Decimal("0.0001")))
    assert ledger.spent.dollars == Decimal("0.01")  # a hundred floats would sum to 0.010000000000000002
    with pytest.raises(BudgetExceededError):
        ledger.reserve(Charge(dollars=Decimal("0.00000001")))


def test_the_final_race_has_its_own_share() -> None:
    ledger = BudgetLedger(Budget(lm_calls=10), kept_back=0.2)
    for _ in range(8):
        ledger.reserve(Charge())
    assert ledger.exhausted() == "lm_calls"
    with pytest.raises(BudgetExceededError, match="20% of the budget is kept back"):
        ledger.reserve(Charge())
    ledger.keep_back(0.0)
    assert ledger.exhausted() is None
    assert ledger.reserve(Charge()) is not None
    with pytest.raises(ConfigurationError, match=r"kept_back=1.0 must be in \[0, 1\)"):
        BudgetLedger(kept_back=1.0)


def test_time_and_rollouts_are_told_not_measured() -> None:
    ledger = BudgetLedger(Budget(seconds=60, metric_calls=5))
    assert ledger.exhausted(elapsed_s=59.9, metric_calls=4) is None
    assert ledger.exhausted(elapsed_s=60.0) == "seconds"
    assert ledger.exhausted(metric_calls=5) == "metric_calls"


def test_totals_survive_a_restart_with_calls_in_flight_charged() -> None:
    ledger = BudgetLedger(Budget(tokens=1000))
    first, second = ledger.reserve(Charge(100, 50, Decimal("0.5"))), ledger.reserve(Charge(10, 5))
    assert first is not None
    assert second is not None
    ledger.settle(first, Charge(80, 20, Decimal("0.4")))
    later = BudgetLedger(Budget(tokens=1000))
    later.restore(ledger.to_dict())
    assert (later.spent.lm_calls, later.spent.tokens, later.spent.dollars) == (2, 115, Decimal("0.4"))
    with pytest.raises(ProtocolError, match="before the run begins"):
        ledger.restore(later.to_dict())


@given(
    seed=st.integers(0, 2**32 - 1),
    caps=st.tuples(st.integers(1, 60), st.integers(1, 3000), st.integers(1, 300)),
    most_in_flight=st.integers(1, 64),
)
def test_no_order_of_events_passes_a_cap(seed: int, caps: tuple[int, int, int], most_in_flight: int) -> None:
    """The bill of the world outside: an attempt is billed up to its worst case, unless refused or unsent."""
    rng = random.Random(seed)
    ledger = BudgetLedger(Budget(lm_calls=caps[0], tokens=caps[1], dollars=caps[2] / 100))
    held: dict[int, Charge] = {}
    calls, tokens, dollars = 0, 0, Decimal(0)
    for _ in range(200):
        if len(held) < most_in_flight and rng.random() < 0.6:
            worst = Charge(rng.randint(0, 80), rng.randint(0, 40), Decimal(rng.randint(0, 50)) / 1000)
            try:
                number = ledger.reserve(worst)
            except BudgetExceededError:
                continue
            if number is not None:
                held[number] = worst
        elif held:
            number = rng.choice(list(held))
            worst, end = held.pop(number), rng.choice(["settle", "charge", "refuse", "withdraw"])
            billed = Charge(rng.randint(0, worst.prompt_tokens), rng.randint(0, worst.completion_tokens))
            if end == "settle":
                ledger.settle(number, billed)
            else:
                getattr(ledger, end)(number)
            calls += end != "withdraw"
            if end in ("settle", "charge"):
                real = billed if end == "settle" else worst
                tokens, dollars = tokens + real.tokens, dollars + real.dollars
        in_flight = sum(held.values(), Charge())
        assert calls + len(held) <= caps[0]
        assert tokens + in_flight.tokens <= caps[1]
        assert dollars + in_flight.dollars <= Decimal(caps[2]) / 100
        spent = ledger.spent
        assert (spent.lm_calls, spent.tokens, spent.dollars) == (calls + len(held), tokens, dollars)
