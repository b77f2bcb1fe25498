"""How fast workers are, and what follows from it. There is no clock: speeds are counted in other workers' answers.

While a worker evaluates, the others answer; the more they do meanwhile, the slower it is. With rollouts as the unit of
work, ``(work of all during its evaluation) / (its own work)`` is proportional to its seconds per rollout. So pace is a
function of the order of messages alone, and a replay of the messages repeats it bit for bit.
"""

from __future__ import annotations

import math
import statistics

from asyndbt_dspy.core.config import AlgorithmConfig

_MEMORY = 0.9
"""Weight of the past in a smoothed pace, once there is as much of it."""
_FEWEST = 3
"""Answers that a worker must have given before it can count as slow."""
_SLOW = (0.25, 0.25, 0.35, 0.5)
"""Relative speed up to which a worker is slow, by its answers: 0, 1, 2, more. Delays of one speed that vary much seldom look
that unequal. Without an answer it is the request that it has in hand that takes so long."""

LATE = 2.0
"""One answer may take so many times its worker's usual time before the staleness bound, or the end of the race, waits for it."""
_GROWTH = 4
"""Automatic tau: at most so many times the configured one. The theory holds for any fixed bound; a wider one costs speed."""


class Paces:
    """Smoothed paces of all workers, from the order of their answers.

    A synchronous run (S = R) notes none: where all wait for each other, everybody is as slow as the slowest.

    Attributes:
        noted: Whether anything is noted.
        fewest: Examples per draw of the shortest steps.
        tapers: Whether the last steps of a search are as short.
        slowest: Answers of all during one of the slowest worker, its own included, or since it was asked if that is more
            already; 0 before anything is known.
    """

    def __init__(self, count: int, config: AlgorithmConfig) -> None:
        is_adaptive = config.auto_active or config.auto_staleness
        self.noted = is_adaptive or (config.balance and config.active_workers < count)
        self.slowest = 0.0
        self._is_balanced = config.balance
        # The barrier form counts on every step costing the same, and waits for everybody anyway.
        self.fewest = (
            min(2, config.minibatch) if config.balance and config.buffered_lower else config.minibatch
        )
        self.tapers = config.keep_busy and self.fewest < config.minibatch
        self._most = config.minibatch
        self._work = 0
        self._begun: dict[int, int] = {}
        self._unit = config.draws * config.minibatch
        self._log_pace = [0.0] * count
        self._answers = [0] * count
        self._median = 0.0

    def hand_out(self, number: int) -> None:
        """Worker ``number`` got a request."""
        if self.noted:
            self._begun[number] = self._work

    def take_back(self, number: int, rollouts: int) -> None:
        """It answered one of at most ``rollouts`` rollouts."""
        begun = self._begun.pop(number, None)
        if begun is None or not rollouts:
            return
        self._work += rollouts
        pace = math.log((self._work - begun) / rollouts)
        self._answers[number] += 1
        past = min(_MEMORY, 1.0 - 1.0 / self._answers[number])
        self._log_pace[number] = past * self._log_pace[number] + (1.0 - past) * pace

    def forget(self, number: int) -> None:
        """Worker ``number`` was set aside."""
        self._begun.pop(number, None)
        self._answers[number] = 0

    def refresh(self) -> None:
        """Take the median anew: once per update, so that a message costs the same however many workers there are."""
        if self.noted:
            known = [
                pace for pace, count in zip(self._log_pace, self._answers, strict=True) if count >= _FEWEST
            ]
            self._median = statistics.median(known) if known else 0.0
            # Whoever is slow has not answered thrice while fast ones have: what it has in hand tells.
            waited = (self._work - min(self._begun.values(), default=self._work)) / self._unit
            self.slowest = max(math.exp(max(known)), waited) if known else 0.0

    def speed(self, number: int) -> float:
        """Rollouts per second in units of the median worker's, in (0, 1/2]; 1 for who is not slow or not known."""
        answers = self._answers[number]
        if not self._is_balanced or not self._median:
            return 1.0
        pace = self._log_pace[number]
        if not answers:
            waited = self._work - self._begun.get(number, self._work)
            pace = math.log(max(1, waited) / self._unit) if waited > self._unit else self._median
        relative = math.exp(self._median - pace)
        return relative if relative <= _SLOW[min(answers, _FEWEST)] else 1.0

    def minibatch(self, number: int, calls_left: int | None = None, living: int = 1) -> int:
        """Examples per draw of its next step: fewer for a slow worker, so that what it answers is less late.

        Where nobody waits for anybody, fewest in the last steps of a search, for which ``calls_left`` is less than a whole
        step for each of the ``living``: the shorter these are, the less apart they end.
        """
        if self.tapers and calls_left is not None and calls_left < living * self._unit:
            return self.fewest
        return max(self.fewest, math.ceil(self._most * self.speed(number)))


class Synchrony:
    """S and tau in force.

    With ``auto_active`` S is as small as the bound on staleness allows: the fewer answers make an update, the sooner z is
    fresh, but the more updates pass while a slow worker works. With ``auto_staleness`` tau follows the slowest worker.

    Attributes:
        active: S, between 1 and the number of live workers.
        staleness: tau, at least the configured one.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config
        self.active = config.active_workers
        self.staleness = config.max_staleness

    def adapt(self, slowest: float, living: int, oldest: int) -> None:
        """Follow what was observed.

        Args:
            slowest: As of ``Paces``.
            living: Workers that were not set aside, at least 1.
            oldest: Updates of z since the oldest step under way was sent; no bound may fall below it.
        """
        config, answers = self.config, LATE * slowest
        if not slowest:
            return
        widest = config.max_staleness * (_GROWTH if config.auto_staleness else 1)
        if config.auto_active:
            self.active = min(living, max(1, math.ceil(answers / max(1, widest - 1))))
        if config.auto_staleness:
            wanted = 1 + math.ceil(answers / self.active)
            self.staleness = max(config.max_staleness, min(widest, wanted), min(oldest + 1, self.staleness))
