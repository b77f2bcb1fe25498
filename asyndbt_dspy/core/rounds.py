"""The lower-level estimate in its barrier form: K rounds in which every worker is asked (``algorithm.md`` 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.lower_level import LowerEstimate, RoundState, server_round
from asyndbt_dspy.core.messages import RoundRequest
from asyndbt_dspy.core.simplex import FloatArray, Layout

_MANY = 256
"""Workers from which on planes are not refreshed before a quarter of them answered anew."""


class RefreshSchedule:
    """When planes are refreshed: every delta iterations.

    With very many workers, and phi from buffers, not before a quarter of them answered: where few of them make an update,
    the buffers hardly change from one to the next, and a refresh costs what all of them weigh.
    """

    def __init__(self, config: AlgorithmConfig) -> None:
        self.config = config
        self._is_over = False  # the period
        self._answers = 0

    def is_due(self, version: int, answers: int, living: int) -> bool:
        """Whether to refresh after the update that made ``version`` of so many answers; if so, it starts anew."""
        self._is_over |= (version - 1) % self.config.plane_period == 0
        self._answers += answers
        enough = not self.config.buffered_lower or living < _MANY or 4 * self._answers >= living
        if not (self._is_over and enough):
            return False
        self._is_over, self._answers = False, 0
        return True


@dataclass
class BarrierRounds:
    """Rounds in progress.

    Attributes:
        state: Of all workers, without derivatives (one column); rows of lost ones are not touched.
        resume: Workers that made the iteration before; they get their next step after the rounds.
        waiting: Workers that this round still waits for.
        asked: Those among them that hold a request (the others are still busy with a step).
        number: Rounds done so far.
    """

    state: RoundState
    resume: list[int]
    waiting: set[int]
    asked: set[int]
    number: int = 0

    @classmethod
    def start(cls, p: FloatArray, z: FloatArray, alive: Sequence[int], resume: list[int]) -> BarrierRounds:
        return cls(RoundState.start(p, z), resume, set(alive), set())

    @property
    def estimate(self) -> LowerEstimate:
        return LowerEstimate(self.state.p[..., 0], self.state.z[..., 0])

    def request(self, name: str, number: int, version: int) -> RoundRequest:
        """This round's request to worker ``number``."""
        self.asked.add(number)
        return RoundRequest(
            worker=name,
            version=version,
            number=self.number,
            start=self.state.p[number, :, 0].copy(),
            consensus=self.state.z[:, 0].copy(),
            rho=self.state.rho[number, :, 0].copy(),
        )

    def take(self, number: int, lower: FloatArray) -> None:
        self.state.p[number, :, 0] = lower
        self.waiting.discard(number)
        self.asked.discard(number)

    def lose(self, number: int) -> bool:
        """A worker is gone; returns whether it held a request."""
        self.waiting.discard(number)
        held = number in self.asked
        self.asked.discard(number)
        return held

    def close(self, layout: Layout, config: AlgorithmConfig, alive: Sequence[int]) -> None:
        """The server's half of the round, in worker order; then the next one is open."""
        rows = np.array(alive)
        state = self.state
        part = server_round(layout, config, RoundState(state.p[rows], state.z, state.rho[rows]))
        state.rho[rows] = part.rho
        self.state = RoundState(state.p, part.z, state.rho)
        self.number += 1
        self.waiting = set(alive)
