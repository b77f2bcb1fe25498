"""The events of a run in the server's journal, and how a resumed run finds its way through them again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from asyndbt_dspy.core.messages import ArmsJoined, Scored, StopSearch, WorkerLost, decode, encode
from asyndbt_dspy.engines.protocols import Recorded
from asyndbt_dspy.errors import JournalError

_OUTSIDE = (Scored, WorkerLost, StopSearch, ArmsJoined)
"""Events that no machine causes. With them the machines repeat all others."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A recorded event: a checksum to know it again, and itself if it came from outside."""

    checksum: int
    outside: Recorded | None


class EventLog:
    """An observer of a run's events: it checks those that an earlier process recorded, and writes the others.

    Args:
        write: Takes journal entries.
        may_diverge: See below.

    Attributes:
        may_diverge: The budget was raised, or the engine cannot repeat an order of events: where it matters, the run goes
            another way than recorded from there on.
        on_live: Called once when all recorded events have happened again, or the run goes another way.
        on_rewind: Called when it does: recorded events that have not happened again never will.
    """

    def __init__(self, write: Callable[[Mapping[str, Any]], None], *, may_diverge: bool = False) -> None:
        self.on_live: Callable[[], None] = lambda: None
        self.on_rewind: Callable[[], None] = lambda: None
        self._write = write
        self.may_diverge = may_diverge
        self._known: list[_Known] = []
        self._position = 0
        self._is_closed = False
        self._was_told = False

    @property
    def known(self) -> int:
        """Recorded events."""
        return len(self._known)

    def read(self, entry: Mapping[str, Any]) -> None:
        """Take one entry of an earlier process's journal; entries of other kinds do nothing."""
        if entry["kind"] == "event":
            event = decode(entry["event"])
            outside = (
                Recorded(entry["machine"], event, entry["time_s"]) if isinstance(event, _OUTSIDE) else None
            )
            self._known.append(_Known(_checksum(entry["machine"], entry["event"]), outside))
        elif entry["kind"] == "rewind":
            del self._known[entry["events"] :]

    def outside_events(self) -> list[Recorded]:
        """All recorded events from outside."""
        return [one.outside for one in self._known if one.outside is not None]

    def scored(self) -> Iterator[Scored]:
        """Evaluations that were over."""
        for one in self.outside_events():
            if isinstance(one.event, Scored):
                yield one.event

    def outside(self) -> Iterator[Recorded]:
        """Recorded events from outside, each after everything before it has happened again."""
        while self._position < len(self._known):
            ahead = next(
                (one.outside for one in self._known[self._position :] if one.outside is not None), None
            )
            if ahead is None:
                break
            if self.may_diverge and isinstance(ahead.event, StopSearch):
                self._rewind()
                break
            position = self._position
            yield ahead
            if self._position == position:
                raise _unlike(position, "nothing happened")
        self._tell()

    def __call__(self, recorded: Recorded) -> None:
        if self._is_closed:
            return
        event = encode(recorded.event)
        if self._position < len(self._known):
            if self._known[self._position].checksum == _checksum(recorded.machine, event):
                self._position += 1
                if self._position == len(self._known):
                    self._tell()
                return
            if not self.may_diverge:
                raise _unlike(self._position, f"{recorded.machine!r} got a {type(recorded.event).__name__}")
            self._rewind()
        self._write(
            {
                "kind": "event",
                "machine": recorded.machine,
                "time_s": round(recorded.time_s, 6),
                "event": event,
            }
        )

    def close(self) -> None:
        """Events from now on (of an interrupt) are no part of the run: resuming goes on before them."""
        self._is_closed = True

    def _rewind(self) -> None:
        self._write({"kind": "rewind", "events": self._position})
        del self._known[self._position :]
        self.on_rewind()
        self._tell()

    def _tell(self) -> None:
        if not self._was_told:
            self._was_told = True
            self.on_live()


def _unlike(position: int, happened: str) -> JournalError:
    return JournalError(
        f"event {position + 1} of the recorded run does not happen again: {happened}. The program, the data or the code "
        "behaves otherwise than before; start a new run without resume=True"
    )


def _checksum(machine: str, event: Any) -> int:
    return zlib.crc32(json.dumps([machine, event], separators=(",", ":")).encode())
