"""Whose held-out examples others may run once their holder is gone.

Members of one group hold each other's race examples. For each of them these are numbered from its own on: first its own, then
those of all others in the order of the members.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from asyndbt_dspy.core.roster import Member


class Handover:
    """Groups of members and the numbers of their examples.

    Args:
        members: All of the run, lost ones included, in their order.
    """

    def __init__(self, members: Sequence[Member] = ()) -> None:
        self._group = {member.name: member.group for member in members if member.group}
        self._count = {member.name: member.held_out for member in members if member.group}
        self._lm = {member.name: member.lm for member in members if member.group}
        self._first: dict[str, int] = {}
        ends: dict[str, int] = {}
        for name, group in self._group.items():
            self._first[name] = ends.get(group, 0)
            ends[group] = self._first[name] + self._count[name]

    def may_take(self, worker: str, holder: str) -> bool:
        """Whether ``worker`` may run examples of ``holder``, another worker."""
        return worker in self._group and self._group[worker] == self._group.get(holder)

    def is_shared(self, worker: str) -> bool:
        """Whether others hold the examples of ``worker``."""
        return worker in self._group

    def may_help(self, worker: str, holder: str) -> bool:
        """Whether ``worker`` may run examples of ``holder`` though that one lives: with another LM scores would mean another."""
        return self.may_take(worker, holder) and self._lm[worker] == self._lm[holder]

    def has_heir(self, holder: str, living: Collection[str]) -> bool:
        """Whether one of ``living``, ``holder`` itself included, may run examples of ``holder``."""
        return holder in living or any(self.may_take(worker, holder) for worker in living)

    def number(self, worker: str, holder: str, example: int) -> int:
        """What example ``example`` of ``holder`` is called at ``worker``."""
        if worker == holder:
            return example
        place, first, own = self._first[holder] + example, self._first[worker], self._count[worker]
        return own + place if place < first else place
