"""Caps on LM calls, tokens, dollars and seconds leave the race what it can use, and it knows how far that goes."""

from __future__ import annotations

import logging
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, Price, Worker
from asyndbt_dspy.core.budget import Charge
from asyndbt_dspy.core.messages import StopSearch
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
        self.stops: list[StopSearch] = []

    def stop_search(self, stop: StopSearch) -> None:
        self.stops.append(stop)


class Clock:
    """An event loop's time and timers."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[tuple[float, Any]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, delay_s: float, call: Any) -> None:
        self.timers.append((delay_s, call))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("asyndbt_dspy.race_share.asyncio", SimpleNamespace(get_running_loop=lambda: found))
    return found


class Gate:
    """That of a run, to be looked at."""

    in_flight = 0
    is_search_over = False

    @property
    def working(self) -> int:
        return self.in_flight

    def end_search(self) -> None:
        self.is_search_over = True


def share(
    budget: Budget, use: WorkerUse, race_calls: int = 100, is_repeatable: bool = False
) -> tuple[RaceShare, Ledger, Any]:
    server = SimpleNamespace(
        phase="search",
        finalists=lambda: ("a candidate",),
        race_calls=race_calls,
        step_calls=lambda number: 10 * (number + 1),
        roster=SimpleNamespace(outstanding={0: 5, 1: 6}),
    )
    metering = Metering(budget, 0.4, {})
    server.gate = Gate()
    race = RaceShare(metering, server, {"w": use}, server.gate, is_repeatable)  # type: ignore[arg-type]
    return race, metering.ledger, server


def attempt(ledger: Ledger, fate: Fate | None = None, worker: str = "w") -> None:
    held = ledger.reserve(worker, Charge(40, 10, Decimal("0.0005")), lambda: None)
    assert held is not None
    ledger.settle(held, "m", fate, Charge(15, 5, Decimal("0.0002")) if fate is None else None)


@pytest.mark.usefixtures("clock")
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
        stop = engine.stops.pop()
        assert not engine.stops
        reason = "the search's share of the cap on tokens is spent"
        assert stop == StopSearch(reason, calls=stop.calls, is_dry=True)
        return stop.calls

    # Of 100 calls 28 are gone; a rollout takes 2 * 23/20.
    assert told(Budget(lm_calls=100)) == int((100 - 28) / 2.3)
    # 20 answers of 20 tokens, one cut call of 50: a rollout takes 45; a call under way counts as 450/23.
    assert told(Budget(tokens=2020)) == int((2020 - 450 - 80 - 450 / 23) / 45)
    assert told(Budget(dollars=0.0202)) == int((0.0202 - 0.0045 - 0.0008 - 0.0045 / 23) / 0.00045)
    assert told(Budget(dollars=0.02, lm_calls=60)) == int((60 - 28) / 2.3), "the tightest of the caps"


@pytest.mark.usefixtures("clock")
def test_without_reported_usage_what_was_sent_and_charged_tells() -> None:
    """Two calls a rollout, of fifty tokens and $0.0005 each; twenty are over."""
    engine = Told()
    found = []
    for budget in (Budget(lm_calls=61), Budget(tokens=2050), Budget(dollars=0.0505)):
        race, ledger, _ = share(budget, WorkerUse(calls=10))
        for _ in range(20):
            held = ledger.reserve("w", Charge(40, 10, Decimal("0.0005")), lambda: None)
            assert held is not None
            ledger.settle(held, "m", None)
        race.end_search(engine, BudgetExceededError("no", cap="tokens"))  # type: ignore[arg-type]
        found.append(engine.stops.pop().calls)
    assert found == [20, 10, 40]


@pytest.mark.usefixtures("clock")
def test_where_nothing_is_known_nothing_is_said() -> None:
    engine = Told()
    race, _, _ = share(Budget(lm_calls=100), WorkerUse())
    race.end_search(engine, BudgetExceededError("no", cap="lm_calls"))  # type: ignore[arg-type]
    race.end_search(engine, BudgetExceededError("no", cap="lm_calls"))  # type: ignore[arg-type]
    assert engine.stops == [StopSearch("the search's share of the cap on lm calls is spent", is_dry=True)]


@pytest.mark.usefixtures("clock")
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


@pytest.mark.parametrize(("left_s", "calls"), [(6.0, 3 * 6 - 15), (20.0, 3 * 20 - 15), (1.0, 12)])
def test_the_race_is_as_long_as_the_search_was_fast(clock: Clock, left_s: float, calls: int) -> None:
    """Thirty rollouts in ten seconds, and half of thirty more are begun; four of the setup do not count."""
    engine, use = Told(), WorkerUse(calls=4)
    race, _, server = share(Budget(seconds=20), use)
    race.end_search_in(engine, 10.0, left_s)  # type: ignore[arg-type]
    ((delay_s, over),) = clock.timers
    assert delay_s == 10.0
    use.calls += 30
    clock.now_s += delay_s
    over()
    assert engine.stops == [StopSearch("the time budget is spent", calls=max(12, calls))]
    server.phase = "race"
    over()
    assert len(engine.stops) == 1


def test_time_that_is_over_already_is_told_at_once(clock: Clock) -> None:
    engine = Told()
    race, _, _ = share(Budget(seconds=20), WorkerUse())
    race.end_search_in(engine, -3.0, 8.0)  # type: ignore[arg-type]
    ((delay_s, over),) = clock.timers
    assert delay_s == 0.0
    over()
    assert engine.stops == [StopSearch("the time budget is spent")], (
        "and nobody knows how fast it would have been"
    )


@pytest.mark.parametrize(("in_flight", "calls"), [(0, 3 * 20 - 15), (8, 3 * 20 - 4)])
def test_what_is_begun_are_rollouts_where_they_are_made_here(
    clock: Clock, in_flight: int, calls: int
) -> None:
    """What its steps have not begun is not made any more; of workers elsewhere half of their steps is."""
    engine, use = Told(), WorkerUse()
    race, _, server = share(Budget(seconds=20), use)
    server.gate.in_flight = in_flight
    race.end_search_in(engine, 10.0, 20.0)  # type: ignore[arg-type]
    use.calls += 30
    clock.now_s += 10.0
    clock.timers[0][1]()
    assert engine.stops == [StopSearch("the time budget is spent", calls=calls)]
    assert server.gate.is_search_over


def test_a_search_without_a_candidate_is_not_over_before_its_steps_say_what_they_have(clock: Clock) -> None:
    engine = Told()
    race, _, server = share(Budget(seconds=20), WorkerUse())
    server.finalists = tuple
    race.end_search_in(engine, 1.0, 8.0)  # type: ignore[arg-type]
    clock.timers[0][1]()
    assert engine.stops == [StopSearch("the time budget is spent", is_dry=True)]


@pytest.mark.parametrize("is_repeatable", [False, True])
def test_in_the_race_nothing_of_the_search_begins(clock: Clock, is_repeatable: bool) -> None:
    """How much of it has begun depends on timing, which has no say in a repeatable run unless a cap gave it one."""
    race, _, server = share(Budget(seconds=20), WorkerUse(), is_repeatable=is_repeatable)
    race.observe(None)
    assert not server.gate.is_search_over
    server.phase = "race"
    race.observe(None)
    assert server.gate.is_search_over is not is_repeatable
    server.phase = "search"
    race.end_search_in(Told(), 1.0, 8.0)  # type: ignore[arg-type]
    clock.timers[0][1]()
    assert server.gate.is_search_over


def test_what_the_search_has_queued_at_a_rate_limit_takes_no_time_of_the_race() -> None:
    """Three workers, ten requests a second, six seconds: what 36 rollouts of the search stand in line for was the race's."""
    with Provider(answer=kit.stairs(1), latency_s=0.2) as provider:
        lm = dspy.LM("openai/m", api_base=provider.url, api_key="k", cache=False)
        workers = [
            Worker(
                f"w{number}", kit.examples(180)[number::3], lm=lm, max_concurrency=16, requests_per_minute=600
            )
            for number in range(3)
        ]
        optimizer = AsynDBT(kit.metric, workers=workers, budget=Budget(seconds=6.0), progress=False)
        with dspy.context(adapter=dspy.JSONAdapter()):
            optimizer.compile(dspy.Predict(kit.Sort))
    student, *challengers = optimizer.result.candidates
    assert challengers and student.examples >= 4, "none, before"


def test_what_little_time_is_left_is_spent_on_few_candidates() -> None:
    """Twenty rollouts a second, two seconds for the race: of eight candidates each would meet five examples, if that."""
    with Provider(answer=kit.stairs(1), latency_s=0.2) as provider:
        lm = dspy.LM("openai/m", api_base=provider.url, api_key="k", cache=False)
        workers = [Worker("w", kit.examples(60), lm=lm, max_concurrency=4)]
        optimizer = AsynDBT(kit.metric, workers=workers, budget=Budget(seconds=5.0), progress=False)
        optimizer.compile(dspy.Predict(kit.Sort))
    student, *challengers = optimizer.result.candidates
    assert 1 <= len(challengers) <= 2
    assert student.examples >= 6


def test_time_gives_a_deterministic_run_a_race_too_and_says_what_it_cost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Provider(answer=kit.stairs(1), latency_s=0.05) as provider:
        lm = dspy.LM("openai/m", api_base=provider.url, api_key="k", cache=False)
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter()), caplog.at_level(logging.WARNING):
            optimizer = AsynDBT(
                kit.metric,
                workers=2,
                budget=Budget(metric_calls=100_000, seconds=6),
                deterministic=True,
                instructions={"self": [kit.MAGIC]},
                progress=False,
            )
            optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(120))
    student, *challengers = optimizer.result.candidates
    assert student.examples > 3
    assert challengers
    assert "The time budget ended the search of a run with deterministic=True" in caplog.text


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (Budget(metric_calls=1000, tokens=9_000), "cap on tokens"),
        (Budget(metric_calls=1000, lm_calls=60), ""),
        (Budget(metric_calls=60, tokens=10**9), ""),
    ],
)
def test_what_timing_has_a_say_in_is_told_of_a_deterministic_run(
    caplog: pytest.LogCaptureFixture, budget: Budget, told: str
) -> None:
    with caplog.at_level(logging.WARNING):
        result_of(budget, workers=2, deterministic=True)
    said = [one.getMessage() for one in caplog.records if "deterministic=True" in one.getMessage()]
    assert [one.split(" ended")[0] for one in said] == ([f"The {told}"] if told else [])
