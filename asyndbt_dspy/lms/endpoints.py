"""The endpoints of one run: attempts of any thread and any event loop pass through the gate of their endpoint."""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.background import BackgroundLoop
from asyndbt_dspy.lms.limits import EndpointGate, RateLimits

logger = logging.getLogger(__name__)

_PLAIN_PROVIDERS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}


@dataclass(eq=False)
class Pass:
    """The right to send one attempt; give it back with ``Endpoint.leave``.

    Attributes:
        slots: The worker's slots of which the attempt has taken one.
        waited_s: Seconds that the attempt was held back.
        announced_tokens: What it was taken to cost.
        entered_s: When it went out, monotonic clock.
    """

    slots: Slots | None = None
    waited_s: float = 0.0
    announced_tokens: float = 0.0
    entered_s: float = 0.0


class Endpoint:
    """One address and key, its gate, and those who wait for it. Made by ``Endpoints``."""

    def __init__(self, key: str, limits: RateLimits, home: BackgroundLoop) -> None:
        self.key = key
        self.limits = limits
        self._home = home
        self._gate: EndpointGate | None = None
        self._lock = threading.Lock()
        self._unguarded = 0
        self._is_guarded = limits != RateLimits(limiter=limits.limiter)

    def tighten(self, limits: RateLimits) -> None:
        """Another worker uses this endpoint too: the smaller limits hold for both.

        Raises:
            ConfigurationError: attempts went out already under looser limits.
        """
        tighter = self.limits.tighter(limits)
        if tighter == self.limits:
            return
        with self._lock:
            if self._gate is not None:
                raise ConfigurationError(
                    f"an endpoint in use has the limits {self.limits}; {tighter} came too late. Make every worker's LM "
                    "before the first call"
                )
            if self.limits != RateLimits(limiter=self.limits.limiter):
                logger.warning(
                    "Workers on one endpoint share its rate limits, but were given different ones; the smaller of each "
                    "hold: %s",
                    tighter,
                )
            self.limits, self._is_guarded = tighter, True

    async def enter(self, tokens: float, slots: Slots | None) -> Pass:
        """Wait for the right to send an attempt of about so many tokens. Cancelled while waiting: nothing is taken."""
        if self._enters_freely(slots):
            return Pass(announced_tokens=tokens, entered_s=time.monotonic())
        ticket = _Ticket(self, tokens, slots)
        future = self._home.submit(ticket.wait)
        try:
            await asyncio.wrap_future(future)
        except BaseException:
            future.cancel()
            ticket.abandon()
            raise
        return ticket.passed

    def enter_blocking(self, tokens: float, slots: Slots | None) -> Pass:
        """``enter`` for threads. On an event loop's own thread it waits for no other attempt: they could never end."""
        is_on_loop = blocks_a_loop()
        slots = None if is_on_loop else slots
        if self._enters_freely(slots):
            return Pass(announced_tokens=tokens, entered_s=time.monotonic())
        ticket = _Ticket(self, tokens, slots, is_beside=is_on_loop)
        future: concurrent.futures.Future[Any] = self._home.submit(ticket.wait)
        try:
            future.result()
        except BaseException:
            future.cancel()
            ticket.abandon()
            raise
        return ticket.passed

    def leave(
        self,
        passed: Pass,
        *,
        tokens: float | None = None,
        was_answered: bool = False,
        is_too_much: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        """The attempt is over.

        Args:
            tokens: As measured; ``None``: unknown, what was announced stays paid.
            was_answered: It brought an answer.
            is_too_much: The endpoint answered 429, or asked for a pause.
            retry_after_s: How long a pause, if it said.
        """
        with self._lock:
            if is_too_much:
                self._is_guarded = True
            if not self._is_guarded:
                self._unguarded -= 1
                return
        over = 0.0 if tokens is None else tokens - passed.announced_tokens

        def gone() -> None:
            gate = self.gate()
            if is_too_much:
                gate.refused(retry_after_s, passed.entered_s)
            elif was_answered:
                gate.answered()
            gate.leave(tokens_over=over)
            if passed.slots is not None:
                passed.slots.semaphore.release()

        self._home.loop.call_soon_threadsafe(gone)

    def _enters_freely(self, slots: Slots | None) -> bool:
        # An endpoint without limits, without slots and without a 429 so far costs no hop to the other thread.
        with self._lock:
            if self._is_guarded or slots is not None:
                return False
            self._unguarded += 1
            return True

    def gate(self) -> EndpointGate:
        """The gate; only in the home loop."""
        with self._lock:
            if self._gate is None:
                self._gate = EndpointGate(self.limits, time.monotonic)
                # Attempts that went out before there was a gate come back through it, and later ones go out through it:
                # one that is counted on one side only would hold the endpoint back for ever, or not at all.
                self._gate.in_flight, self._unguarded = self._unguarded, 0
                self._is_guarded = True
            return self._gate


class Slots:
    """Attempts that one worker may have in flight; lives in the home loop."""

    def __init__(self, count: int, home: BackgroundLoop) -> None:
        self.count = count
        self._home = home
        self._semaphore: asyncio.Semaphore | None = None

    @property
    def semaphore(self) -> asyncio.Semaphore:
        if self._semaphore is None:
            self._semaphore = asyncio.Semaphore(self.count)
        return self._semaphore


class _Ticket:
    """One wait. Who gives up first, caller or gate, is decided under a lock, so that no slot is lost between them."""

    def __init__(
        self, endpoint: Endpoint, tokens: float, slots: Slots | None, *, is_beside: bool = False
    ) -> None:
        self._endpoint = endpoint
        self._is_beside = is_beside
        self._lock = threading.Lock()
        self._asked_s = time.monotonic()
        self._is_admitted = False
        self._is_abandoned = False
        self.passed = Pass(slots, announced_tokens=tokens)

    async def wait(self) -> None:
        slots, gate = self.passed.slots, self._endpoint.gate()
        if slots is not None:
            await slots.semaphore.acquire()
        try:
            await (gate.enter_beside if self._is_beside else gate.enter)(self.passed.announced_tokens)
        except BaseException:
            if slots is not None:
                slots.semaphore.release()
            raise
        with self._lock:
            self.passed.entered_s = time.monotonic()
            self.passed.waited_s = self.passed.entered_s - self._asked_s
            self._is_admitted = not self._is_abandoned
        if not self._is_admitted:
            self._endpoint.leave(self.passed)

    def abandon(self) -> None:
        """The caller does not wait any more; what it was given meanwhile goes back."""
        with self._lock:
            self._is_abandoned = True
            must_leave = self._is_admitted
        if must_leave:
            self._endpoint.leave(self.passed)


class Endpoints:
    """All endpoints of one run.

    One background thread for all; it starts when the first attempt has to wait.
    """

    def __init__(self) -> None:
        self._home = BackgroundLoop("asyndbt-limits")
        self._lock = threading.Lock()
        self._by_key: dict[str, Endpoint] = {}

    def get(self, key: str, limits: RateLimits) -> Endpoint:
        """The endpoint of this key; its limits are the tightest that were ever given."""
        with self._lock:
            endpoint = self._by_key.get(key)
            if endpoint is None:
                endpoint = self._by_key[key] = Endpoint(key, limits, self._home)
                return endpoint
        endpoint.tighten(limits)
        return endpoint

    def slots(self, count: int) -> Slots:
        return Slots(count, self._home)

    def close(self) -> None:
        """End the background thread."""
        self._home.close()


def blocks_a_loop() -> bool:
    """Whether this thread runs an event loop: a plain program or metric that calls an LM right on it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def endpoint_key(lm: Any, find_env: Callable[[str], str | None] = os.environ.get) -> str:
    """Names the endpoint of an LM: address and key (hashed), or the engine object where the LM has one of its own.

    LMs whose settings look alike share an endpoint even if their models differ.
    """
    engine = getattr(lm, "engine", None)
    if engine is not None and not isinstance(engine, str):
        named = getattr(engine, "endpoint_key", None)
        return str(named) if named else f"engine:{type(engine).__name__}:{id(engine):x}"
    provider = _provider(lm)
    secret = getattr(lm, "kwargs", {}).get("api_key") or find_env(f"{provider.upper()}_API_KEY") or ""
    digest = hashlib.sha256(str(secret).encode()).hexdigest()[:16]
    address = endpoint_address(lm, find_env) or _PLAIN_PROVIDERS.get(provider, provider)
    return f"{address.rstrip('/')}#{digest}"


def endpoint_address(lm: Any, find_env: Callable[[str], str | None] = os.environ.get) -> str | None:
    """The address that an LM was given, by its settings or else by the environment; ``None``: its provider's own."""
    settings = getattr(lm, "kwargs", None) or {}
    given = settings.get("api_base") or settings.get("base_url")
    engine = getattr(lm, "engine", None)
    if given or (engine is not None and engine not in ("auto", "litellm")):
        return str(given) if given else None  # other engines do not read the environment for it
    provider = _provider(lm)
    # LiteLLM's order, where both are set.
    names = ("BASE_URL", "API_BASE") if provider == "openai" else ("API_BASE", "BASE_URL")
    return next((found for name in names if (found := find_env(f"{provider.upper()}_{name}"))), None)


def _provider(lm: Any) -> str:
    settings = getattr(lm, "kwargs", None) or {}
    return str(settings.get("custom_llm_provider") or str(getattr(lm, "model", "")).partition("/")[0])
