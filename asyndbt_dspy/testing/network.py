"""A hostile network between the shipped machines: messages wait in flight until a test delivers, repeats, spoils or
drops them. No engine, no clock, no asyncio."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asyndbt_dspy.core.messages import Evaluate, Finish, Instruction, Outcome, Send, WorkerLost
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.testing.toys import TableEvaluator, score_table

SERVER = "server"


@dataclass(frozen=True)
class Parcel:
    """One event on its way to a machine.

    Attributes:
        to: ``"server"`` or a worker's name.
        sender: Where it comes from; a worker's evaluations come from itself.
    """

    to: str
    sender: str
    event: Any


class Network:
    """Carries events between one server and its workers, in whatever order the test wants.

    Attributes:
        in_flight: What may be delivered next.
        delivered: What was, in order.
        finished: Whether the server said so.
    """

    def __init__(self, server: ServerState, workers: Sequence[WorkerState], table: TableEvaluator) -> None:
        self.server = server
        self.workers = {worker.name: worker for worker in workers}
        self.table = table
        self.in_flight: list[Parcel] = []
        self.delivered: list[Parcel] = []
        self.finished = False
        self._post(SERVER, server.start())

    def deliver(self, place: int) -> Parcel:
        """Hand over the parcel at this place of ``in_flight``."""
        parcel = self.in_flight.pop(place)
        self.hand_over(parcel)
        self.delivered.append(parcel)
        return parcel

    def hand_over(self, parcel: Parcel) -> None:
        """Let the machine receive it, and post what it says.

        Raises:
            ProtocolError: the machine refuses.
        """
        machine: Any = self.server if parcel.to == SERVER else self.workers[parcel.to]
        self._post(parcel.to, machine.receive(parcel.event))

    def lose(self, worker: str) -> None:
        """The worker's connection breaks: what it was sent and what it sent is dropped, the server is told."""
        self.in_flight = [one for one in self.in_flight if worker not in (one.to, one.sender)]
        self.hand_over(Parcel(SERVER, SERVER, WorkerLost(worker, "connection lost")))

    def state(self) -> Any:
        """Snapshots of every machine."""
        return [self.server.snapshot(), *(worker.snapshot() for worker in self.workers.values())]

    def _post(self, sender: str, instructions: Sequence[Instruction]) -> None:
        for one in instructions:
            if isinstance(one, Finish):
                self.finished = True
            elif isinstance(one, Evaluate):
                self.in_flight.append(Parcel(sender, sender, score_table(one, self.table)))
            elif isinstance(one, Send):
                to = one.message.worker if sender == SERVER else SERVER
                self.in_flight.append(Parcel(to, sender, one.message))


def corruptions(event: Any) -> Iterator[tuple[str, Any]]:
    """Variants of a valid event that no machine may accept, each with the name of the field that was spoilt."""
    for field in dataclasses.fields(event):
        value = getattr(event, field.name)
        for wrong in _spoilt(field.name, value, type(event).__name__.endswith("Request")):
            yield field.name, dataclasses.replace(event, **{field.name: wrong})


def _spoilt(name: str, value: Any, is_request: bool) -> list[Any]:
    if name == "worker":
        return ["nobody", None, ["w0"]]
    if isinstance(value, np.ndarray):
        return _spoilt_array(name, value)
    if value is None:  # upper, curvature, cross: absent or of their one shape
        return [np.zeros(1), "x"]
    if isinstance(value, int):
        # A worker cannot know how far the server has come, nor how many examples a race has.
        return [-1, None, "1", 0.5, float("nan"), *([] if is_request else [10**9])]
    if isinstance(value, float):
        return [None, "0.5"]
    if name in ("scores", "soft_scores"):
        wrong = [None, value[:-1], (*value, ()), _filled(value, 2.0j), _filled(value, float("nan"))]
        return [*wrong, _filled(value, 2.0)] if name == "soft_scores" else wrong
    if name == "outcomes":
        bad = (
            None,
            Outcome(float("inf")),
            Outcome(1.0, -0.1),
            Outcome(1.0, float("nan")),
            Outcome(1.0, 0.1, float("nan")),
            Outcome(1.0, skipped=True),
        )
        return [None, value[:-1], (*value, ()), *(_filled(value, one) for one in bad)]
    return [None, "x", (*value, None), (*value, -1)] if isinstance(value, tuple) else []


def _spoilt_array(name: str, value: np.ndarray) -> list[Any]:
    wrong: list[Any] = [value.tolist(), "x", np.append(value, 0.5), value.astype(np.int64)]
    if name not in ("upper", "cross", "curvature"):
        wrong.append(None)
    if value.size:
        wrong += [value * np.nan, value + np.inf, value[:-1]]
    if name in ("lower", "upper", "consensus", "start") and value.size:
        wrong += [value + 0.5, value - 0.5]
    if name == "effects" and value.size:
        wrong += [value - np.ones_like(value) * (value[0].max() + 1.0)]
    return wrong


def _filled(rows: tuple[tuple[Any, ...], ...], item: Any) -> Any:
    """Rows of the same lengths that hold nothing but ``item``."""
    return tuple(tuple(item for _ in row) for row in rows)
