"""Metered LMs against a provider on a real socket, through DSPy's native client and through LiteLLM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
from decimal import Decimal
from typing import Any, Literal

import dspy
import pytest
from dspy.lm15 import Message, Response, TextPart, Usage
from dspy.utils.callback import BaseCallback
from dspy.utils.dummies import DummyLM
from metering import PRICE, PRICES, call_many, lm_on, outcome_of, until

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError
from asyndbt_dspy.lms.callers import calling_as
from asyndbt_dspy.lms.failures import FailureKind, Fate, classify
from asyndbt_dspy.lms.ledger import Attempt, Ledger
from asyndbt_dspy.lms.metered import metered
from asyndbt_dspy.lms.prices import Price
from asyndbt_dspy.lms.scripted import scripted_lm
from asyndbt_dspy.programs.rollout import RolloutRunner
from asyndbt_dspy.testing.provider import Call, Fault, Provider

both_engines = pytest.mark.parametrize("engine", ["auto", "litellm"])


# -- caps


@both_engines
def test_a_cap_of_500_calls_with_64_in_flight(engine: str) -> None:
    with Provider(latency_s=0.01) as provider:
        ledger = Ledger(Budget(lm_calls=500))
        lm = metered(lm_on(provider, engine), ledger=ledger, worker="a", prices=PRICE)
        found = asyncio.run(call_many(lm, 560, in_flight=64))
    assert found == {"answer": 500, "budget": 60}
    assert provider.attempts == 500 == ledger.spent.lm_calls
    assert provider.most_in_flight > 10


@both_engines
def test_a_cap_in_dollars_to_a_thousandth_of_a_cent(engine: str) -> None:
    """64 in flight, prompts of 20 to 900 characters, a fifth of the calls cut in the middle."""
    rng = random.Random(3)
    prompts = ["word " * rng.randint(4, 180) for _ in range(300)]
    cap = 0.003

    def fault(call: Call) -> Fault:
        return Fault("cut") if call.number % 5 == 4 else Fault()

    with Provider(lambda messages: "yes " * 30, fault=fault, **PRICES) as provider:
        ledger = Ledger(Budget(dollars=cap))
        lm = metered(lm_on(provider, engine), ledger=ledger, worker="a", prices=PRICE)
        found = asyncio.run(call_many(lm, 300, in_flight=64, prompt=prompts.__getitem__))
        bill = provider.dollars
    assert found["budget"] > 0 and found["answer"] > 0
    assert bill <= Decimal(str(cap))
    line, spent = ledger.line("a"), ledger.spent
    assert spent.dollars == line.total_dollars <= Decimal(str(cap))
    # What is left is less than one more call may cost: the cap is not kept by giving up early.
    assert spent.dollars >= Decimal(str(cap)) - Decimal("0.0003")
    delivered = [call for call in provider.seen() if call.delivered]
    assert abs(line.dollars - sum(map(provider.price, delivered))) <= Decimal("0.00001")


def test_a_cap_on_tokens_counts_threads_too() -> None:
    with Provider(lambda messages: "yes " * 10) as provider:
        ledger = Ledger(Budget(tokens=3_000))
        lm = metered(lm_on(provider, "auto"), ledger=ledger, worker="a", prices=PRICE)
        found: list[str] = []

        def work() -> None:
            for number in range(30):
                try:
                    lm(f"question {number}")
                    found.append("answer")
                except Exception as error:  # noqa: BLE001 - sorted
                    found.append(outcome_of(error))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert set(found) == {"answer", "budget"}
    assert len(found) == 240
    assert provider.tokens == ledger.spent.tokens <= 3_000
    assert ledger.spent.tokens >= 2_500


def test_a_plain_call_on_the_loop_itself_does_not_wait_for_the_loops_own_calls() -> None:
    with Provider(latency_s=0.3) as provider:
        ledger = Ledger(Budget(tokens=400))
        lm = metered(lm_on(provider, "auto"), ledger=ledger, worker="a", prices=PRICE)

        async def run() -> None:
            first = asyncio.ensure_future(lm.acall("question"))
            await until(lambda: ledger.spent.reserved_tokens)
            with pytest.raises(dspy.LMError, match="on the event loop's own thread"):
                lm("question")
            await first

        asyncio.run(asyncio.wait_for(run(), 10))
    assert provider.attempts == 1


# -- faults


KINDS = (
    Fault("status", status=429, retry_after_s=0.05),
    Fault("status", status=500),
    Fault("status", status=503),
    Fault("status", status=504),
    Fault("broken_json"),
    Fault("cut"),
    Fault("never"),
    Fault("slow", seconds=0.1),
)


@both_engines
def test_faults_of_all_kinds_and_both_sides_count_the_same(engine: str) -> None:
    rng = random.Random(7)
    plan = [rng.choice(KINDS) if rng.random() < 0.25 else Fault() for _ in range(1000)]
    with Provider(lambda messages: "yes no", fault=lambda call: plan[call.number]) as provider:
        ledger = Ledger()
        lm = metered(
            lm_on(provider, engine, num_retries=1, timeout=2), ledger=ledger, worker="a", prices=PRICE
        )
        found = asyncio.run(call_many(lm, 150, in_flight=50))
        calls, line = provider.seen(), ledger.line("a")
    assert {call.fault.kind for call in calls} >= {"status", "broken_json", "cut", "never", "slow"}
    assert set(found) <= {"answer", "transient"}
    assert found["answer"] == line.answers > 130
    assert line.attempts == len(calls) == line.answers + line.refused + line.cut
    delivered = [call for call in calls if call.delivered]
    assert line.answers == len(delivered)
    assert line.prompt_tokens == sum(call.prompt_tokens for call in delivered)
    assert line.completion_tokens == sum(call.completion_tokens for call in delivered)
    lost = [call for call in calls if not call.delivered]
    assert line.cut_tokens >= sum(call.tokens for call in lost) > 0
    assert line.refused == sum(call.fault.status in (429, 500, 503) and not call.tokens for call in lost)
    assert ledger.spent.reserved_tokens == 0


@both_engines
def test_a_refused_connection_is_no_attempt(engine: str) -> None:
    provider = Provider().start()
    lm_before = lm_on(provider, engine)
    provider.stop()
    ledger = Ledger(Budget(lm_calls=1, tokens=10_000))
    lm = metered(lm_before, ledger=ledger, worker="a", prices=PRICE)
    assert asyncio.run(call_many(lm, 3, in_flight=1)) == {"transient": 3}
    assert ledger.spent.lm_calls == ledger.line("a").attempts == ledger.spent.tokens == 0


@both_engines
def test_retry_after_is_honoured(engine: str) -> None:
    times: list[float] = []

    def fault(call: Call) -> Fault:
        times.append(call.at_s)
        return Fault("status", status=429, retry_after_s=0.7) if call.number == 0 else Fault()

    with Provider(fault=fault) as provider:
        lm = metered(lm_on(provider, engine, num_retries=1), ledger=Ledger(), worker="a", prices=PRICE)
        assert asyncio.run(lm.acall("question")) == ["ok"]
        assert lm("question") == ["ok"]
    # DSPy's own waiting without a hint is 1.0 s: sooner shows that the hint was read.
    assert 0.69 <= times[1] - times[0] < 1.0


@both_engines
def test_an_answer_that_is_no_json_is_asked_for_again(engine: str) -> None:
    with Provider(fault=lambda call: Fault("broken_json" if call.number == 0 else "none")) as provider:
        lm = metered(lm_on(provider, engine, num_retries=1), ledger=Ledger(), worker="a", prices=PRICE)
        assert lm("question") == ["ok"]
    assert provider.attempts == 2


@both_engines
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, None, FailureKind.ENDPOINT),
        (404, None, FailureKind.ENDPOINT),
        (400, "content_filter", "example"),
    ],
)
def test_permanent_failures_keep_their_kind(engine: str, status: int, code: str | None, kind: str) -> None:
    with Provider(fault=lambda call: Fault("status", status=status, code=code)) as provider:
        lm = metered(lm_on(provider, engine, num_retries=3), ledger=Ledger(), worker="a", prices=PRICE)
        with pytest.raises(dspy.LMError) as caught:
            lm("question")
    assert classify(caught.value) == kind
    assert provider.attempts == 1


def test_an_answer_that_the_content_filter_emptied_is_the_examples_failure() -> None:
    class Filtered:
        def complete(self, request: Any) -> Response:
            message = Message.assistant([TextPart("")])
            usage = Usage(input_tokens=7, output_tokens=0)
            return Response(id="1", model="m", message=message, finish_reason="content_filter", usage=usage)

    ledger = Ledger()
    lm = metered(dspy.LM("mine/m", engine=Filtered(), cache=False), ledger=ledger, worker="a")
    with pytest.raises(dspy.LMError) as caught:
        lm("question")
    assert classify(caught.value) is FailureKind.EXAMPLE
    assert (ledger.line("a").answers, ledger.line("a").prompt_tokens) == (1, 7)


# -- the same LM otherwise


@both_engines
def test_history_usage_and_callbacks_happen_once(engine: str) -> None:
    class Listener(BaseCallback):
        def __init__(self) -> None:
            self.started = 0

        def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
            self.started += 1

    mine, everyones = Listener(), Listener()
    with Provider() as provider:
        plain = lm_on(provider, engine, callbacks=[mine])
        lm = metered(plain, ledger=Ledger(), worker="a", prices=PRICE)
        with dspy.context(callbacks=[everyones]), dspy.track_usage() as tracker:
            asyncio.run(lm.acall("question"))
            lm("question")
    assert (mine.started, everyones.started) == (2, 2)
    assert len(lm.history) == 2
    assert plain.history == []
    assert tracker.get_total_tokens()["openai/m"]["total_tokens"] == provider.tokens


@both_engines
def test_sampling_and_schemas_reach_the_provider_as_without_metering(engine: str) -> None:
    class Sort(dspy.Signature):
        """Sort the message."""

        message: str = dspy.InputField()
        label: Literal["yes", "no"] = dspy.OutputField()

    def bodies(is_metered: bool) -> list[Any]:
        with Provider(lambda messages: '{"label": "yes"}') as provider:
            lm = lm_on(provider, engine, model="openai/gpt-4o-mini", temperature=0.3, top_p=0.5)
            plain_can = (lm.supports_response_schema, lm.supports_function_calling, lm.supported_params)
            if is_metered:
                lm = metered(lm, ledger=Ledger(), worker="a")
            can = (lm.supports_response_schema, lm.supports_function_calling, lm.supported_params)
            assert can == plain_can
            with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
                assert dspy.Predict(Sort)(message="hello").label == "yes"
            return [call.body for call in provider.calls]

    (with_meter,), (without,) = bodies(True), bodies(False)
    assert with_meter == without
    assert with_meter["response_format"]["type"] == "json_schema"
    assert {with_meter.get("max_tokens"), with_meter.get("max_completion_tokens")} == {50, None}


@both_engines
def test_dollars_from_the_table_are_those_of_dspys_history(engine: str) -> None:
    with Provider(lambda messages: "yes no") as provider:
        plain = lm_on(provider, engine, model="openai/gpt-4o-mini")
        plain("a question")
        ledger = Ledger(Budget(dollars=0.01))
        metered(plain, ledger=ledger, worker="a")("a question")
    assert plain.history[0]["cost"] > 0
    assert float(ledger.line("a").dollars) == pytest.approx(plain.history[0]["cost"], abs=1e-12)
    assert ledger.line("a").unpriced == 0


def test_cache_hits_are_counted_and_cost_nothing() -> None:
    with Provider() as provider:
        ledger = Ledger()
        settings = {"cache": True, "model": "openai/cached"}
        lm = metered(lm_on(provider, "auto", **settings), ledger=ledger, worker="a", prices=PRICE)
        lm("the same question")
        lm("the same question")
        asyncio.run(call_many(lm, 2, 1, prompt=lambda number: "the same question, awaited"))
    line = ledger.line("a")
    assert (provider.attempts, line.attempts, line.cache_hits) == (2, 2, 2)


def test_the_line_is_the_callers_where_no_worker_is_named() -> None:
    ledger = Ledger()
    lm = metered(scripted_lm(lambda messages: "ok"), ledger=ledger)
    with calling_as("eu"):
        lm("one")
        asyncio.run(lm.acall("two"))
    lm("three")
    assert {name: line.attempts for name, line in ledger.lines().items()} == {"eu": 2, "": 1}


def test_observers_see_every_attempt() -> None:
    seen: list[Attempt] = []
    with Provider(
        fault=lambda call: (Fault("status", status=500), Fault("cut"), Fault())[call.number]
    ) as provider:
        ledger = Ledger(on_attempt=seen.append)
        lm = metered(lm_on(provider, "auto", num_retries=2), ledger=ledger, worker="a", prices=PRICE)
        lm("question")
    assert [one.fate for one in seen] == [Fate.REFUSED, Fate.CUT, None]
    assert seen[2].charge.tokens == provider.calls[2].tokens


def test_any_kind_of_lm_can_be_metered() -> None:
    ledger = Ledger(Budget(lm_calls=3))
    dummy = metered(DummyLM([{"answer": "red"}, {"answer": "blue"}]), ledger=ledger, worker="dummy")
    with dspy.context(lm=dummy):
        assert dspy.Predict("q -> answer")(q="?").answer == "red"
    scripted = metered(scripted_lm(lambda messages: "hello"), ledger=ledger, worker="scripted")
    assert scripted("?") == ["hello"]
    assert asyncio.run(scripted.acall("?")) == ["hello"]
    with pytest.raises(dspy.LMError):
        scripted("?")
    assert {name: line.attempts for name, line in ledger.lines().items()} == {"dummy": 1, "scripted": 2}


def test_metered_keeps_the_async_engine() -> None:
    """Reads the one private name of DSPy that this package relies on; see ``attempts._engines_of``."""
    lm = scripted_lm(lambda messages: "ok")
    assert lm._async_engine_spec is not None
    assert lm.copy(engine=lm.engine)._async_engine_spec is None


def test_metering_twice_counts_once() -> None:
    ledger = Ledger()
    lm = metered(scripted_lm(lambda messages: "ok"), ledger=ledger, worker="a")
    assert metered(lm, ledger=ledger, worker="b") is lm


def test_a_deep_copied_program_shares_the_ledger() -> None:
    ledger = Ledger()
    program = dspy.Predict("q -> answer")
    program.lm = metered(scripted_lm(lambda messages: "[[ ## answer ## ]]\nred"), ledger=ledger, worker="a")
    program.deepcopy()(q="?")
    assert ledger.line("a").attempts == 1


def test_a_refused_call_ends_a_rollout_as_what_it_is() -> None:
    """Neither a score of zero nor a missing run; and the adapters do not ask again in another format."""
    ledger = Ledger(Budget(lm_calls=1))
    asked: list[Any] = []

    def script(messages: Any) -> str:
        asked.append(messages)
        return "[[ ## answer ## ]]\nred"

    lm = metered(scripted_lm(script), ledger=ledger, worker="a")
    example = dspy.Example(q="?", answer="red").with_inputs("q")
    runner = RolloutRunner(lambda gold, pred: gold.answer == pred.answer)

    async def run() -> None:
        assert (await runner.run(dspy.Predict("q -> answer"), example, lm=lm)).score == 1.0
        with pytest.raises(BudgetExceededError, match="1 LM calls of 1 LM calls are spent"):
            await runner.run(dspy.Predict("q -> answer"), example, lm=lm)

    asyncio.run(run())
    runner.close()
    assert len(asked) == 1


# -- refusals before any call


@pytest.mark.parametrize(
    ("budget", "settings", "more", "says"),
    [
        (Budget(tokens=10), {"max_tokens": None}, {}, "has no max_tokens, so no cap on tokens or dollars"),
        (Budget(dollars=1), {"max_tokens": None}, {"prices": PRICE}, "has no max_tokens"),
        (Budget(dollars=1), {}, {}, "has no known price, so the cap of 1 dollars cannot be kept"),
        (None, {}, {"max_concurrency": 0}, "max_concurrency=0 must be at least 1"),
        (None, {}, {"requests_per_minute": -1}, "requests_per_minute=-1 must be > 0"),
        (None, {"model_type": "text"}, {}, "model_type='text'"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    budget: Budget | None, settings: dict[str, Any], more: dict[str, Any], says: str
) -> None:
    lm = dspy.LM("openai/no-such-model", **{"max_tokens": 50, "api_key": "k", **settings})
    with pytest.raises(ConfigurationError, match=says):
        metered(lm, ledger=Ledger(budget), worker="a", **more)


def test_an_unknown_price_is_counted_of_answers_and_of_what_was_cut() -> None:
    fates = [Fault(), Fault(kind="status", status=400), Fault(kind="cut")]
    with Provider(fault=lambda call: fates[call.number - 1]) as provider:
        ledger = Ledger()
        lm = metered(lm_on(provider, "auto"), ledger=ledger, worker="eu")
        for _ in fates:
            with contextlib.suppress(dspy.LMError):
                lm("question")
    line = ledger.line("eu")
    assert (line.answers, line.refused, line.cut, line.unpriced) == (1, 1, 1, 2)


class WithoutUsage(Provider):
    """Says of no answer what it took."""

    def _reply(self, call: Any, body: dict[str, Any]) -> bytes:
        found = json.loads(super()._reply(call, body))
        del found["usage"]
        return json.dumps(found).encode()


@both_engines
@pytest.mark.parametrize("budget", [None, Budget(lm_calls=5), Budget(tokens=9000), Budget(dollars=0.01)])
def test_an_answer_without_usage_is_estimated_and_taken_at_its_most_under_a_cap_on_tokens_or_dollars(
    engine: str, budget: Budget | None
) -> None:
    with WithoutUsage(lambda messages: "yes " * 20) as provider:
        ledger = Ledger(budget)
        told: list[Attempt] = []
        ledger.on_attempt = told.append
        metered(lm_on(provider, engine), ledger=ledger, worker="a", prices=PRICE)("word " * 100)
    line = ledger.line("a")
    assert (line.answers, line.unmeasured, line.cut, line.cut_tokens) == (1, 1, 0, 0)
    assert not told[0].is_measured
    assert line.dollars == PRICE.dollars(line.prompt_tokens, line.completion_tokens) > 0
    if ledger.needs_bounds():
        assert (line.prompt_tokens >= 500, line.completion_tokens) == (True, 50)
    else:
        assert (100 <= line.prompt_tokens <= 150, 15 <= line.completion_tokens <= 30) == (True, True)
    assert ledger.spent.tokens == line.tokens
    assert ledger.spent.overruns == 0


@pytest.mark.parametrize("price", [-1, float("nan"), float("inf"), True, "free"])
def test_a_price_is_a_number_of_dollars(price: Any) -> None:
    with pytest.raises(ConfigurationError, match="dollars per million tokens"):
        Price(price, 1)


def test_the_ledger_survives_a_restart() -> None:
    ledger = Ledger(Budget(lm_calls=3))
    lm = metered(scripted_lm(lambda messages: "ok"), ledger=ledger, worker="a")
    lm("?")
    lm("?")
    later = Ledger(Budget(lm_calls=3))
    later.restore(ledger.to_dict())
    again = metered(scripted_lm(lambda messages: "ok"), ledger=later, worker="a")
    again("?")
    with pytest.raises(dspy.LMError):
        again("?")
    assert later.line("a").attempts == 3
