"""The engine behind `dspy.LM`, on a tiny random model: answers, batching, failures, lifetime."""

from __future__ import annotations

import asyncio
import atexit
import copy
import gc
import json
import math
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Literal

import dspy
import numpy as np
import pytest
import torch
from dspy.lm15 import Config, InvalidRequestError, Message, NotConfiguredError, Request, ServerError
from dspy.utils.exceptions import ContextWindowExceededError, LMServerError, is_retryable_lm_error
from local_tiny import byte_tokenizer, scheduler_of, tiny_lm, tiny_model

from asyndbt_dspy.lms.callers import calling_as
from asyndbt_dspy.lms.distributions import collect, of_response
from asyndbt_dspy.lms.local.fused_decoder import FusedDecoder

# "ab" begins "abc", "abc" and "abd" share two letters, "xyz" stands alone.
LABELS = ("ab", "abc", "abd", "xyz")


class Classify(dspy.Signature):
    """Choose a label."""

    question: str = dspy.InputField()
    label: Literal["ab", "abc", "abd", "xyz"] = dspy.OutputField()


class Mixed(dspy.Signature):
    """Choose and explain."""

    question: str = dspy.InputField()
    reason: str = dspy.OutputField()
    label: Literal["ab", "abc", "abd", "xyz"] = dspy.OutputField()
    words: list[str] = dspy.OutputField()
    score: int = dspy.OutputField()
    flag: bool = dspy.OutputField()


@pytest.fixture
def lm() -> Iterator[dspy.LM]:
    made = tiny_lm()
    with dspy.context(lm=made, adapter=dspy.JSONAdapter()):
        yield made
    made.engine.close()


def enum_format(labels: tuple[str, ...] = LABELS) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "schema": {
            "type": "object",
            "properties": {"label": {"type": "string", "enum": list(labels)}},
            "required": ["label"],
            "additionalProperties": False,
        },
    }


def request(text: str, **config: Any) -> Request:
    return Request(model="local/tiny", messages=(Message.user(text),), config=Config(**config))


def rollouts(lm: dspy.LM, questions: list[str], in_flight: int) -> list[tuple[str, dict[str, float]]]:
    program = dspy.Predict(Classify)
    program.demos = [dspy.Example(question="one?", label="abc"), dspy.Example(question="two?", label="xyz")]

    def one(question: str) -> tuple[str, dict[str, float]]:
        with collect() as records:
            label = program(question=question).label
        return label, records[0].probabilities

    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()), ThreadPoolExecutor(in_flight) as pool:
        futures = [pool.submit(copy_context().run, one, question) for question in questions]
        return [future.result() for future in futures]


def test_the_distribution_is_the_product_over_the_tokens_of_each_label() -> None:
    model = tiny_model()
    lm = tiny_lm(model=tiny_model())
    response = lm(request("Which?", response_format=enum_format()))
    lm.engine.close()
    tokenizer = byte_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which?"}], tokenize=False, add_generation_prompt=True
    )
    head = tokenizer(prompt + '{"label": "', add_special_tokens=False).input_ids
    sums = []
    for label in LABELS:
        # "ab" begins other labels: it is told apart by the quotation mark that ends it.
        run = tokenizer(label + ('"' if label in ("ab",) else ""), add_special_tokens=False).input_ids
        with torch.inference_mode():
            scores = model(torch.tensor([head + run])).logits[0].log_softmax(-1)
        sums.append(sum(float(scores[len(head) - 1 + i, token]) for i, token in enumerate(run)))
    weights = np.exp(np.array(sums) - max(sums))
    expected = dict(zip(LABELS, weights / weights.sum(), strict=True))
    measured = of_response(response)["label"]
    assert measured == pytest.approx(expected, abs=1e-5)
    assert json.loads(response.text) == {"label": max(expected, key=expected.__getitem__)}


def test_batched_and_cached_answers_equal_one_at_a_time() -> None:
    questions = [f"question {index} {'long ' * (index % 7)}?" for index in range(40)]
    alone = tiny_lm(prefix_cache_tokens=0)
    together = tiny_lm(max_batch_tokens=900)
    transformers_path = tiny_lm(fused=False)
    expected = rollouts(alone, questions, 1)
    for lm in (together, transformers_path):
        for (label, probabilities), (right, exact) in zip(rollouts(lm, questions, 16), expected, strict=True):
            assert label == right
            assert probabilities == pytest.approx(exact, abs=1e-4)
    spread = [exact["xyz"] for _, exact in expected]
    assert max(spread) - min(spread) > 0.01, "the tiny model must not answer all questions alike"
    assert scheduler_of(together).passes < 40
    for lm in (alone, together, transformers_path):
        lm.engine.close()


def test_free_and_enumerated_fields_always_parse_and_are_all_reported(lm: dspy.LM) -> None:
    for seed in range(6):
        with collect() as records:
            answer = dspy.Predict(Mixed)(
                question="why?", config={"max_tokens": 90, "temperature": 1.0, "seed": seed}
            )
        assert isinstance(answer.reason, str)
        assert answer.label in LABELS
        assert isinstance(answer.score, int)
        assert [record.field_path for record in records] == ["label", "flag"]
        assert sum(records[0].probabilities.values()) == pytest.approx(1.0)
        assert set(records[1].probabilities) == {"true", "false"}


def test_free_answers_in_a_batch_equal_those_alone() -> None:
    def ask(lm: dspy.LM, in_flight: int) -> list[str]:
        requests = [
            request(f"say {i}", max_tokens=12 + i, temperature=float(i % 2), seed=i) for i in range(12)
        ]
        with ThreadPoolExecutor(in_flight) as pool:
            return [response.text for response in pool.map(lm, requests)]

    alone, together = tiny_lm(prefix_cache_tokens=0), tiny_lm()
    assert ask(together, 12) == ask(alone, 1)
    alone.engine.close()
    together.engine.close()


def test_a_demo_list_that_grows_shares_what_is_before_it(lm: dspy.LM) -> None:
    program = dspy.Predict(Classify)
    program.demos = [dspy.Example(question=f"number {i}?", label="xyz") for i in range(3)]
    program(question="first?")
    first_turns = lm.history[-1]["usage"]["prompt_tokens"]
    program.demos = [*program.demos, dspy.Example(question="number 3?", label="ab")]
    program(question="second?")
    shared = lm.history[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    # All but the first request's last turn, which ends in the instructions for the answer.
    assert first_turns - 300 < shared < first_turns


def test_answers_stay_right_when_the_cache_is_tiny() -> None:
    tiny = tiny_lm(prefix_cache_tokens=40, max_batch_tokens=64)
    large = tiny_lm()
    questions = [f"{letter} question {index}?" for index in range(6) for letter in "abc"]
    for (label, probabilities), (right, exact) in zip(
        rollouts(tiny, questions, 4), rollouts(large, questions, 4), strict=True
    ):
        assert label == right
        assert probabilities == pytest.approx(exact, abs=1e-4)
    assert scheduler_of(tiny).cache.tokens <= 40
    assert scheduler_of(large).cache.tokens > 40
    tiny.engine.close()
    large.engine.close()


def test_two_hundred_requests_at_once(lm: dspy.LM) -> None:
    async def ask_all() -> list[Any]:
        calls = [
            lm.acall(
                request(f"number {i}", **({"max_tokens": 4} if i % 3 else {"response_format": enum_format()}))
            )
            for i in range(200)
        ]
        return await asyncio.gather(*calls)

    responses = asyncio.run(ask_all())
    assert len(responses) == 200
    assert all((response.usage.output_tokens <= 4) or of_response(response) for response in responses)
    scheduler = scheduler_of(lm)
    assert not scheduler._running
    assert not scheduler._slots.lengths
    assert all(node.pins == 0 for node in scheduler.cache.nodes())


class GatedDecoder(FusedDecoder):
    """A decoder whose passes wait for the test."""

    def __init__(self) -> None:
        super().__init__(tiny_model())
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.rows: list[int] = []

    def run(self, layout: Any, attention: Any) -> Any:
        self.entered.release()
        assert self.gate.acquire(timeout=60)
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        self.rows.append(len(layout.wanted_rows))
        return super().run(layout, attention)


def test_cancellation_in_mid_generation_frees_the_place() -> None:
    decoder = GatedDecoder()
    lm = tiny_lm(decoder=decoder)

    async def scenario() -> None:
        doomed = asyncio.create_task(lm.acall(request("long", max_tokens=500)))
        await asyncio.to_thread(decoder.entered.acquire)
        decoder.gate.release()
        await asyncio.to_thread(decoder.entered.acquire)
        assert len(scheduler_of(lm)._slots.lengths) == 1
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        follower = asyncio.create_task(lm.acall(request("short", max_tokens=2)))
        decoder.gate.release(100)
        assert (await follower).usage.output_tokens <= 2

    asyncio.run(scenario())
    assert not scheduler_of(lm)._slots.lengths
    assert len(decoder.rows) <= 5, "the cancelled request must not go on generating"
    lm.engine.close()


def test_new_requests_join_a_running_generation() -> None:
    decoder = GatedDecoder()
    lm = tiny_lm(decoder=decoder)
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(lm, request("long", max_tokens=40, temperature=0.0))
        decoder.entered.acquire()
        decoder.gate.release()
        decoder.entered.acquire()
        short = pool.submit(lm, request("short", response_format=enum_format()))
        while not scheduler_of(lm)._arrived:
            threading.Event().wait(0.001)
        decoder.gate.release(2)
        assert of_response(short.result(timeout=60))
        assert not long.done()
        decoder.gate.release(1000)
        long.result(timeout=60)
    assert max(decoder.rows) > 1
    lm.engine.close()


def test_a_bad_schema_fails_alone(lm: dspy.LM) -> None:
    bad = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "nonsense"}}}}
    with ThreadPoolExecutor(8) as pool:
        good = [
            pool.submit(lm.engine.complete, request(f"{i}", response_format=enum_format())) for i in range(8)
        ]
        broken = pool.submit(lm.engine.complete, request("bad", response_format=bad))
        with pytest.raises(InvalidRequestError, match="nonsense"):
            broken.result()
        assert all(of_response(future.result()) for future in good)


def test_an_answer_that_fails_takes_no_other_with_it(lm: dspy.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = lm.engine.core.prepare

    def sabotage(each: Request) -> Any:
        job, future = prepare(each)
        if each.messages[0].text == "bad":
            monkeypatch.setattr(job.answer, "take_chosen", lambda token: 1 / 0)
        return job, future

    monkeypatch.setattr(lm.engine.core, "prepare", sabotage)
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(lm.engine.complete, request(text, max_tokens=5)) for text in ("a", "bad", "c", "d")
        ]
        with pytest.raises(ServerError, match="ZeroDivisionError"):
            futures[1].result()
        assert all(futures[index].result().text is not None for index in (0, 2, 3))
    assert not scheduler_of(lm)._slots.lengths


def test_a_dead_thread_fails_all_who_wait_and_the_next_request_restarts_it() -> None:
    decoder = GatedDecoder()
    lm = tiny_lm(decoder=decoder, num_retries=0)
    decoder.failure = MemoryError("no memory")
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(lm, request(f"{i}", max_tokens=3)) for i in range(4)]
        decoder.entered.acquire()
        scheduler = scheduler_of(lm)
        while len(scheduler._running) + len(scheduler._arrived) < 4:
            threading.Event().wait(0.001)
        thread = scheduler._thread
        decoder.gate.release()
        for future in futures:
            with pytest.raises(LMServerError, match="no memory"):
                future.result(timeout=60)
    thread.join(timeout=60)
    assert not thread.is_alive()
    decoder.gate.release(100)
    assert lm(request("again", max_tokens=3)).usage.output_tokens <= 3
    assert scheduler._thread is not thread
    lm.engine.close()


def test_callers_take_turns() -> None:
    decoder = GatedDecoder()
    lm = tiny_lm(decoder=decoder, max_batch_tokens=64)
    order: list[str] = []

    def ask(caller: str, index: int) -> None:
        with calling_as(caller):
            lm(request(f"{caller} {index}", response_format=enum_format()))
            order.append(caller)

    with ThreadPoolExecutor(10) as pool:
        first = pool.submit(ask, "greedy", 0)
        decoder.entered.acquire()
        futures = [pool.submit(ask, "greedy", index) for index in range(1, 8)]
        while len(scheduler_of(lm)._arrived) < 7:
            threading.Event().wait(0.001)
        futures.append(pool.submit(ask, "modest", 0))
        while len(scheduler_of(lm)._arrived) < 8:
            threading.Event().wait(0.001)
        decoder.gate.release(1000)
        for future in [first, *futures]:
            future.result(timeout=60)
    assert order.index("modest") <= 3
    lm.engine.close()


def test_a_prompt_over_the_context_names_both_lengths() -> None:
    lm = tiny_lm(model=tiny_model(context=64))
    with pytest.raises(ContextWindowExceededError, match=r"\d{3} tokens.* at most 64 "):
        lm(request("word " * 60))
    responses = [lm(request("short", max_tokens=500, temperature=1.0, seed=seed)) for seed in range(6)]
    assert all(response.usage.total_tokens <= 64 for response in responses)
    assert any(response.finish_reason == "length" for response in responses)
    lm.engine.close()


def test_length_stop_and_usage(lm: dspy.LM) -> None:
    response = lm(request("hello", max_tokens=7))
    assert response.finish_reason in ("length", "stop")
    assert response.usage.output_tokens <= 7
    assert response.usage.input_tokens == len(
        byte_tokenizer().apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True
        )["input_ids"]
    )
    long = lm(request("hello", max_tokens=30, temperature=1.5, seed=1)).text
    stop = long[3:5]
    cut = lm(request("hello", max_tokens=30, temperature=1.5, seed=1, stop=(stop,)))
    assert cut.text == long[: long.index(stop)]
    assert cut.finish_reason == "stop"


def test_seed_decides_a_sampled_answer(lm: dspy.LM) -> None:
    texts = [lm(request("go", max_tokens=20, temperature=1.5, seed=seed)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    labels = {
        json.loads(lm(request("go", temperature=2.0, seed=seed, response_format=enum_format())).text)["label"]
        for seed in range(60)
    }
    assert len(labels) > 1


def test_log_probabilities_and_probabilities_travel_as_dspy_defines_them(lm: dspy.LM) -> None:
    response = lm(request("Which?", response_format=enum_format(), probabilities="required", logprobs=4))
    assert response.probabilities == of_response(response)
    assert response.method == "candidate_sequence_likelihood"
    (entry,) = response.logprobs
    assert entry.token == response.data["label"]
    assert {top.token: math.exp(top.logprob) for top in entry.top} == pytest.approx(
        response.probabilities["label"]
    )
    text = lm(request("go", max_tokens=3, logprobs=2))
    assert all(
        len(entry.top) == 2 and entry.top[0].logprob >= entry.top[1].logprob for entry in text.logprobs
    )


def test_distributions_reach_the_caller_through_sync_async_and_threads(lm: dspy.LM) -> None:
    program = dspy.Predict(Classify)
    with collect() as records:
        program(question="one?")
        asyncio.run(program.acall(question="two?"))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(copy_context().run, program, question="three?").result()
        with collect() as inner:
            program(question="four?")
    assert [record.field_path for record in records] == ["label"] * 3
    assert len(inner) == 1


def test_an_answer_from_dspys_cache_still_carries_its_distribution(tmp_path: Any) -> None:
    lm = tiny_lm()
    lm.cache = True
    before = dspy.cache
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        with dspy.context(lm=lm, adapter=dspy.JSONAdapter()), collect() as records:
            for _ in range(2):
                dspy.Predict(Classify)(question="cached?")
        assert len(records) == 1
        assert of_response(lm.history[-1]["response"])["label"] == pytest.approx(records[0].probabilities)
    finally:
        dspy.cache = before
        lm.engine.close()


def test_copies_share_the_engine_and_closing_ends_it(lm: dspy.LM) -> None:
    program = dspy.Predict(Classify)
    program.lm = lm
    copied = copy.deepcopy(program)
    assert copied.lm.engine is lm.engine
    assert lm.copy(temperature=0.5).engine is lm.engine
    lm.engine.close()
    with pytest.raises(NotConfiguredError, match="closed"):
        lm.engine.complete(request("late"))
    # To try again would not help: the error reaches the caller at once.
    with pytest.raises(dspy.LMNotConfiguredError, match="closed") as caught:
        lm(request("late"))
    assert not is_retryable_lm_error(caught.value)


def test_the_weights_go_when_the_lm_goes() -> None:
    lm = tiny_lm()
    lm(request("hello", max_tokens=2))
    scheduler = scheduler_of(lm)
    decoder, thread = weakref.ref(scheduler._decoder), scheduler._thread
    del lm, scheduler
    gc.collect()
    thread.join(timeout=60)
    del thread
    gc.collect()
    assert decoder() is None


def test_the_interpreter_waits_until_the_weights_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An LM that nobody holds any more as the process ends: its thread is the last one to hold the weights."""
    begun, may_end, over = threading.Event(), threading.Event(), threading.Event()
    at_exit: list[Any] = []

    class Weights:
        def __del__(self) -> None:
            begun.set()
            may_end.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(atexit, "register", lambda *call: at_exit.append(call))
        lm = tiny_lm()
        lm(request("hello", max_tokens=2))
    scheduler_of(lm)._decoder.weights = Weights()
    del lm
    gc.collect()
    assert begun.wait(60)

    def end() -> None:
        for function, *arguments in at_exit:
            function(*arguments)
        over.set()

    thread = threading.Thread(target=end)
    thread.start()
    assert not over.wait(0.2)
    may_end.set()
    thread.join(60)
    assert over.is_set()
