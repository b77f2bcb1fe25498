"""Caps on LM calls, tokens and dollars leave the race what it can use, and it knows how far that goes."""

from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, Price
from asyndbt_dspy.core.budget import Charge
from asyndbt_dspy.errors import BudgetExceededError
from asyndbt_dspy.lms.failures import Fate
from asyndbt_dspy.lms.ledger import Ledger
from asyndbt_dspy.metering import PROPOSER, Metering
from asyndbt_dspy.programs.evaluator import WorkerUse
from asyndbt_dspy.race_share import RaceShare
from asyndbt_dspy.testing.provider import Provider

PRICES = {"prompt_dollars_per_million": 0.15, "completion_dollars_per_million": 0.6}


def result_of(budget: Budget, steps: int = 1, **options: Any) -> Any:
    student = dspy.Predict(kit.Sort) if steps == 1 else kit.TwoSteps()
    with Provider(answer=kit.stairs(steps), **PRICES) as provider:
        lm = dspy.LM("openai/m", api_base=provider.url, api_key="k", cache=False, max_tokens=50)
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
            optimizer = AsynDBT(
                kit.metric, budget=budget, prices={"openai/m": Price(0.15, 0.6)}, progress=False, **options
            )
            optimizer.compile(student, trainset=kit.examples(120))
    return optimizer.result


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (Budget(lm_calls=100), 1),
        (Budget(lm_calls=200), 2),
        (Budget(tokens=19_000), 1),
        (Budget(dollars=0.003), 1),
        (Budget(dollars=0.003, metric_calls=10_000), 1),
    ],
)
def test_a_small_cap_buys_a_race_of_few_candidates_that_is_run_to_its_end(budget: Budget, steps: int) -> None:
    """About a hundred rollouts: of eight candidates each would meet five examples, on which nothing can be told apart."""
    result = result_of(budget, steps)
    assert 80 <= result.metric_calls <= 125
    student, *challengers = result.candidates
    assert 1 <= len(challengers) <= 4
    assert student.examples >= 9
    assert max(one.examples for one in challengers) >= 9
    assert all(one.examples for one in challengers)


def test_a_large_cap_keeps_no_more_than_the_race_can_use() -> None:
    """The race has use for 240 rollouts at most; two fifths of the cap would be 800."""
    lm = kit.color_lm()
    optimizer = AsynDBT(kit.metric, budget=Budget(lm_calls=2000), progress=False)
    with dspy.context(lm=lm):
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(120))
    student, *challengers = optimizer.result.candidates
    raced = sum(one.examples for one in (student, *challengers))
    assert optimizer.result.metric_calls - raced > 1500
    assert student.examples == 30, "all that was kept back"


class Told:
    """An engine that only listens."""

    def __init__(self) -> None:
        self.stops: list[tuple[str, bool, int | None]] = []

    def stop_search(self, reason: str, race: bool = True, calls: int | None = None) -> None:
        self.stops.append((reason, race, calls))


def share(budget: Budget, use: WorkerUse, race_calls: int = 100) -> tuple[RaceShare, Ledger, Any]:
    server = SimpleNamespace(phase="search", race_calls=race_calls)
    metering = Metering(budget, 0.4, {})
    return RaceShare(metering, server, {"w": use}), metering.ledger, server  # type: ignore[arg-type]


def attempt(ledger: Ledger, fate: Fate | None = None, worker: str = "w") -> None:
    held = ledger.reserve(worker, Charge(40, 10, Decimal("0.0005")), lambda: None)
    assert held is not None
    ledger.settle(held, "m", fate, Charge(15, 5, Decimal("0.0002")) if fate is None else None)


def test_what_is_left_in_rollouts() -> None:
    """Ten rollouts of two calls each; two more calls failed, one was cut and one is under way, a proposer took four."""
    engine = Told()
    use = WorkerUse(calls=10, lm_calls=20, prompt_tokens=300, completion_tokens=100)
    refused = BudgetExceededError("no", cap="tokens")

    def told(budget: Budget) -> int | None:
        race, ledger, server = share(budget, use)
        for fate in (None,) * 20 + (Fate.REFUSED, Fate.REFUSED, Fate.CUT):
            attempt(ledger, fate)
        for _ in range(4):
            attempt(ledger, worker=PROPOSER)
        ledger.reserve("w", Charge(40, 10, Decimal("0.0005")), lambda: None)
        race.end_search(engine, refused)  # type: ignore[arg-type]
        server.phase = "race"
        race.end_search(engine, refused)  # type: ignore[arg-type]
        reason, is_race, calls = engine.stops.pop()
        assert not engine.stops
        assert (reason, is_race) == ("the search's share of the cap on tokens is spent", True)
        return calls

    # Of 100 calls 28 are gone; a rollout takes 2 * 23/20.
    assert told(Budget(lm_calls=100)) == int((100 - 28) / 2.3)
    # 20 answers of 20 tokens, one cut call of 50: a rollout takes 45; a call under way counts as 450/23.
    assert told(Budget(tokens=2020)) == int((2020 - 450 - 80 - 450 / 23) / 45)
    assert told(Budget(dollars=0.0202)) == int((0.0202 - 0.0045 - 0.0008 - 0.0045 / 23) / 0.00045)
    assert told(Budget(dollars=0.02, lm_calls=60)) == int((60 - 28) / 2.3), "the tightest of the caps"


def test_where_nothing_is_known_nothing_is_said() -> None:
    engine = Told()
    race, _, _ = share(Budget(lm_calls=100), WorkerUse())
    race.end_search(engine, BudgetExceededError("no", cap="lm_calls"))  # type: ignore[arg-type]
    race.end_search(engine, BudgetExceededError("no", cap="lm_calls"))  # type: ignore[arg-type]
    assert engine.stops == [("the search's share of the cap on lm calls is spent", True, None)]


@pytest.mark.parametrize(("race_calls", "kept"), [(20, 0.125), (1000, 0.4)])
def test_what_is_kept_is_fitted_once_half_of_the_searchs_share_is_gone(race_calls: int, kept: float) -> None:
    """200 rollouts in all, of which the race can use ``race_calls``, and a quarter more is kept; never more than before."""
    use = WorkerUse(calls=30, lm_calls=30, prompt_tokens=450, completion_tokens=150)
    race, ledger, server = share(Budget(lm_calls=200), use, race_calls)
    for _ in range(59):
        attempt(ledger)
    race.observe(None)
    assert ledger.kept_back == 0.4
    attempt(ledger)
    race.observe(None)
    assert ledger.exhausted() is None
    for _ in range(int(200 * (1 - kept)) - 60):
        attempt(ledger)
    assert ledger.exhausted() == "lm_calls"
    server.phase = "race"
    race.observe(None)
    assert ledger.exhausted() is None
