"""What a message costs the server alone: recorded messages of a simulated search, replayed into fresh servers."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from asyndbt_dspy.core.messages import Instruction, ServerEvent
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.core.worker import WorkerState
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.simulation.cost import waiting_config
from asyndbt_dspy.simulation.machines import CoinEvaluator, light_machines

_CHUNK = 200
"""Messages that are timed together; of all replays the quickest time of each such part counts."""


class RecordingServer(ServerState):
    """Keeps what it receives."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.received: list[ServerEvent] = []

    def receive(self, event: ServerEvent) -> list[Instruction]:
        self.received.append(event)
        return super().receive(event)


def replay_server(
    workers: int,
    messages: int,
    active: int,
    times: int = 12,
    *,
    waits: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """One simulated search of about ``messages`` messages, taken again by ``times`` servers; plain figures.

    Args:
        active, waits: See ``waiting_config``.

    Returns:
        ``us_per_message``, and ``state``: a hash of the state that the recording server and all others end in, by which
        versions of the server can be compared.

    Raises:
        RuntimeError: a replay ended in another state.
    """
    config = waiting_config(active, waits, max_staleness=15, race=False)
    calls = messages * config.draws * config.minibatch

    def machines(server_type: type[ServerState]) -> tuple[ServerState, list[WorkerState]]:
        return light_machines(workers, config, calls=calls, held_out=4, server_type=server_type)

    recording, states = machines(RecordingServer)
    assert isinstance(recording, RecordingServer)
    engine = SimulatedEngine(lognormal_delays(0.03, 1.0, seed=workers))
    asyncio.run(engine.run(recording, states, CoinEvaluator(), []))
    received, recording.received = recording.received, []
    state, best = _hash(recording), [float("inf")] * -(-len(received) // _CHUNK)
    for _ in range(times):
        server, _ = machines(RecordingServer)
        server.start()
        gc.collect()
        for number in range(len(best)):
            chunk = received[number * _CHUNK : (number + 1) * _CHUNK]
            begun = clock()
            for event in chunk:
                ServerState.receive(server, event)
            best[number] = min(best[number], clock() - begun)
        if _hash(server) != state:
            raise RuntimeError(f"a replay of {len(received)} messages to {workers} workers ended otherwise")
    return {
        "workers": workers,
        "waits": waits,
        "messages": len(received),
        "us_per_message": round(1e6 * sum(best) / len(received), 2),
        "state": state,
    }


def _hash(server: ServerState) -> str:
    text = json.dumps(server.snapshot(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
