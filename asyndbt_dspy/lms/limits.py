"""Rate limits: when an attempt may go out to its endpoint.

An endpoint is one address and one key: providers count both, whatever the model and whoever calls. Workers on one
endpoint share its gate, from every event loop and every thread. A gate holds an attempt back while

- the endpoint's requests or tokens of the minute are used up,
- the endpoint has asked for a pause (429 with ``retry-after``, or an own, doubling pause without it),
- more attempts are in flight than it has lately coped with: halved at a 429, one more per full set of answers.

Limits are admitted in windows of one second: a whole minute's quota is never admitted twice around the minute's edge.
In any 60 seconds at most ``requests_per_minute`` go out, plus at most one second's worth.
"""

from __future__ import annotations

import asyncio
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from asyndbt_dspy.errors import ConfigurationError

LimiterName = Literal["aiolimiter", "asyncio-throttle"]

_HEADROOM = 0.98
"""Share of a quota that is used: the rest is for attempts that are admitted evenly and arrive unevenly."""
_THROTTLE_UNITS = 10
"""asyncio-throttle knows no weights; a second's worth of tokens is asked for in so many parts at most."""
_FIRST_PAUSE_S = 1.0
_LONGEST_OWN_PAUSE_S = 60.0
_LONGEST_ASKED_PAUSE_S = 600.0


@dataclass(frozen=True)
class RateLimits:
    """What an endpoint allows; ``None`` is no limit.

    Attributes:
        requests_per_minute: > 0.
        tokens_per_minute: > 0; prompt and completion together, as providers count them.
        limiter: ``aiolimiter`` (timers, weights) or ``asyncio-throttle`` (polls every 10 ms).

    Raises:
        ConfigurationError: a value out of range.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    limiter: LimiterName = "aiolimiter"

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < math.inf):
                raise ConfigurationError(f"{name}={value!r} must be > 0; leave it out for no limit")
        if self.limiter not in ("aiolimiter", "asyncio-throttle"):
            raise ConfigurationError(
                f"limiter={self.limiter!r} is none of ['aiolimiter', 'asyncio-throttle']"
            )

    def tighter(self, other: RateLimits) -> RateLimits:
        """The smaller of each; the limiter of this one."""

        def smaller(a: float | None, b: float | None) -> float | None:
            return min((one for one in (a, b) if one is not None), default=None)

        return RateLimits(
            smaller(self.requests_per_minute, other.requests_per_minute),
            smaller(self.tokens_per_minute, other.tokens_per_minute),
            self.limiter,
        )


class Pace(Protocol):
    """Admits a weight in [0, ``largest``] when the rate allows it; belongs to one event loop."""

    largest: float

    async def acquire(self, amount: float) -> None: ...


def make_pace(per_minute: float, limiter: LimiterName, *, is_weighted: bool = False) -> Pace:
    """A limiter of ``per_minute`` with a window of one second, or of one unit where that is longer.

    Args:
        is_weighted: Amounts are tokens, not single requests.
    """
    rate = per_minute * _HEADROOM / 60
    return _LeakyBucket(rate) if limiter == "aiolimiter" else _SlidingLog(rate, is_weighted)


class _LeakyBucket:
    def __init__(self, per_second: float) -> None:
        from aiolimiter import AsyncLimiter

        self.largest = max(1.0, per_second)
        self._limiter = AsyncLimiter(self.largest, self.largest / per_second)

    async def acquire(self, amount: float) -> None:
        await self._limiter.acquire(min(amount, self.largest))


class _SlidingLog:
    def __init__(self, per_second: float, is_weighted: bool) -> None:
        from asyncio_throttle import Throttler

        units = max(1, math.floor(per_second))
        units = min(units, _THROTTLE_UNITS) if is_weighted else units
        self._unit = max(1.0, per_second / units) if is_weighted else 1.0
        self.largest = self._unit * units
        self._throttler = Throttler(rate_limit=units, period=units * self._unit / per_second)

    async def acquire(self, amount: float) -> None:
        for _ in range(math.ceil(amount / self._unit)):
            await self._throttler.acquire()


class EndpointGate:
    """The gate of one endpoint; all of its methods run in one event loop.

    Args:
        limits: Of the endpoint.
        clock: Seconds, the loop's by default.
    """

    def __init__(self, limits: RateLimits, clock: Callable[[], float] | None = None) -> None:
        self.limits = limits
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._requests = _pace_or_none(limits.requests_per_minute, limits.limiter)
        self._tokens = _pace_or_none(limits.tokens_per_minute, limits.limiter, is_weighted=True)
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self.in_flight = 0
        self.most_in_flight = math.inf
        self.refusals_in_row = 0
        self._blocked_until = -math.inf
        self._last_cut = -math.inf
        self._coped_with = math.inf
        self._owed_tokens = 0.0

    @property
    def is_calm(self) -> bool:
        """Whether nothing is held back for the endpoint's own sake; its quota aside."""
        return math.isinf(self.most_in_flight) and self.refusals_in_row == 0

    async def enter(self, tokens: float) -> None:
        """Wait until an attempt of about so many tokens may go out; attempts go in the order of their calls."""
        async with self._turn:
            await self._pay(tokens)
            while (wait := self._hold_s()) > 0:
                self._changed.clear()
                await _until(self._changed, wait)
            self.in_flight += 1

    async def enter_beside(self, tokens: float) -> None:
        """``enter`` for a caller that others wait for: rates and pauses hold, but it waits for no other attempt."""
        await self._pay(tokens)
        await asyncio.sleep(max(0.0, self._blocked_until - self._clock()))
        self.in_flight += 1

    def leave(self, *, tokens_over: float = 0.0) -> None:
        """An attempt is over. ``tokens_over``: measured less announced tokens; the next attempts pay, or are paid."""
        self.in_flight -= 1
        self._owed_tokens += tokens_over
        self._changed.set()

    def answered(self) -> None:
        """The endpoint answered as it should: let it have a little more."""
        self.refusals_in_row = 0
        if math.isinf(self.most_in_flight):
            return
        self.most_in_flight += 1 / self.most_in_flight
        if self.most_in_flight > 2 * self._coped_with:
            self.most_in_flight = math.inf
        self._changed.set()

    def refused(self, retry_after_s: float | None, started_s: float) -> None:
        """The endpoint said that it is too much: pause, and halve what is in flight (once per wave of refusals).

        Args:
            retry_after_s: As asked for, or ``None``.
            started_s: When the refused attempt went out, by the gate's clock.
        """
        now = self._clock()
        self.refusals_in_row += 1
        own = min(_LONGEST_OWN_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(self.refusals_in_row - 1, 10))
        if started_s >= self._last_cut:
            self._coped_with = min(self.most_in_flight, max(1, self.in_flight))
            self.most_in_flight = max(1.0, self._coped_with / 2)
            self._last_cut = now
        elif retry_after_s is None:
            return  # the same wave: one pause is enough
        pause = own if retry_after_s is None else min(retry_after_s, _LONGEST_ASKED_PAUSE_S)
        self._blocked_until = max(self._blocked_until, now + pause)

    def now(self) -> float:
        return self._clock()

    def _hold_s(self) -> float:
        """Seconds to wait at least, 0 for none; infinite until something changes."""
        pause = self._blocked_until - self._clock()
        if pause > 0:
            return pause
        return math.inf if self.in_flight > max(0.0, self.most_in_flight - 1) else 0.0

    async def _pay(self, tokens: float) -> None:
        """One request, and so many tokens, out of the minute's quota."""
        if self._requests is not None:
            await self._requests.acquire(1)
        if self._tokens is None:
            return
        due = tokens + self._owed_tokens
        self._owed_tokens = min(due, 0.0)
        while due > 0:
            part = min(due, self._tokens.largest)
            await self._tokens.acquire(part)
            due -= part


def _pace_or_none(
    per_minute: float | None, limiter: LimiterName, *, is_weighted: bool = False
) -> Pace | None:
    return None if per_minute is None else make_pace(per_minute, limiter, is_weighted=is_weighted)


async def _until(event: asyncio.Event, seconds: float) -> None:
    """Wait for the event, at most so long."""
    if math.isinf(seconds):
        await event.wait()
        return
    waiter: Any = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiter], timeout=seconds)
    waiter.cancel()
