"""Wraps any ``dspy.LM`` so that each of its attempts is limited, reserved for and counted.

    lm ── cache, retries, history, callbacks (DSPy's, once)
     └─ metered engines: reserve the worst case → wait for the endpoint → one attempt → settle
         └─ one attempt through the wrapped LM: DSPy's native client, LiteLLM, or the LM's own engines

DSPy calls the engines once per attempt, after its cache and inside its retries: nothing else sees every attempt and no
cache hit. An engine that retries or falls back by itself (a LangChain model) makes each of its attempts through the meter.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import dspy
from dspy.lm15 import InvalidRequestError, Request, Response, TransportError
from dspy.utils.callback import BaseCallback
from dspy.utils.exceptions import LMError, is_retryable_lm_error

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.attempts import Attempts, EngineFace, lm_with_engines
from asyndbt_dspy.lms.bounds import (
    guessed_tokens,
    likely_tokens,
    worst_completion_tokens,
    worst_prompt_tokens,
)
from asyndbt_dspy.lms.call_watch import held_back, on_the_wire
from asyndbt_dspy.lms.callers import current_caller
from asyndbt_dspy.lms.endpoints import Endpoint, Pass, Slots, endpoint_key
from asyndbt_dspy.lms.failures import FailureKind, Fate, classify, fate_of, is_rate_limited, retry_after_s
from asyndbt_dspy.lms.ledger import Ledger, Reservation
from asyndbt_dspy.lms.limits import LimiterName, RateLimits
from asyndbt_dspy.lms.prices import Price, Tariff

logger = logging.getLogger(__name__)

_SEND_GRACE_S = 0.5
"""An attempt that is cancelled sooner is let run so long: then it was sent, and is an attempt for both sides."""
_SEND_TURNS = 20
"""So often the event loop must have come round to it too: where the loop stood still, time alone sends nothing."""
_TURN_S = 0.005
_CANCEL_WAIT_S = 1.0


def metered(
    lm: dspy.BaseLM,
    *,
    ledger: Ledger,
    worker: str | None = None,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    max_concurrency: int | None = None,
    limiter: LimiterName = "aiolimiter",
    prices: Price | None = None,
    endpoint: str | None = None,
) -> dspy.LM:
    """An LM that answers as ``lm`` does, and whose every attempt is limited, reserved for and counted.

    Args:
        lm: Any LM; never changed.
        ledger: Of the run.
        worker: Whose line is written; ``None``: of whoever calls (see ``calling_as``).
        requests_per_minute, tokens_per_minute: Of the endpoint; workers on one endpoint share them.
        max_concurrency: Attempts in flight through this LM at a time, >= 1.
        limiter: Library that keeps the rate.
        prices: Goes before the price table.
        endpoint: Names the endpoint where address and key do not tell it.

    Raises:
        ConfigurationError: a limit out of range; a cap on dollars and an unknown price; a cap on tokens or dollars and
            an LM without ``max_tokens``; a text-completion model; an engine whose attempts cannot be told apart.
    """
    if isinstance(getattr(lm, "engine", None), _Metered) and lm.engine.meter.ledger is ledger:  # type: ignore[union-attr]
        return lm  # type: ignore[return-value]
    if max_concurrency is not None and (isinstance(max_concurrency, bool) or max_concurrency < 1):
        raise ConfigurationError(f"max_concurrency={max_concurrency!r} must be at least 1")
    limits = RateLimits(requests_per_minute, tokens_per_minute, limiter)
    tariff = Tariff(lm, prices)
    _check_caps(lm, ledger, tariff, worker)
    attempts = Attempts(lm)
    attempts.check_attempts()
    meter = _Meter(
        attempts,
        ledger,
        worker,
        tariff,
        ledger.endpoints.get(endpoint or endpoint_key(lm), limits),
        None if max_concurrency is None else ledger.endpoints.slots(max_concurrency),
    )
    engines = _Engine(meter), _AsyncEngine(meter) if attempts.is_async else None
    if isinstance(getattr(lm, "engine", None), str):
        # Reads the tables now, and imports LiteLLM where it is needed: seconds that must not fall into the first attempt.
        engines[0].ask_capabilities()
    return lm_with_engines(lm, *engines, callbacks=[*lm.callbacks, _CacheHits(meter)])


class _Meter:
    """What both engines of one LM share."""

    def __init__(
        self,
        attempts: Attempts,
        ledger: Ledger,
        worker: str | None,
        tariff: Tariff,
        endpoint: Endpoint,
        slots: Slots | None,
    ) -> None:
        self.attempts = attempts
        self.ledger = ledger
        self.endpoint = endpoint
        self.slots = slots
        self.tariff = tariff
        self._worker = worker

    @property
    def is_priced(self) -> bool:
        return self.tariff.worst is not None

    @property
    def worker(self) -> str:
        return current_caller() if self._worker is None else self._worker

    def endpoint_of(self, number: int) -> Endpoint:
        """Where the models of one LM are several, each has an endpoint, so that one's 429 does not hold up its fallback.

        Rates that were said hold for all of them together: whether they are one endpoint nobody knows.
        """
        limits = self.endpoint.limits
        if not number or limits != RateLimits(limiter=limits.limiter):
            return self.endpoint
        return self.ledger.endpoints.get(f"{self.endpoint.key}/{number}", limits)

    def worst_case(self, request: Request) -> Any:
        if self.ledger.needs_bounds() and request.config.max_tokens is None:
            raise ConfigurationError(
                f"a call of {request.model!r} sets no max_tokens, and the budget caps tokens or dollars; set "
                "max_tokens on the LM and do not unset it in a predictor's config"
            )
        return self.tariff.worst_case(worst_prompt_tokens(request), worst_completion_tokens(request))

    def answered(
        self, held: Reservation, endpoint: Endpoint, passed: Pass, request: Request, response: Response
    ) -> Response:
        """Book an answer, and pass it on."""
        actual = measured = self.tariff.charge_of(request, response)
        if measured is None and not self.ledger.needs_bounds():
            # Under a cap on tokens or dollars only the reservation is sure to be no less than what is billed.
            actual = self.tariff.worst_case(*guessed_tokens(request, response))
        if actual is not None and actual.tokens > held.worst.tokens:
            logger.warning(
                "%s billed %d tokens for a call that was taken to need at most %d; caps may be passed by as much",
                request.model,
                actual.tokens,
                held.worst.tokens,
            )
        self.ledger.settle(
            held,
            request.model,
            None,
            actual,
            is_priced=self.is_priced,
            is_measured=measured is not None,
            waited_s=passed.waited_s,
        )
        tokens = None if measured is None else float(measured.tokens)
        endpoint.leave(passed, tokens=tokens, was_answered=True)
        return response

    def failed(
        self, held: Reservation, endpoint: Endpoint, passed: Pass, request: Request, error: BaseException
    ) -> None:
        """Book a failure."""
        fate = fate_of(error)
        asked_s = retry_after_s(error)
        self.ledger.settle(held, request.model, fate, is_priced=self.is_priced, waited_s=passed.waited_s)
        is_too_much = classify(error) is FailureKind.TRANSIENT and (
            is_rate_limited(error) or asked_s is not None
        )
        endpoint.leave(
            passed,
            tokens=None if fate is Fate.CUT else 0.0,
            is_too_much=is_too_much,
            retry_after_s=asked_s,
        )


class _Metered(EngineFace):
    is_metered = True

    def __init__(self, meter: _Meter) -> None:
        super().__init__(meter.attempts.capabilities)
        self.meter = meter


class _Engine(_Metered):
    """Attempts of programs in threads."""

    def complete(self, request: Request) -> Response:
        """One attempt, or as many as the wrapped engine makes of it; see the module."""
        _note_attempt()
        with _dspys_errors():
            response = self.meter.attempts.complete(
                request, lambda send, number: self._attempt(request, send, number)
            )
        return _unfiltered(response)

    def _attempt(self, request: Request, send: Callable[[], Response], number: int) -> Response:
        meter = self.meter
        endpoint = meter.endpoint_of(number)
        with held_back():
            held = meter.ledger.reserve_blocking(meter.worker, meter.worst_case(request))
            try:
                passed = endpoint.enter_blocking(likely_tokens(request), meter.slots)
            except BaseException:
                meter.ledger.withdraw(held)
                raise
        try:
            with on_the_wire():
                response = send()
        except BaseException as error:
            meter.failed(held, endpoint, passed, request, error)
            raise
        return meter.answered(held, endpoint, passed, request, response)


class _AsyncEngine(_Metered):
    """Attempts of programs in tasks."""

    async def complete(self, request: Request) -> Response:
        """One attempt, or as many as the wrapped engine makes of it; see the module.

        Cancelled: whatever it had begun is booked before the task ends.
        """
        _note_attempt()
        with _dspys_errors():
            response = await self.meter.attempts.acomplete(
                request, lambda send, number: self._attempt(request, send, number)
            )
        return _unfiltered(response)

    async def _attempt(
        self, request: Request, send: Callable[[], Awaitable[Response]], number: int
    ) -> Response:
        meter = self.meter
        endpoint = meter.endpoint_of(number)
        with held_back():
            held = await meter.ledger.areserve(meter.worker, meter.worst_case(request))
            try:
                passed = await endpoint.enter(likely_tokens(request), meter.slots)
            except BaseException:
                meter.ledger.withdraw(held)
                raise
        try:
            with on_the_wire():
                response = await _sent(send())
        except BaseException as error:
            meter.failed(held, endpoint, passed, request, error)
            raise
        return meter.answered(held, endpoint, passed, request, response)


async def _sent(attempt: Awaitable[Response]) -> Response:
    """Await an attempt. One that is cancelled right at its start, or on a loop that hardly runs, is let go out first.

    Then both sides count it. Without that, nobody could tell whether it had been sent. What is cut off all the same is
    counted and charged.
    """
    task = asyncio.ensure_future(attempt)
    started_s = time.monotonic()
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _let_go_out(task, started_s + _SEND_GRACE_S)
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=_CANCEL_WAIT_S)
        if task.done() and not task.cancelled():
            task.exception()  # asked for, so that asyncio does not complain; nobody waits for the outcome
        raise


async def _let_go_out(task: asyncio.Task[Response], end_s: float) -> None:
    """Wait for the attempt until ``end_s``, however often we are cancelled meanwhile: it is a fraction of a second."""
    turns = 0
    while not task.done() and (turns < _SEND_TURNS or time.monotonic() < end_s):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task], timeout=_TURN_S)
        turns += 1


def _unfiltered(response: Response) -> Response:
    if response.finish_reason == "content_filter" and not (response.message.text or "").strip():
        raise InvalidRequestError(
            "the provider's content filter left nothing of the answer", provider_code="content_filter"
        )
    return response


@contextlib.contextmanager
def _dspys_errors() -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        known = _for_dspy(error)
        if known is error:
            raise
        raise known from error


def _for_dspy(error: BaseException) -> BaseException:
    """The error as DSPy's retries understand it."""
    if not isinstance(error, Exception):
        return error
    asked_s = retry_after_s(error)
    if asked_s is not None and getattr(error, "retry_after", None) is None:
        error.retry_after = asked_s  # type: ignore[attr-defined] # LiteLLM leaves it in the response's headers
    if isinstance(error, LMError) and classify(error) is FailureKind.TRANSIENT:
        # An answer that is no JSON, say: to be asked again, but DSPy knows it only as a provider's error.
        return error if is_retryable_lm_error(error) else TransportError(str(error))
    return error


def _check_caps(lm: dspy.BaseLM, ledger: Ledger, tariff: Tariff, worker: str | None) -> None:
    whose = f"the LM {lm.model!r}" + (f" of worker {worker!r}" if worker else "")
    max_tokens = lm.kwargs.get("max_tokens") or lm.kwargs.get("max_completion_tokens")
    if ledger.needs_bounds() and not max_tokens:
        raise ConfigurationError(
            f"{whose} has no max_tokens, so no cap on tokens or dollars can be kept; give "
            f"dspy.LM({lm.model!r}, max_tokens=…)"
        )
    if tariff.worst is not None:
        return
    if ledger.budget is not None and ledger.budget.dollars is not None:
        raise ConfigurationError(
            f"{whose} has no known price, so the cap of {ledger.budget.dollars:g} dollars cannot be kept; give "
            "Price(prompt=…, completion=…) in dollars per million tokens (0 for a local model), or cap tokens instead"
        )


class _CacheHits(BaseCallback):
    """Counts calls that were answered without an attempt."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter

    def __deepcopy__(self, memo: dict[int, Any]) -> _CacheHits:
        return self

    def on_lm_start(self, call_id: str, instance: Any, inputs: dict[str, Any]) -> None:
        _CALL.set(_Call())

    def on_lm_end(self, call_id: str, outputs: Any, exception: Exception | None = None) -> None:
        call = _CALL.get()
        if exception is None and call is not None and not call.came_to_attempt:
            self._meter.ledger.count_cache_hit(self._meter.worker)


@dataclass
class _Call:
    """One call of an LM, as its attempts see it, in tasks and threads of their own too."""

    came_to_attempt: bool = False


_CALL: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("asyndbt_lm_call", default=None)


def _note_attempt() -> None:
    call = _CALL.get()
    if call is not None:
        call.came_to_attempt = True
