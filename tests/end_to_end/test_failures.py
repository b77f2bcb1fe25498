"""A failing program, a failing LM and a failing worker are told apart, and none of them ends the run."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import dspy
import kit
import pytest

from asyndbt_dspy import AsynDBT, Budget, ConfigurationError, NoLiveWorkersError, Worker
from asyndbt_dspy.core.messages import Scored, StepReply
from asyndbt_dspy.engines.simulated import SimulatedEngine

TRAIN = kit.examples(60)
UNREACHABLE = {
    "rate limit": dspy.lm15.RateLimitError,
    "server": dspy.lm15.ServerError,
    "timeout": TimeoutError,
    "connection": ConnectionResetError,
}


def failing(error: Callable[[str], Exception], when: Callable[[int], bool]) -> Callable[..., Any]:
    """The color script, failing on every call for which ``when`` (given the count of calls) holds."""
    count = iter(range(10**9))

    def script(messages: list[dict[str, str]]) -> Any:
        if when(next(count)):
            raise error("no answer")
        return kit.stairs(1)(messages)

    return script


def magic(**options: Any) -> tuple[AsynDBT, dspy.Module]:
    student = dspy.Predict(kit.Sort)
    options = {"mode": "instructions", "instructions": kit.texts_for(student, kit.MAGIC), **options}
    return kit.optimizer(**options), student


def outcomes(optimizer: AsynDBT) -> list[Any]:
    return [
        outcome
        for one in optimizer.recorded
        if isinstance(one.event, Scored)
        for row in one.event.outcomes
        for outcome in row
    ]


def test_an_exception_of_the_program_is_the_failure_score() -> None:
    class Fragile(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sort = dspy.Predict(kit.Sort)

        async def aforward(self, message: str) -> dspy.Prediction:
            found = await self.sort.acall(message=message)
            if found.label == "red" and not message.endswith("0"):
                raise RuntimeError("red is refused")
            return found

    student = Fragile()
    optimizer = kit.optimizer(
        failure_score=-1.0, mode="instructions", instructions=kit.texts_for(student, kit.MAGIC)
    )
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(student, trainset=kit.examples(60))
    scores = {one.score for one in outcomes(optimizer)}
    assert -1.0 in scores
    assert None not in scores
    failed = sum(one.failed for one in optimizer.result.workers)
    assert failed > 0
    assert sum(one.missing for one in optimizer.result.workers) == 0
    assert optimizer.result.candidates[0].score < 0


def test_an_answer_that_cannot_be_read_is_a_failure_of_the_program() -> None:
    optimizer, student = magic()

    def script(messages: list[dict[str, str]]) -> str:
        return kit.stairs(1)(messages) if kit.MAGIC in messages[0]["content"] else "I cannot say."

    with dspy.context(lm=kit.make_lm(script)):
        program = optimizer.compile(student, trainset=TRAIN)
    assert program.signature.instructions == kit.MAGIC
    assert optimizer.result.candidates[0].score == 0.0
    assert sum(one.failed for one in optimizer.result.workers) > 0


@pytest.mark.parametrize("kind", UNREACHABLE)
def test_an_lm_that_cannot_be_reached_is_missing_and_never_zero(kind: str) -> None:
    optimizer, student = magic()
    student.signature = student.signature.with_instructions(
        kit.MAGIC + " Always."
    )  # every answer that comes is right
    lm = kit.make_lm(failing(UNREACHABLE[kind], lambda count: count % 3 == 1))
    with dspy.context(lm=lm):
        optimizer.compile(student, trainset=TRAIN)
    scores = [one.score for one in outcomes(optimizer)]
    assert scores.count(None) > 5
    assert set(scores) == {None, 1.0}
    assert all(one.score in (None, 1.0) for one in optimizer.result.candidates)
    assert sum(one.missing for one in optimizer.result.workers) > 5
    assert not any(one.set_aside for one in optimizer.result.workers)
    assert all(record.loss in (None, 0.0) for record in optimizer.result.curve)


def test_missing_as_zero_is_a_switch_that_lowers_the_scores() -> None:
    """The control of the test above."""
    optimizer, student = magic(config={"missing_is_zero": True})
    with dspy.context(lm=kit.make_lm(failing(dspy.lm15.RateLimitError, lambda count: count % 3 == 1))):
        optimizer.compile(student, trainset=TRAIN)
    assert max(record.loss for record in optimizer.result.curve) > 0.3
    assert not any(record.loss is None for record in optimizer.result.curve)


def test_what_a_candidate_shows_is_skipped_and_counts_as_no_failure() -> None:
    """Shards so small that demos are examples of the estimates too."""
    workers = [
        Worker(name, kit.examples(11, start), valset=kit.examples(9, start + 50))
        for name, start in (("a", 0), ("b", 100))
    ]
    optimizer = kit.optimizer(mode="demos", workers=workers, config={"missing_is_zero": True})
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(dspy.Predict(kit.Sort))
    assert any(one.skipped for one in outcomes(optimizer))
    replies = [one.event for one in optimizer.recorded if isinstance(one.event, StepReply)]
    assert replies
    assert not any(one.missing for one in replies)


@pytest.mark.parametrize("error", [dspy.lm15.RateLimitError, dspy.lm15.AuthError])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_worker_whose_lm_always_fails_is_set_aside(
    error: type[Exception], deterministic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broken = kit.make_lm(failing(error, lambda count: True), "broken")
    workers = [
        Worker("good", kit.examples(36)),
        Worker("bad", kit.examples(36, start=36), lm=broken),
        Worker("fine", kit.examples(36, start=72)),
    ]
    optimizer, student = magic(workers=workers, deterministic=deterministic)
    with dspy.context(lm=kit.color_lm()), caplog.at_level(logging.WARNING):
        program = optimizer.compile(student)
    assert program.signature.instructions == kit.MAGIC
    good, bad, fine = optimizer.result.workers
    assert error.__name__ in bad.set_aside
    assert bad.calls == 0
    assert good.calls > 10
    assert fine.calls > 10
    assert not good.set_aside
    warned = [one.getMessage() for one in caplog.records if "'bad' is set aside" in one.getMessage()]
    assert len(warned) == 1
    limit = 8 if error is dspy.lm15.RateLimitError else 3
    assert kit.calls_of(broken) <= limit + 8, "a few, and what was in flight with them"


def test_a_worker_that_fails_during_the_race_is_set_aside_and_the_others_decide() -> None:
    calls: list[int] = []

    def in_race(messages: list[dict[str, str]]) -> Any:
        calls.append(1)
        if kit.number_in(messages) >= 500:
            raise dspy.lm15.ServerError("down")
        return kit.stairs(1)(messages)

    workers = [
        Worker("a", kit.examples(36), valset=kit.examples(12, start=500), lm=kit.make_lm(in_race)),
        Worker("b", kit.examples(36, start=36), valset=kit.examples(12, start=600)),
    ]
    optimizer, student = magic(workers=workers)
    with dspy.context(lm=kit.color_lm()):
        program = optimizer.compile(student)
    assert optimizer.result.workers[0].set_aside
    assert not optimizer.result.workers[1].set_aside
    assert program.signature.instructions == kit.MAGIC
    assert optimizer.result.candidates[0].examples <= 12


@pytest.mark.parametrize("deterministic", [True, False])
def test_race_examples_of_a_dead_worker_are_run_by_those_that_share_them(deterministic: bool) -> None:
    raced: list[int] = []

    def answering(messages: list[dict[str, str]]) -> Any:
        raced.extend(one for one in [kit.number_in(messages)] if one >= 500)
        return kit.stairs(1)(messages)

    def dead_in_race(messages: list[dict[str, str]]) -> Any:
        if kit.number_in(messages) >= 500:
            raise dspy.lm15.ServerError("down")
        return kit.stairs(1)(messages)

    workers = [
        Worker("a", kit.examples(36), lm=kit.make_lm(dead_in_race)),
        Worker("b", kit.examples(36, start=36), lm=kit.make_lm(answering)),
    ]
    optimizer, student = magic(workers=workers, deterministic=deterministic)
    program = optimizer.compile(student, valset=kit.examples(12, start=500))
    assert optimizer.result.workers[0].set_aside
    left_out = set(range(500, 512)) - set(raced)
    # The common valset belongs to nobody, so none of it is lost; but a free run may close its last heat at three quarters.
    assert len(left_out) <= (0 if deterministic else 3)
    assert optimizer.result.candidates[0].examples == 12 - len(left_out)
    assert program.signature.instructions == kit.MAGIC


@pytest.mark.parametrize("deterministic", [True, False])
def test_when_all_workers_fail_the_best_program_so_far_is_handed_over(deterministic: bool) -> None:
    optimizer, student = magic(workers=2, deterministic=deterministic)
    lm = kit.make_lm(failing(dspy.lm15.ServerError, lambda count: True))
    with (
        dspy.context(lm=lm),
        pytest.raises(NoLiveWorkersError, match="all 2 workers were set aside") as caught,
    ):
        optimizer.compile(student, trainset=TRAIN)
    assert "LMServerError: [scripted/scripted] no answer" in str(caught.value)
    assert "`best_program`" in str(caught.value)
    assert kit.state_of(caught.value.best_program) == kit.state_of(student)
    assert optimizer.result is not None
    assert all(one.set_aside for one in optimizer.result.workers)


def test_why_all_workers_were_set_aside_is_said_where_no_lm_failed() -> None:
    engine = SimulatedEngine(lambda request: 5.0, answer_timeout_s=1.0)
    optimizer, student = magic(workers=2, engine=engine)
    with dspy.context(lm=kit.color_lm()), pytest.raises(NoLiveWorkersError) as caught:
        optimizer.compile(student, trainset=TRAIN)
    assert "set aside: worker-1, worker-2: no answer within 1 s;" in str(caught.value)


def test_when_all_workers_fail_late_the_leader_of_the_race_is_handed_over() -> None:
    raced: list[int] = []

    def script(messages: list[dict[str, str]]) -> Any:
        if kit.number_in(messages) >= 500:
            raced.append(1)
            if len(raced) > 70:
                raise dspy.lm15.ServerError("down")
        return kit.stairs(1)(messages)

    texts = {"self": [kit.MAGIC, "Guess.", "Hm.", "Red?", "Blue?"]}
    optimizer, student = magic(workers=2, budget=Budget(metric_calls=300), instructions=texts)
    with dspy.context(lm=kit.make_lm(script)), pytest.raises(NoLiveWorkersError) as caught:
        optimizer.compile(student, trainset=TRAIN, valset=kit.examples(40, start=500))
    assert caught.value.best_program.signature.instructions == kit.MAGIC


def test_without_an_lm_the_error_says_so() -> None:
    optimizer, student = magic()
    with pytest.raises(ConfigurationError, match=r"no LM for the predictors \['self'\]"):
        optimizer.compile(student, trainset=TRAIN)


def test_examples_that_the_lm_refuses_are_missing_and_end_nothing() -> None:
    def script(messages: list[dict[str, str]]) -> Any:
        if kit.number_in(messages) % 4 == 0:
            raise dspy.ContextWindowExceededError(message="too long", model="colors")
        return kit.stairs(1)(messages)

    optimizer, student = magic()
    lm = kit.make_lm(script)
    with dspy.context(lm=lm):
        program = optimizer.compile(student, trainset=TRAIN)
    assert program.signature.instructions == kit.MAGIC
    assert sum(one.missing for one in optimizer.result.workers) > 0
    assert kit.calls_of(lm) < 3 * 120, "refused examples are not asked for ever"


def test_a_shard_of_nothing_but_refused_examples_sets_its_worker_aside() -> None:
    def refuse(messages: list[dict[str, str]]) -> Any:
        raise dspy.ContextWindowExceededError(message="too long", model="colors")

    lm = kit.make_lm(refuse)
    workers = [Worker("a", kit.examples(36)), Worker("b", kit.examples(36, start=36), lm=lm)]
    optimizer, student = magic(workers=workers)
    with dspy.context(lm=kit.color_lm()):
        program = optimizer.compile(student)
    assert program.signature.instructions == kit.MAGIC
    assert "refused" in optimizer.result.workers[1].set_aside
    assert kit.calls_of(lm) <= 5 * 8 + 12


class HangingEngine(kit.TurnsEngine):
    """Never answers about items that are multiples of ``every``."""

    async def complete(self, request: Any) -> Any:
        found = kit.number_in([{"content": "".join(part.text for part in request.messages[-1].parts)}])
        if found % self.most == 0:
            await asyncio.Event().wait()
        return await self.inner.complete(request)


def hanging_lm(every: int) -> dspy.LM:
    recorder = kit.Recorder(kit.stairs(1))
    engine = HangingEngine(kit.AsyncScriptedEngine(recorder, True), 0, every)
    return dspy.LM(
        "scripted/hanging", engine=kit.ScriptedEngine(recorder, True), async_engine=engine, cache=False
    )


def test_a_hanging_lm_is_cut_by_the_rollout_timeout() -> None:
    optimizer, student = magic(rollout_timeout_s=1.5, budget=Budget(metric_calls=60))
    started = time.perf_counter()
    with dspy.context(lm=hanging_lm(9)):
        program = optimizer.compile(student, trainset=TRAIN)
    assert program.signature.instructions == kit.MAGIC
    assert sum(one.missing for one in optimizer.result.workers) > 0
    assert time.perf_counter() - started < 20
    assert all(math.isfinite(one.busy_s) for one in optimizer.result.workers)


def test_a_worker_that_always_hangs_is_set_aside() -> None:
    workers = [
        Worker("good", kit.examples(36)),
        Worker("stuck", kit.examples(36, start=36), lm=hanging_lm(1)),
    ]
    optimizer, student = magic(workers=workers, rollout_timeout_s=3.0, budget=Budget(metric_calls=60))
    with dspy.context(lm=kit.color_lm()):
        optimizer.compile(student)
    assert "no answer within 3 s" in optimizer.result.workers[1].set_aside
    assert optimizer.result.workers[0].calls > 20


class Tolerant(dspy.Module):
    """Answers something, whatever becomes of its call."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(kit.Sort)

    def forward(self, message: str) -> dspy.Prediction:
        try:
            return self.sort(message=message)
        except Exception:  # noqa: BLE001 - as programs do
            return dspy.Prediction(label="unknown")


def test_a_program_that_catches_what_the_budget_refuses_ends_like_any_other() -> None:
    lm = kit.color_lm()
    optimizer = AsynDBT(
        kit.metric,
        workers=2,
        budget=Budget(lm_calls=80),
        instructions={"sort": [kit.MAGIC]},
        progress=False,
    )
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        optimizer.compile(Tolerant(), trainset=kit.examples(60))
    assert "lm calls" in optimizer.result.stopped
    assert optimizer.result.metric_calls <= len(kit.requests_of(lm)) <= 80, "each score was paid for"
    assert optimizer.result.candidates[0].examples > 0, "raced with what was kept for it"


def test_a_compile_inside_of_a_program_spends_its_own_budget() -> None:
    inner_calls = []

    class Nested(dspy.Module):
        """Compiles a small program once, as a program with a cache of compiled parts does."""

        def __init__(self) -> None:
            super().__init__()
            self.sort = dspy.Predict(kit.Sort)

        def forward(self, message: str) -> dspy.Prediction:
            if not inner_calls:
                inner_calls.append(1)
                inner = kit.optimizer(budget=Budget(lm_calls=30), deterministic=False)
                inner.compile(dspy.Predict(kit.Sort), trainset=kit.examples(40, start=300))
            return self.sort(message=message)

    made = kit.optimizer(budget=Budget(metric_calls=80))
    with dspy.context(lm=kit.color_lm(), adapter=dspy.JSONAdapter()):
        made.compile(Nested(), trainset=kit.examples(72))
    assert inner_calls
    assert made.result.metric_calls > 60, made.result.stopped


@pytest.mark.parametrize(
    ("error", "options", "told"),
    [
        (dspy.lm15.RateLimitError, {}, 1),
        (dspy.lm15.RateLimitError, {"requests_per_minute": 1e6}, 0),
        (dspy.lm15.ServerError, {}, 0),
    ],
)
def test_who_is_refused_for_too_many_calls_is_told_what_holds_them_back(
    error: type[Exception], options: dict[str, Any], told: int, caplog: pytest.LogCaptureFixture
) -> None:
    lm = kit.make_lm(failing(error, lambda number: number in (4, 5)))
    optimizer, student = magic(budget=Budget(metric_calls=40), **options)
    with dspy.context(lm=lm), caplog.at_level(logging.WARNING):
        optimizer.compile(student, trainset=TRAIN)
    assert sum(one.missing for one in optimizer.result.workers) == 2
    said = [one.getMessage() for one in caplog.records if "requests_per_minute=…" in one.getMessage()]
    assert len(said) == told
