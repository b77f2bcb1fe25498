"""What an engine is, and what it needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from asyndbt_dspy.core.messages import ArmsJoined, Evaluate, Scored, ServerEvent, StopSearch, WorkerEvent
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.errors import WorkerFailedError

__all__ = [
    "SERVER",
    "Between",
    "Clock",
    "Engine",
    "Evaluator",
    "ListeningEngine",
    "Observer",
    "Recorded",
    "RemoteRollouts",
    "ResumableEngine",
    "WorkerFailedError",
    "replay",
]

SERVER = "server"
"""Name of the server in recorded events; no worker may have it."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """One event as a machine took it. The sequence of these rebuilds every state.

    Attributes:
        machine: ``"server"`` or a worker's name.
        event: What it received.
        time_s: Seconds since the start on the engine's clock. For people; no state depends on it.
    """

    machine: str
    event: ServerEvent | WorkerEvent
    time_s: float


Observer = Callable[[Recorded], None]


class Evaluator(Protocol):
    """Runs candidates on a worker's examples with the worker's LM."""

    async def evaluate(self, request: Evaluate) -> Scored:
        """Score every (candidate, example) pair; a rollout that failed outside the program has ``score=None``.

        Raises:
            WorkerFailedError: the worker cannot go on.
        """
        ...


class Engine(Protocol):
    """Runs a server and its workers to the end."""

    async def run(
        self,
        server: ServerState,
        workers: Sequence[WorkerState],
        evaluator: Evaluator,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Return once the server has finished. Cancelling the call cancels every evaluation in flight."""
        ...

    def stop_search(self, stop: StopSearch) -> None:
        """Ask for an early end; the server is told ``stop`` before any other event. Safe from any thread."""
        ...


@runtime_checkable
class ResumableEngine(Protocol):
    """An engine whose order of events depends on timing, and which can repeat a recorded order."""

    def resume(self, earlier: Iterable[Recorded], elapsed_s: float = 0.0) -> None:
        """The next ``run`` first takes these events from outside (``Scored``, ``WorkerLost``, ``StopSearch``) in order.

        Each is asked for after everything that followed from the one before has happened again.
        """
        ...


Between = Callable[[], Awaitable[ArmsJoined | None]]
"""What happened outside and the server is to take now, if anything did."""


@runtime_checkable
class ListeningEngine(Protocol):
    """An engine that asks between two events whether something happened outside; what needs it works with no other.

    Attributes:
        between: Awaited between events; the next event is not taken before it returns. ``None``: nothing to ask.
    """

    between: Between | None


@runtime_checkable
class RemoteRollouts(Protocol):
    """An engine whose workers are elsewhere; the order of events is decided here, by the engine that would do without it.

    Attributes:
        recover_s: How long a lost worker may take to come back within one call.
    """

    recover_s: float

    async def start(self, workers: Mapping[str, int]) -> None:
        """Build the workers (name -> calls in flight), or find them again."""
        ...

    async def call(self, worker: str, method: str, payload: str) -> str:
        """Ask a worker; idempotent methods only, as a call may be made twice.

        Raises:
            WorkerFailedError: the worker is gone for good.
        """
        ...

    def stop(self) -> None: ...


class Clock(Protocol):
    """Seconds that only go forward."""

    def __call__(self) -> float: ...


def replay(
    recorded: Sequence[Recorded], server: ServerState, workers: Sequence[WorkerState]
) -> tuple[ServerState, dict[str, Any]]:
    """Feed recorded events to fresh machines; returns the server and the workers by name."""
    by_name = {worker.name: worker for worker in workers}
    server.start()
    for one in recorded:
        machine: Any = server if one.machine == SERVER else by_name[one.machine]
        machine.receive(one.event)
    return server, by_name
