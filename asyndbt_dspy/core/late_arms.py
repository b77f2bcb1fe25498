"""Arms that join during a run: numbered from the start, drawn by nobody until they have joined.

Vectors keep their shapes, so nothing is renumbered and no message of before becomes invalid. Until an arm joins, its
probability is its block's arm 0's: draws and decisions read ``LateArms.read`` of a distribution in place of the distribution.
When arms join, a worker gives them half of its own distribution (``admit``), whatever was learned about them as stand-ins for
arm 0: the others had the first part of the search to themselves. Through the workers' answers z follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from asyndbt_dspy.core.messages import ArmsJoined, Instruction, Wait
from asyndbt_dspy.core.simplex import FloatArray, Layout
from asyndbt_dspy.core.space import Space
from asyndbt_dspy.errors import ProtocolError

_SHARE = 0.5
"""Part of a block's probability that goes to what joins."""


class LateArms:
    """Which lower-level arms may be drawn.

    Attributes:
        open: Per lower-level block how many arms, counted from arm 0, have joined; those behind them have not.
        said: ``open`` as the server's requests say it: empty as long as it is as at the start.
    """

    def __init__(self, space: Space) -> None:
        self._names = tuple(block.name for block in space.lower)
        self._layout = Layout(tuple(len(block.arms) for block in space.lower))
        self.open = tuple(len(block.arms) - block.late for block in space.lower)
        self.said: tuple[int, ...] = ()
        self._has_closed = self.open != self._layout.sizes

    @property
    def are_awaited(self) -> bool:
        """Whether nothing has joined yet that may."""
        return self._has_closed and not self.said

    def take(self, event: ArmsJoined, phase: str) -> list[Instruction]:
        """The server's part: nothing moves, but requests from now on say what has joined."""
        now = self.check("the event ArmsJoined", event.open)
        if phase == "race":
            return [Wait("the search is over, and nothing new is drawn")]
        self.join(now)
        self.said = now
        return [Wait("the next requests say which arms have joined")]

    def check(self, origin: str, wanted: Any) -> tuple[int, ...]:
        """``wanted`` if it fits the blocks and takes no arm back, else ``ProtocolError``."""
        if not isinstance(wanted, tuple) or len(wanted) != len(self.open):
            raise ProtocolError(
                f"{origin} opens arms of {wanted!r}; there are {len(self.open)} lower-level blocks"
            )
        for name, size, before, now in zip(self._names, self._layout.sizes, self.open, wanted, strict=True):
            if type(now) is not int or not before <= now <= size:
                raise ProtocolError(
                    f"{origin} opens {now!r} arms of block {name!r}; it must be {before}..{size}"
                )
        return wanted

    def join(self, now: Sequence[int]) -> None:
        """So many arms per block have joined (``check`` comes first)."""
        self.open = tuple(now)
        self._has_closed = self.open != self._layout.sizes

    def read(self, vector: FloatArray) -> FloatArray:
        """``vector [D]`` with the probability of arms that have not joined given to their block's arm 0."""
        if not self._has_closed:
            return vector
        result = vector.copy()
        for part, count in zip(self._layout.slices, self.open, strict=True):
            closed = slice(part.start + count, part.stop)
            result[part.start] += float(result[closed].sum())
            result[closed] = 0.0
        return result

    def admit(self, vector: FloatArray, before: Sequence[int]) -> FloatArray:
        """``vector [D]`` with half of a block, or their part of its arms if that is more, for what joined since ``before``."""
        result = vector.copy()
        for part, old, count in zip(self._layout.slices, before, self.open, strict=True):
            if count == old:
                continue
            new, joined = slice(part.start + old, part.start + count), count - old
            share = max(_SHARE, joined / count)
            result[part.start] += float(result[new].sum())  # it stood in for these
            result[new] = 0.0
            result[part] *= 1.0 - share
            result[new] = share / joined
        return np.asarray(result)
