"""What a message costs the server alone: recorded messages of simulated runs, replayed into fresh servers.

    python benchmarks/server_replay.py [--messages 20000] [--times 12] [--out FILE]

``benchmarks/scale.py`` times the server between thousands of simulated workers that empty the processor's caches, on
whatever else the machine does. Here nothing else runs: the messages of a search (100, 1,000 and 10,000 workers) are recorded once
and then taken by a fresh server as often as ``--times`` says; per 200 messages the quickest time counts. The states that
the servers end in are compared, and must be equal; so are those of two versions by ``state`` (run the script with each).
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import hashlib
import json
import pathlib
import platform
import time
from typing import Any

from asyndbt_dspy.core.config import DEFAULT
from asyndbt_dspy.core.messages import Instruction, ServerEvent
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.simulation.machines import CoinEvaluator, light_machines

CHUNK = 200
SIZES = ((100, 50), (1_000, 500), (10_000, 5_000))
"""Workers, and S."""


class RecordingServer(ServerState):
    """Keeps what it receives."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.received: list[ServerEvent] = []

    def receive(self, event: ServerEvent) -> list[Instruction]:
        self.received.append(event)
        return super().receive(event)


def measure(workers: int, active: int, messages: int, times: int) -> dict[str, Any]:
    """Microseconds per message, and a hash of the state that all replays end in."""
    config = dataclasses.replace(
        DEFAULT, active_workers=active, max_staleness=15, iterations=10**9, race=False
    )
    calls = messages * config.draws * config.minibatch

    def machines(server_type: type[ServerState]) -> Any:
        return light_machines(workers, config, calls=calls, held_out=4, server_type=server_type)

    recording, states = machines(RecordingServer)
    engine = SimulatedEngine(lognormal_delays(0.03, 1.0, seed=workers))
    asyncio.run(engine.run(recording, states, CoinEvaluator(), []))
    best, hashes = [float("inf")] * -(-len(recording.received) // CHUNK), set()
    for _ in range(times):
        server, _ = machines(ServerState)
        server.start()
        gc.collect()
        for number in range(len(best)):
            chunk = recording.received[number * CHUNK : (number + 1) * CHUNK]
            begun = time.perf_counter()
            for event in chunk:
                server.receive(event)
            best[number] = min(best[number], time.perf_counter() - begun)
        text = json.dumps(server.snapshot(), sort_keys=True)
        hashes.add(hashlib.sha256(text.encode()).hexdigest()[:12])
    [state] = hashes
    return {
        "workers": workers,
        "messages": len(recording.received),
        "us_per_message": round(1e6 * sum(best) / len(recording.received), 2),
        "state": state,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    arms = [measure(workers, active, options.messages, options.times) for workers, active in SIZES]
    line = json.dumps({"benchmark": "server_replay", "python": platform.python_version(), "arms": arms})
    print(line)
    if options.out:
        options.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
