"""What all engines share: carry messages, record events, set faulty workers aside."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from asyndbt_dspy.core.messages import (
    ArmsJoined,
    Evaluate,
    Finish,
    Instruction,
    Scored,
    Send,
    ServerEvent,
    StepReply,
    StopSearch,
    WorkerLost,
)
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.protocols import SERVER, Clock, Observer, Recorded
from asyndbt_dspy.errors import ConfigurationError, ProtocolError

_LOGGER = logging.getLogger(__name__)


class Driver:
    """Delivers instructions until only evaluations are left to do. Engines decide when those end.

    Args:
        clock: Seconds since the start; only stamps recorded events.

    Raises:
        ConfigurationError: workers other than the server's members, or one named ``"server"``.
    """

    def __init__(
        self, server: ServerState, workers: Sequence[WorkerState], observers: Sequence[Observer], clock: Clock
    ) -> None:
        members = [member.name for member in server.members]
        if [worker.name for worker in workers] != members or SERVER in members:
            raise ConfigurationError(
                f"workers {[worker.name for worker in workers]} must be the server's members {members}, in order, "
                f"and none may be named {SERVER!r}"
            )
        self.server = server
        self.workers = {worker.name: worker for worker in workers}
        self.observers = tuple(observers)
        self.clock = clock
        self.finished = False
        self.lost: dict[str, str] = {}
        self.largest_staleness = 0

    def start(self) -> list[Evaluate]:
        return self._deliver(self.server.start())

    def complete(self, scored: Scored) -> list[Evaluate]:
        """An evaluation ended; a worker that was set aside meanwhile is no longer asked."""
        if scored.worker in self.lost or self.finished:
            return []
        worker = self.workers[scored.worker]
        instructions = worker.receive(scored)
        self._record(worker.name, scored)
        evaluations: list[Evaluate] = []
        for one in instructions:
            assert isinstance(one, Send)  # a worker that was scored always replies
            evaluations += self.to_server(one.message)  # type: ignore[arg-type]
        return evaluations

    def to_server(self, event: ServerEvent) -> list[Evaluate]:
        """Hand ``event`` to the server. A message it refuses costs the sender its place."""
        if isinstance(event, StepReply):
            self.largest_staleness = max(self.largest_staleness, self.server.version - event.version)
        try:
            instructions = self.server.receive(event)
        except ProtocolError as error:
            if isinstance(event, (StopSearch, WorkerLost, ArmsJoined)):
                raise
            return self.lose(event.worker, f"its message was refused: {error}")
        self._record(SERVER, event)
        return self._deliver(instructions)

    def lose(self, worker: str, reason: str) -> list[Evaluate]:
        """Set ``worker`` aside; the run goes on without it."""
        if worker in self.lost or self.finished:
            return []
        _LOGGER.warning("worker %r is set aside: %s", worker, reason)
        self.lost[worker] = reason
        return self.to_server(WorkerLost(worker, reason))

    def stop_search(self, stop: StopSearch) -> list[Evaluate]:
        return [] if self.finished else self.to_server(stop)

    def join_arms(self, event: ArmsJoined) -> list[Evaluate]:
        return [] if self.finished else self.to_server(event)

    def _deliver(self, instructions: Sequence[Instruction]) -> list[Evaluate]:
        evaluations: list[Evaluate] = []
        for one in instructions:
            if isinstance(one, Finish):
                self.finished = True
            elif isinstance(one, Send):
                worker = self.workers[one.message.worker]
                replies = worker.receive(one.message)  # type: ignore[arg-type]
                self._record(worker.name, one.message)
                evaluations += [reply for reply in replies if isinstance(reply, Evaluate)]
        return evaluations

    def _record(self, machine: str, event: object) -> None:
        recorded = Recorded(machine, event, self.clock())  # type: ignore[arg-type]
        for observer in self.observers:
            observer(recorded)
