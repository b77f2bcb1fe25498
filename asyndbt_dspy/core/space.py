"""What is optimized: blocks, arms, candidates (section "Setup" of the paper).

A *block* is one categorical choice among *arms*. Instruction and fragment blocks are the lower level and shared by all
workers (``p[v]``, consensus ``z``); demo blocks are the upper level and each worker's own (``q[v]``). Arm 0 of every
block leaves the student as it is: its own instructions, or an empty demo slot.

The space holds identities of arms and no text, so it may travel to the server and into a journal.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from asyndbt_dspy.errors import ConfigurationError

BlockKind = Literal["instructions", "fragment", "demo", "order", "ending"]

Candidate = tuple[int, ...]
"""One arm per block, in the order of ``Space.blocks``."""

_INT = frozenset({int})


@dataclass(frozen=True)
class Arm:
    """One choice of a block.

    Attributes:
        key: Identity of what the arm stands for. The same demo in two slots has one key, so that what is learned about
            it is shared (``algorithm.md`` 7.5). Empty for arm 0.
        home: Name of the worker whose shard the arm came from, ``None`` for arms that belong to nobody.
        shared: False for an arm that must never leave its home worker.
        order: Of an arm of an order block: the predictor's demo slots in the order shown; empty: as they come.
    """

    key: str
    home: str | None = None
    shared: bool = True
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Block:
    """One categorical choice.

    Attributes:
        name: Unique, for instance ``"classify/instructions"`` or ``"classify/demos/billing/0"``.
        predictor: The predictor's name in ``named_predictors()``.
        kind: ``"instructions"`` and ``"fragment"`` are lower level; ``"demo"``, ``"order"`` (of demos) and ``"ending"``
            (whether demos end like the turn that is to be answered) upper level.
        arms: At least one; arm 0 leaves the student as it is.
        stratum: The class that a demo slot draws from, ``None`` for a free slot.
        late: So many arms, the last ones, join during the run (``late_arms``); 0 of an upper-level block.
    """

    name: str
    predictor: str
    kind: BlockKind
    arms: tuple[Arm, ...]
    stratum: str | None = None
    late: int = 0

    def __post_init__(self) -> None:
        if not self.arms:
            raise ConfigurationError(
                f"block {self.name!r} has 0 arms; it needs at least arm 0 (the student's own)"
            )
        most = len(self.arms) - 1 if self.is_lower else 0
        if not 0 <= self.late <= most:
            raise ConfigurationError(f"block {self.name!r} has {self.late} late arms; it must be 0..{most}")

    @property
    def is_lower(self) -> bool:
        return self.kind in ("instructions", "fragment")


@dataclass(frozen=True)
class Space:
    """All blocks of a program: the lower-level blocks first, then the upper-level ones.

    Raises:
        ConfigurationError: two blocks of one name, an upper-level block before a lower-level one, or a private
            arm in a lower-level block, whose arms every worker draws.
    """

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        names = [block.name for block in self.blocks]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ConfigurationError(f"block names must be unique; used twice: {twice}")
        levels = [block.is_lower for block in self.blocks]
        if levels != sorted(levels, reverse=True):
            raise ConfigurationError(
                "lower-level blocks (instructions, fragments) must come before demos, orders and endings"
            )
        private = [
            block.name
            for block in self.blocks
            if block.is_lower and not all(arm.shared for arm in block.arms)
        ]
        if private:
            raise ConfigurationError(
                f"every worker draws the arms of {private}; mark them shared or leave them out"
            )

    @functools.cached_property
    def lower(self) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.is_lower)

    @functools.cached_property
    def upper(self) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if not block.is_lower)

    @functools.cached_property
    def demo_slots(self) -> Mapping[str, tuple[int, ...]]:
        """Per predictor the numbers of its demo blocks."""
        found: dict[str, tuple[int, ...]] = {}
        for number, block in enumerate(self.blocks):
            if block.kind == "demo":
                found[block.predictor] = (*found.get(block.predictor, ()), number)
        return found

    @functools.cached_property
    def order_blocks(self) -> Mapping[str, int]:
        """Per predictor the number of its order block, where it has one."""
        return {block.predictor: number for number, block in enumerate(self.blocks) if block.kind == "order"}

    @functools.cached_property
    def ending_blocks(self) -> Mapping[str, int]:
        """Per predictor the number of its ending block, where it has one."""
        return {block.predictor: number for number, block in enumerate(self.blocks) if block.kind == "ending"}

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Arms of every block."""
        return tuple(len(block.arms) for block in self.blocks)

    @functools.cached_property
    def _ranges(self) -> tuple[range, ...]:
        return tuple(map(range, self.sizes))

    @functools.cached_property
    def _has_private_arms(self) -> bool:
        return not all(arm.shared for block in self.blocks for arm in block.arms)

    def has_choice(self, allowed: Sequence[Sequence[int]], *, late: bool = True) -> bool:
        """Whether anything but the student can be drawn.

        Args:
            allowed: Per upper-level block the arms that a worker may draw. Without demos their order and ending change nothing.
            late: Now, or once late arms have joined.
        """
        if any(len(block.arms) - (0 if late else block.late) > 1 for block in self.lower):
            return True
        return any(
            block.kind == "demo" and any(arms) for block, arms in zip(self.upper, allowed, strict=True)
        )

    @property
    def student(self) -> Candidate:
        """The candidate that changes nothing."""
        return (0,) * len(self.blocks)

    def check(self, candidate: Sequence[int]) -> Candidate:
        """Return ``candidate`` as a tuple, or raise ``ConfigurationError`` naming the block that does not fit."""
        if (
            len(candidate) == len(self._ranges)
            and all(map(range.__contains__, self._ranges, candidate))
            and _INT.issuperset(map(type, candidate))  # True and 1.0 lie in a range too
        ):
            return tuple(candidate)
        if len(candidate) != len(self.blocks):
            raise ConfigurationError(f"a candidate has {len(self.blocks)} arms here, got {len(candidate)}")
        for arm, block in zip(candidate, self.blocks, strict=True):
            if not isinstance(arm, int | np.integer) or not 0 <= arm < len(block.arms):
                raise ConfigurationError(f"block {block.name!r} has arms 0..{len(block.arms) - 1}, got {arm}")
        return tuple(int(arm) for arm in candidate)

    def is_shared(self, candidate: Candidate) -> bool:
        """Whether every arm of ``candidate`` may leave its home worker."""
        return not self._has_private_arms or all(
            block.arms[arm].shared for arm, block in zip(candidate, self.blocks, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "blocks": [
                {
                    "name": block.name,
                    "predictor": block.predictor,
                    "kind": block.kind,
                    "stratum": block.stratum,
                    "late": block.late,
                    "arms": [[arm.key, arm.home, arm.shared, list(arm.order)] for arm in block.arms],
                }
                for block in self.blocks
            ]
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Space:
        return cls(
            tuple(
                Block(
                    name=block["name"],
                    predictor=block["predictor"],
                    kind=block["kind"],
                    stratum=block["stratum"],
                    late=block.get("late", 0),
                    arms=tuple(
                        Arm(key, home, shared, tuple(*order)) for key, home, shared, *order in block["arms"]
                    ),
                )
                for block in state["blocks"]
            )
        )
