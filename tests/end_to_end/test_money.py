"""Caps, limits, fallback and estimates of a whole compile, against a provider on a real socket."""

from __future__ import annotations

import json
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import dspy
import kit
import pytest
from arrivals import assert_rate

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, Estimate, Price, Worker
from asyndbt_dspy.core import call_times
from asyndbt_dspy.programs import time_limit
from asyndbt_dspy.testing.provider import Call, Fault, Provider

PRICE = Price(prompt=0.15, completion=0.6)
PRICES = {"prompt_dollars_per_million": 0.15, "completion_dollars_per_million": 0.6}
both_engines = pytest.mark.parametrize("engine", ["auto", "litellm"])


def lm_on(provider: Provider, engine: str = "auto", **settings: Any) -> dspy.LM:
    known = {"cache": False, "num_retries": 2, "max_tokens": 50, "timeout": 10, "api_key": "k", **settings}
    return dspy.LM("openai/m", api_base=provider.url, engine=engine, **known)


def workers_on(
    provider: Provider, engine: str = "auto", size: int = 30, count: int = 2, **options: Any
) -> list[Worker]:
    data = kit.examples(count * size)
    return [
        Worker(f"w{number}", data[size * number : size * (number + 1)], lm=lm_on(provider, engine), **options)
        for number in range(count)
    ]


def compiled(workers: list[Worker], budget: Budget, **options: Any) -> tuple[AsynDBT, dspy.Module]:
    optimizer = AsynDBT(
        kit.metric,
        workers=workers,
        budget=budget,
        instructions={"self": [kit.MAGIC]},
        progress=False,
        **options,
    )
    return optimizer, optimizer.compile(dspy.Predict(kit.Sort))


def assert_better(optimizer: AsynDBT, program: dspy.Module) -> None:
    """With the magic sentence or with demos of two classes the script is always right; which of them wins, timing decides."""
    winner = next(one for one in optimizer.result.candidates if one.won)
    assert winner.name != "student" and winner.score == 1.0 and winner.examples >= 6
    assert kit.state_of(program) != kit.state_of(dspy.Predict(kit.Sort))


@both_engines
def test_a_cap_on_lm_calls_holds_whatever_is_in_flight(engine: str) -> None:
    with Provider(answer=kit.stairs(1)) as provider:
        workers = workers_on(provider, engine, size=120, max_concurrency=32)  # 64 in flight
        optimizer, program = compiled(workers, Budget(lm_calls=500))
        assert 400 <= provider.attempts <= 500
        assert sum(line["attempts"] for line in optimizer.result.spending.values()) == provider.attempts
    assert_better(optimizer, program)  # the best so far, raced with what was kept back
    assert "lm calls" in optimizer.result.stopped


def test_a_cap_on_dollars_holds_to_a_thousandth_of_a_cent() -> None:
    with Provider(answer=kit.stairs(1), **PRICES) as provider:
        cap = 0.0015
        optimizer, _ = compiled(workers_on(provider, max_concurrency=16, price=PRICE), Budget(dollars=cap))
        billed = provider.dollars
        assert Decimal(str(cap)) / 2 < billed <= Decimal(str(cap)) + Decimal("0.00001")
        lines = optimizer.result.spending.values()
        answered, cut = (sum(Decimal(line[name]) for line in lines) for name in ("dollars", "cut_dollars"))
        # What is in flight when the race is over is cut, charged in full, and billed by the provider all the same.
        assert answered <= billed <= answered + cut <= Decimal(str(cap))
        assert cut or answered == billed


def test_what_was_refused_is_neither_a_score_nor_a_failure() -> None:
    with Provider(answer=kit.stairs(1)) as provider:
        optimizer, _ = compiled(workers_on(provider, max_concurrency=16), Budget(lm_calls=60))
    assert all(not worker.set_aside and not worker.failed for worker in optimizer.result.workers)
    assert sum(worker.calls for worker in optimizer.result.workers) == optimizer.result.metric_calls <= 60


def test_a_budget_below_the_setup_returns_the_student() -> None:
    with Provider(answer=kit.stairs(1)) as provider:
        optimizer, program = compiled(workers_on(provider), Budget(lm_calls=1))
        assert provider.attempts <= 1
    assert program.signature.instructions == kit.Sort.instructions
    assert optimizer.result.winner == "student"


@both_engines
def test_a_dead_key_is_left_out_and_the_next_one_answers(engine: str) -> None:
    def fault(call: Call) -> Fault:
        return Fault("status", status=401) if call.key == "dead" else Fault()

    with Provider(answer=kit.stairs(1), fault=fault) as provider:
        lms = [lm_on(provider, engine, api_key="dead"), lm_on(provider, engine, api_key="alive")]
        worker = Worker("w", kit.examples(60), lm=lms)
        optimizer, program = compiled([worker], Budget(metric_calls=120))
        assert 1 <= len(provider.seen(key="dead")) <= 10
    assert optimizer.result.metric_calls >= 100
    assert not optimizer.result.workers[0].set_aside
    assert_better(optimizer, program)


def test_a_straggler_is_hedged_on_the_next_lm_and_both_are_counted() -> None:
    def fault(call: Call) -> Fault:
        return Fault("slow", seconds=1.0) if call.key == "first" and call.number % 8 == 0 else Fault()

    with Provider(answer=kit.stairs(1), fault=fault) as provider:
        lms = [lm_on(provider, api_key="first"), lm_on(provider, api_key="second")]
        worker = Worker("w", kit.examples(60), lm=lms, hedge_after_s=0.1)
        optimizer, _ = compiled([worker], Budget(metric_calls=40))
        assert provider.seen(key="second")
        assert optimizer.result.spending["w"]["attempts"] == provider.attempts
        assert provider.attempts > optimizer.result.metric_calls
    assert optimizer.result.workers[0].missing == 0


def test_the_estimate_comes_before_any_call_and_can_be_refused() -> None:
    asked: list[Estimate] = []

    def refuse(estimate: Estimate) -> bool:
        asked.append(estimate)
        return False

    with Provider(answer=kit.stairs(1)) as provider:
        with pytest.raises(
            ConfigurationError, match=r"refused by confirm=.* 120 metric calls, about 120 LM calls"
        ):
            compiled(workers_on(provider, price=PRICE), Budget(metric_calls=120), confirm=refuse)
        assert provider.attempts == 0
    (estimate,) = asked
    assert estimate.dollars is not None
    assert 0 < estimate.dollars < 1
    assert estimate.tokens > 120 * 50


@pytest.mark.parametrize(
    ("budget", "settings", "match"),
    [
        (Budget(tokens=1000), {"max_tokens": None}, "has no max_tokens"),
        (Budget(dollars=1.0), {}, "has no known price"),
    ],
)
def test_caps_that_cannot_be_kept_are_refused_before_any_call(
    budget: Budget, settings: Any, match: str
) -> None:
    with Provider(answer=kit.stairs(1)) as provider:
        worker = Worker("w", kit.examples(60), lm=lm_on(provider, **settings))
        with pytest.raises(ConfigurationError, match=match):
            compiled([worker], budget)
        assert provider.attempts == 0


def test_seconds_end_search_race_and_all_with_the_best_so_far() -> None:
    """Ten thousand rollouts of 50 ms in 16 places would take 31 s and more."""
    with Provider(answer=kit.stairs(1), latency_s=0.05) as provider:
        workers = workers_on(provider, max_concurrency=8)
        # How many examples are raced by then is the machine's business: whatever is ahead by then is returned.
        optimizer, program = compiled(
            workers, Budget(metric_calls=10_000, seconds=10.0), config={"accept_z": 0.0}
        )
    assert optimizer.result.seconds < 20
    assert 0 < optimizer.result.metric_calls < 6000
    assert "time budget" in optimizer.result.stopped or "of the budget are over" in optimizer.result.stopped
    assert_better(optimizer, program)


@pytest.mark.parametrize("deterministic", [False, True])
def test_seconds_end_a_race_that_would_go_on_and_what_it_has_paid_for_decides(
    tmp_path: Path, deterministic: bool
) -> None:
    """After forty rollouts of the race each takes four seconds; its first units are not over when time is.

    Resumed, a run whose time is over gives the same program once more, and pays for nothing.
    """
    raced: set[str] = set()

    def fault(call: Call) -> Fault:
        return Fault("slow", seconds=4.0) if len(raced) >= 40 else Fault()

    def script(messages: Any) -> Any:
        if kit.number_in(messages) >= 400:
            raced.add(json.dumps(messages))
        return kit.stairs(1)(messages)

    held_out = kit.examples(120, start=400)
    with Provider(answer=script, latency_s=0.05, fault=fault) as provider:
        optimizer = AsynDBT(
            kit.metric,
            workers=workers_on(provider, count=4, max_concurrency=8),
            budget=Budget(metric_calls=400 if deterministic else 10_000, seconds=8.0),
            instructions={"self": [kit.MAGIC]},
            progress=False,
            straggler_factor=None,
            deterministic=deterministic,
            config={"accept_z": 0.0},
            run_dir=tmp_path,
            resume=True,
        )
        program = optimizer.compile(dspy.Predict(kit.Sort), valset=held_out)
        first, paid = optimizer.result, provider.attempts
        again = optimizer.compile(dspy.Predict(kit.Sort), valset=held_out)
        assert provider.attempts == paid
        assert optimizer.result.candidates == first.candidates
        assert kit.state_of(again) == kit.state_of(program)
    optimizer.result = first
    assert len(raced) >= 40
    assert optimizer.result.stopped == "the 8 s of the budget are over"
    assert optimizer.result.seconds < 8 + 8, "what is in flight ends, and no more"
    student, *challengers = optimizer.result.candidates
    counted = student.examples + sum(one.examples for one in challengers)
    assert len(raced) <= counted, "all that was paid for, and what another candidate's answer stands for"
    winner = next(one for one in challengers if one.won)
    assert winner.score == 1.0, "how many examples each was raced on by then is the machine's business"
    assert kit.state_of(program) != kit.state_of(dspy.Predict(kit.Sort))


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("ends", ["seconds", "stop"])
def test_no_call_waits_for_a_rate_limit_once_the_run_is_to_end(ends: str, is_async: bool) -> None:
    """One call every ten seconds: the second one is due when nobody wants it any more."""
    with Provider(answer=kit.stairs(1)) as provider:
        optimizer = AsynDBT(
            kit.metric,
            workers=workers_on(provider, requests_per_minute=6),
            budget=Budget(seconds=2) if ends == "seconds" else Budget(metric_calls=100),
            progress=False,
        )

        def answer(messages: Any) -> str:
            if ends == "stop":
                optimizer.stop()
            return kit.stairs(1)(messages)

        provider.answer = answer
        program = optimizer.compile(dspy.Predict(kit.Sort) if is_async else Plain())
        assert provider.attempts == 1
        assert optimizer.result is None or optimizer.result.seconds < 9
    assert isinstance(program, dspy.Module)


class Plain(dspy.Module):
    """Runs in a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(kit.Sort)

    def forward(self, message: str) -> Any:
        return self.sort(message=message)


def test_calls_that_all_hang_end_soon_after_the_time_of_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "_LAST_S", 0.5)
    with Provider(fault=lambda call: Fault("never")) as provider:
        begun_s = time.monotonic()
        optimizer = AsynDBT(
            kit.metric, workers=workers_on(provider), budget=Budget(seconds=1), progress=False
        )
        optimizer.compile(dspy.Predict(kit.Sort))
        assert time.monotonic() - begun_s < 60, "not the 120 s that a rollout may take"


def test_the_first_call_that_hangs_does_not_hold_up_the_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_times, "_LEAST_OF_FEW_S", 0.5)

    def fault(call: Call) -> Fault:
        return Fault("never") if call.number == 0 else Fault()

    with Provider(answer=kit.stairs(1), fault=fault) as provider:
        optimizer, program = compiled(workers_on(provider, count=3), Budget(metric_calls=100))
        assert optimizer.result.seconds < 60, "not the 120 s that a rollout may take"
    assert_better(optimizer, program)


def test_when_time_is_over_in_the_setup_the_student_comes_back() -> None:
    with Provider(answer=kit.stairs(1), latency_s=0.4) as provider:
        student = dspy.Predict(kit.Sort)
        optimizer = AsynDBT(
            kit.metric, workers=workers_on(provider), budget=Budget(seconds=0.2), progress=False
        )
        program = optimizer.compile(student)
        assert provider.attempts <= 2
    assert program.signature.instructions == student.signature.instructions
    assert not program.demos


def test_a_judge_in_the_metric_is_counted() -> None:
    def judged(gold: Any, prediction: Any, trace: Any = None) -> bool:
        verdict = dspy.Predict("message, label -> is_right: bool")(
            message=gold.message, label=prediction.label
        )
        return bool(verdict.is_right)

    def answer(messages: list[dict[str, Any]]) -> str:
        is_judge = "is_right" in str(messages[0]["content"])
        return '{"is_right": true}' if is_judge else kit.stairs(1)(messages)

    with Provider(answer=answer) as provider, dspy.context(lm=lm_on(provider)):
        optimizer = AsynDBT(judged, workers=2, budget=Budget(lm_calls=80), progress=False)
        optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
        assert 40 < provider.attempts <= 80
        assert sum(line["attempts"] for line in optimizer.result.spending.values()) == provider.attempts
    assert optimizer.result.metric_calls <= provider.attempts / 2 + 1


def test_a_call_that_hangs_until_the_end_is_cut_and_booked_before_the_result_is_made() -> None:
    def fault(call: Call) -> Fault:
        return Fault("never") if call.number == 40 else Fault()

    with Provider(answer=kit.stairs(1), fault=fault, latency_s=0.01) as provider:
        worker = Worker("w", kit.examples(12), lm=lm_on(provider, timeout=60), max_concurrency=8)
        optimizer, _ = compiled([worker], Budget(metric_calls=120, lm_calls=300), straggler_factor=2.0)
        line = optimizer.result.spending["w"]
        assert (line["attempts"], line["cut"]) == (provider.attempts, 1)
        assert line["attempts"] == line["answers"] + 1
    assert optimizer.result.seconds < 30  # nobody waited for it


class Dawdling(dspy.Module):
    """Plain code that nobody can cancel: on one message it waits until the compile is over, then it goes on calling."""

    over, went_on = threading.Event(), threading.Event()
    errors: ClassVar[list[BaseException]] = []

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(kit.Sort)

    def forward(self, message: str) -> dspy.Prediction:
        found = self.sort(message=message)
        if message == kit.example(3).message:
            Dawdling.over.wait(30)
            try:
                self.sort(message=message)
            except BaseException as error:
                Dawdling.errors.append(error)
                raise
            finally:
                Dawdling.went_on.set()
        return found


def test_a_program_in_a_thread_spends_nothing_once_its_compile_is_over() -> None:
    with Provider(answer=kit.stairs(1)) as provider:
        optimizer = AsynDBT(
            kit.metric,
            workers=[Worker("w", kit.examples(12), lm=lm_on(provider))],
            budget=Budget(metric_calls=60, lm_calls=200),
            rollout_timeout_s=0.5,
            mode="instructions",
            progress=False,
        )
        optimizer.compile(Dawdling())
        spent = optimizer.result.spending["w"]["attempts"]
        assert provider.attempts == spent
        Dawdling.over.set()
        assert Dawdling.went_on.wait(10)
        assert provider.attempts == spent
    assert any("the run is over" in str(error) for error in Dawdling.errors)


def test_a_predictors_own_lm_is_counted_too_and_comes_back_as_it_was() -> None:
    with Provider(answer=kit.stairs(1)) as provider:
        own = lm_on(provider)
        student = dspy.Predict(kit.Sort)
        student.lm = own
        optimizer = AsynDBT(kit.metric, workers=2, budget=Budget(lm_calls=60), progress=False)
        program = optimizer.compile(student, trainset=kit.examples(60))
        assert provider.attempts == sum(line["attempts"] for line in optimizer.result.spending.values())
    assert program.lm is own
    assert student.lm is own


def test_an_adapters_own_lm_is_counted_too_and_stays_as_it_was() -> None:
    def extract(messages: list[dict[str, Any]]) -> str:
        return f"[[ ## label ## ]]\n{'red' if 'red' in messages[-1]['content'] else 'blue'}\n[[ ## completed ## ]]"

    with Provider(lambda messages: "It is red.") as first, Provider(extract) as second:
        own = lm_on(second)
        adapter = dspy.TwoStepAdapter(own)
        optimizer = AsynDBT(kit.metric, workers=2, budget=Budget(lm_calls=60), progress=False)
        with dspy.context(lm=lm_on(first), adapter=adapter):
            optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
        counted = sum(line["attempts"] for line in optimizer.result.spending.values())
        assert first.attempts + second.attempts == counted <= 60
        assert second.attempts > 5
    assert adapter.extraction_model is own and not own.history


def test_workers_on_one_endpoint_share_its_rate_limit() -> None:
    """Twelve requests a second for both together; the windows themselves are tested in tests/lms."""
    with Provider(answer=kit.stairs(1)) as provider:
        workers = workers_on(provider, max_concurrency=16, requests_per_minute=720)
        compiled(workers, Budget(metric_calls=80))
        assert_rate([call.at_s for call in provider.seen()], 12)


def test_a_number_of_workers_keeps_the_rate_that_the_optimizer_was_given() -> None:
    with Provider(answer=kit.stairs(1)) as provider:
        optimizer = AsynDBT(
            kit.metric,
            budget=Budget(metric_calls=80),
            requests_per_minute=720,
            num_threads=32,
            progress=False,
        )
        with dspy.context(lm=lm_on(provider)):
            optimizer.compile(dspy.Predict(kit.Sort), trainset=kit.examples(60))
        assert_rate([call.at_s for call in provider.seen()], 12)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"requests_per_minute": 0}, "worker 'w': requests_per_minute=0 must be > 0"),
        ({"hedge_after_s": -1}, "worker 'w': hedge_after_s=-1 must be > 0 seconds"),
        ({"lm": []}, "worker 'w': lm is an empty list"),
        ({"limiter": "none"}, "worker 'w': limiter='none'"),
    ],
)
def test_a_workers_limits_are_checked(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Worker("w", kit.examples(4), **options)
