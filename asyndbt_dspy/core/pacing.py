"""How fast workers are, and what follows from it. There is no clock: speeds are counted in other workers' answers.

While a worker evaluates, the others answer; the more they do meanwhile, the slower it is. With rollouts as the unit of
work, ``(work of all during its evaluation) / (its own work)`` is proportional to its seconds per rollout. So pace is a
function of the order of messages alone, and a replay of the messages repeats it bit for bit.
"""

from __future__ import annotations

import math

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig

_MEMORY = 0.9
"""Weight of the past in a smoothed pace, once there is as much of it."""
_FEWEST = 3
"""Answers that a worker must have given before it can count as slow."""
_SLOW = 0.5
"""Relative speed up to which a worker is slow; delays of one speed that vary much seldom look that unequal."""


class Paces:
    """Smoothed paces of all workers, from the order of their answers.

    A synchronous run (S = R) notes none: where all wait for each other, everybody is as slow as the slowest.

    Attributes:
        noted: Whether anything is noted.
    """

    def __init__(self, count: int, config: AlgorithmConfig) -> None:
        self.noted = config.balance and config.active_workers < count
        self._work = 0
        self._begun: dict[int, int] = {}
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
            self._median = float(np.median(known)) if known else 0.0

    def speed(self, number: int) -> float:
        """Rollouts per second in units of the median worker's, in (0, 1/2]; 1 for who is not slow or not known."""
        if self._answers[number] < _FEWEST:
            return 1.0
        relative = math.exp(self._median - self._log_pace[number])
        return relative if relative <= _SLOW else 1.0
