"""Several LMs, or keys, in order behind one: a dead one is left out and tried again later, a straggler may be hedged.

    fallback([metered(first, …), metered(second, …)], hedge_after_s=8)

Each LM is metered by itself, so every attempt is counted, a hedge's loser too. DSPy's retries stay outside: one attempt
of the whole goes through the LMs that are not left out, and fails only when all of them have.

Each is asked in its own way (temperature, ``max_tokens`` and the like), wherever the call itself does not ask for another. A
later LM that refuses a call all the same says nothing about the program: the call ends as the earlier ones left it.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import dspy
from dspy.lm15 import Config, RateLimitError, Request, Response

from asyndbt_dspy.errors import BudgetExceededError, ConfigurationError
from asyndbt_dspy.lms.attempts import Attempts, Capabilities, EngineFace, lm_with_engines, with_own_cache
from asyndbt_dspy.lms.background import BackgroundLoop
from asyndbt_dspy.lms.failures import FailureKind, causes, classify, is_rate_limited, retry_after_s

_TRANSIENTS_TO_DEATH = 3
"""So many transient failures in a row, and an LM counts as dead for a while."""
_FIRST_REST_S = 1.0
_LONGEST_S = 600.0


@dataclass
class _Standing:
    """How one of the LMs is doing."""

    rests_until_s: float = -math.inf
    """Because of its failures; without a rest, when the last one was counted."""
    asked_until_s: float = -math.inf
    """Because it asked for a pause."""
    endpoint_failures: int = 0
    transient_failures: int = 0
    last_error: BaseException | None = None

    def is_left_out(self, now_s: float) -> bool:
        return max(self.rests_until_s, self.asked_until_s) > now_s

    def may_come_back_s(self, now_s: float) -> float:
        """When it may be tried again; a rest that outlasts the pause is not waited for (see ``Rotation.order``)."""
        return self.asked_until_s if self.asked_until_s > now_s else self.rests_until_s


class Rotation:
    """Which of several LMs may be tried, and in which order. Pure: time is passed in.

    - An endpoint that refuses the key or does not know the model is dead: left out for ``retry_dead_after_s``, twice as
      long each further time, at most ten minutes.
    - One that asks for a pause is left out for the pause; after a 429 without one for 1, 2, 4, … seconds.
    - Three other transient failures in a row count as death.
    - Attempts that fail together are one failure.
    - An answer makes up for everything.
    - Where no LM is left, those that have asked for no pause are tried early, unless their endpoint is dead.

    Raises:
        ConfigurationError: ``retry_dead_after_s`` is not > 0.
    """

    def __init__(self, count: int, retry_dead_after_s: float) -> None:
        if not 0 < retry_dead_after_s < math.inf:
            raise ConfigurationError(f"retry_dead_after_s={retry_dead_after_s!r} must be > 0 seconds")
        self.retry_dead_after_s = retry_dead_after_s
        self._standings = [_Standing() for _ in range(count)]

    def order(self, now_s: float) -> list[int]:
        """The LMs that may be tried: those not left out, first choice first; else those that rest, first back first."""
        in_service = [number for number, one in enumerate(self._standings) if not one.is_left_out(now_s)]
        if in_service:
            return in_service
        resting = self._resting()
        if any(one.asked_until_s > now_s for one in resting.values()):
            return []  # waiting for the pause's end is surer than an LM that has just failed
        # A rest spares calls a detour while another LM answers. With no other it only prolongs the outage: the LMs are
        # then asked as each would be alone, at the pace of DSPy's retries.
        return sorted(resting, key=lambda number: resting[number].rests_until_s)

    def answered(self, number: int) -> None:
        self._standings[number] = _Standing()

    def failed(self, number: int, error: BaseException, now_s: float, started_s: float | None = None) -> None:
        """Book a transient or an endpoint failure.

        Args:
            started_s: When the attempt went out; ``None``: now.
        """
        one = self._standings[number]
        started_s = now_s if started_s is None else started_s
        is_endpoints = classify(error) is FailureKind.ENDPOINT
        asked_s = None if is_endpoints else retry_after_s(error)
        if asked_s is not None:
            one.asked_until_s = max(one.asked_until_s, now_s + min(asked_s, _LONGEST_S))
        if started_s < one.rests_until_s and (one.endpoint_failures or not is_endpoints):
            return  # it went out beside the failure that was counted last, or early out of a rest: none further in a row
        one.last_error = error
        if is_endpoints:
            one.endpoint_failures += 1
            rest_s = self._death_s(one.endpoint_failures)
        else:
            one.transient_failures += 1
            rest_s = self._own_rest_s(error, one.transient_failures) if asked_s is None else 0.0
        one.rests_until_s = max(one.rests_until_s, now_s + rest_s)

    def unavailable(self, now_s: float) -> BaseException:
        """What to raise where no LM may be tried: DSPy waits for one that rests, and gives up on the dead."""
        resting = self._resting().values()
        if not resting:
            error = self._standings[0].last_error
            return error if error is not None else RateLimitError("every LM is left out")
        wait_s = max(0.0, min(one.may_come_back_s(now_s) for one in resting) - now_s)
        return RateLimitError(
            f"all {len(self._standings)} LMs are left out, the first for {wait_s:.1f} s more",
            retry_after=round(wait_s, 3),
        )

    def why_left_out(self) -> BaseException:
        """What has befallen the first of those in trouble."""
        for one in self._standings:
            if one.last_error is not None:
                return one.last_error
        return RateLimitError("the first LM was left out, and is not any more")

    def _resting(self) -> dict[int, _Standing]:
        """Those whose endpoint is not dead, by number."""
        return {number: one for number, one in enumerate(self._standings) if not one.endpoint_failures}

    def _own_rest_s(self, error: BaseException, times: int) -> float:
        """After so many transient failures in a row, where the endpoint did not say how long."""
        rest_s = _FIRST_REST_S * 2 ** min(times - 1, 6) if is_rate_limited(error) else 0.0
        deaths = times - _TRANSIENTS_TO_DEATH + 1
        return max(rest_s, self._death_s(deaths)) if deaths > 0 else rest_s

    def _death_s(self, times: int) -> float:
        return min(_LONGEST_S, self.retry_dead_after_s * 2 ** min(times - 1, 10))


def fallback(
    lms: Sequence[dspy.BaseLM],
    *,
    hedge_after_s: float | None = None,
    retry_dead_after_s: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> dspy.LM:
    """One LM that is answered by the first of several that can.

    Args:
        lms: In order of preference; metered ones, so that each attempt is counted. Whether answers are cached, and how often
            a call is tried again, are the first one's. Cached answers are the team's: none is taken for that of one LM.
        hedge_after_s: A call without an answer for so long is sent to the next LM too; the first answer counts, the
            other call is cancelled. > 0, ``None``: never.
        retry_dead_after_s: A dead LM is tried again after so long. > 0.
        clock: Seconds since any fixed point.

    Raises:
        ConfigurationError: no LM; a time out of range; hedging with an LM that has no async side.
    """
    if not lms:
        raise ConfigurationError("fallback() got 0 LMs; give at least one")
    if hedge_after_s is not None and not 0 < hedge_after_s < math.inf:
        raise ConfigurationError(
            f"hedge_after_s={hedge_after_s!r} must be > 0 seconds, or None for no hedging"
        )
    team = _Team(lms, Rotation(len(lms), retry_dead_after_s), hedge_after_s, clock)
    plain = next((one.model for one in team.members if not one.is_async), None)
    if plain is not None and hedge_after_s is not None:
        raise ConfigurationError(
            f"the LM {plain!r} has no async side, so a call that is hedged could not be cancelled; give async_engine= to its "
            "dspy.LM or aforward to its class, or leave hedge_after_s out"
        )
    lm = lm_with_engines(lms[0], _Engine(team), _AsyncEngine(team) if plain is None else None)
    return with_own_cache(lm) if len(lms) > 1 else lm


class _Team:
    """What both engines share."""

    def __init__(
        self,
        lms: Sequence[dspy.BaseLM],
        rotation: Rotation,
        hedge_after_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        self.members = [Attempts(lm) for lm in lms]
        self._configs = [member.own_config() for member in self.members]
        self.rotation = rotation
        self.hedge_after_s = hedge_after_s
        self.clock = clock
        self.lock = threading.Lock()
        self.home = BackgroundLoop("asyndbt-hedges")
        self.losers: set[asyncio.Task[Response]] = set()

    def capabilities(self) -> Capabilities:
        found = [one.capabilities() for one in self.members]
        shared = found[0]
        for one in found[1:]:
            shared = shared.shared_with(one)
        return shared

    def request_to(self, number: int, request: Request) -> Request:
        """``request``, which was made for the first LM, as another one asks."""
        if number == 0:
            return request
        return replace(request, config=_as_own(request.config, self._configs[0], self._configs[number]))

    def order(self) -> list[int]:
        with self.lock:
            now_s = self.clock()
            order = self.rotation.order(now_s)
            if order:
                return order
            raise self.rotation.unavailable(now_s)

    def answered(self, number: int) -> None:
        with self.lock:
            self.rotation.answered(number)

    def failed(self, number: int, error: BaseException, started_s: float) -> bool:
        """Book a failure of an attempt that went out at ``started_s``; whether another LM may do better."""
        if _is_budgets(error):
            return False
        kind = classify(error)
        if kind is FailureKind.PROGRAM:
            # It may be this LM alone that does not take such calls.
            return number > 0 and isinstance(error, Exception)
        if kind is FailureKind.EXAMPLE:
            return False
        with self.lock:
            self.rotation.failed(number, error, self.clock(), started_s)
        return True

    def most_hopeful(self, errors: Sequence[BaseException]) -> BaseException:
        """What a call ends with that none has answered: a transient error before others, for DSPy then tries again."""
        for kind in (FailureKind.TRANSIENT, FailureKind.ENDPOINT):
            for error in errors:
                if classify(error) is kind and not _is_budgets(error):
                    return error
        with self.lock:
            return next(filter(_is_budgets, errors), self.rotation.why_left_out())


class _Engine(EngineFace):
    """For programs in threads. Hedging needs a call that can be cancelled: then the team runs in its own loop."""

    is_metered = True  # by its members

    def __init__(self, team: _Team) -> None:
        super().__init__(team.capabilities)
        self.team = team

    def complete(self, request: Request) -> Response:
        team = self.team
        if team.hedge_after_s is not None:
            future = team.home.submit(lambda: _Race(team, request).run())
            try:
                return future.result()
            except BaseException:
                future.cancel()
                raise
        errors: list[BaseException] = []
        for number in team.order():
            started_s = team.clock()
            try:
                response = team.members[number].complete(team.request_to(number, request))
            except Exception as error:  # sorted by kind in failed()
                errors.append(error)
                if not team.failed(number, error, started_s):
                    raise
                continue
            team.answered(number)
            return response
        raise team.most_hopeful(errors)


class _AsyncEngine(EngineFace):
    """For programs in tasks."""

    def __init__(self, team: _Team) -> None:
        super().__init__(team.capabilities)
        self.team = team

    async def complete(self, request: Request) -> Response:
        return await _Race(self.team, request).run()


class _Sent(NamedTuple):
    """One attempt: which LM, and when it went out."""

    number: int
    started_s: float


@dataclass
class _Race:
    """One attempt of a team: one LM after the other, a second one beside a straggler."""

    team: _Team
    request: Request
    running: dict[asyncio.Task[Response], _Sent] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    async def run(self) -> Response:
        """The first answer; whatever runs beside it is cancelled and booked in the background."""
        waiting = self.team.order()
        self._start(waiting.pop(0))
        may_hedge = self.team.hedge_after_s is not None
        try:
            while self.running:
                patience = self.team.hedge_after_s if may_hedge and waiting else None
                done, _ = await asyncio.wait(
                    self.running, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    may_hedge = False
                    self._start(waiting.pop(0))
                    continue
                go_on = True
                for task in done:
                    sent = self.running.pop(task)
                    error = _error_of(task)
                    if error is None:
                        self.team.answered(sent.number)
                        return task.result()
                    self.errors.append(error)
                    # A hedge that the budget refuses does not end the call that it was to hurry.
                    go_on = self.team.failed(sent.number, error, sent.started_s) or (
                        _is_budgets(error) and bool(self.running)
                    )
                    if not go_on:
                        raise error
                if not self.running and waiting and not _is_budgets(self.errors[-1]):
                    self._start(waiting.pop(0))
            raise self.team.most_hopeful(self.errors)
        finally:
            self._leave_the_rest()

    def _start(self, number: int) -> None:
        request = self.team.request_to(number, self.request)
        task = asyncio.ensure_future(self.team.members[number].acomplete(request))
        self.running[task] = _Sent(number, self.team.clock())

    def _leave_the_rest(self) -> None:
        for task in self.running:
            self.team.losers.add(task)
            task.add_done_callback(self._forget)
            task.cancel()

    def _forget(self, task: asyncio.Task[Response]) -> None:
        self.team.losers.discard(task)
        _error_of(task)  # asked for, so that asyncio does not complain


def _error_of(task: asyncio.Task[Response]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def _as_own(asked: Config, first: Config, own: Config) -> Config:
    """``asked`` with ``own`` settings wherever it has those of the ``first`` LM: the call asked for nothing else there."""
    names = (one.name for one in fields(asked) if getattr(asked, one.name) == getattr(first, one.name))
    return replace(asked, **{name: getattr(own, name) for name in names})


def _is_budgets(error: BaseException) -> bool:
    return any(isinstance(one, BudgetExceededError) for one in causes(error))
