"""What the server costs per message."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from asyndbt_dspy.core.config import DEFAULT, AlgorithmConfig
from asyndbt_dspy.core.messages import Instruction, ServerEvent
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.engines.meter import RunMeter
from asyndbt_dspy.engines.protocols import SERVER, Recorded
from asyndbt_dspy.engines.simulated import SimulatedEngine, lognormal_delays
from asyndbt_dspy.simulation.machines import CoinEvaluator, light_workers

_HELD_OUT = 4


class CollectorClock:
    """CPU seconds of Python's garbage collector. Whoever makes the object that is one too many pays for a pass over everybody's."""

    seconds = 0.0
    _begun = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        del info
        if phase == "start":
            self._begun = time.thread_time()
        else:
            self.seconds += time.thread_time() - self._begun

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        gc.callbacks.append(self)
        try:
            yield
        finally:
            gc.callbacks.remove(self)


class TimedServer(ServerState):
    """Counts its messages and the CPU seconds it spends on them, ``collector_seconds`` of them in the garbage collector."""

    messages = 0
    seconds = 0.0
    collector_seconds = 0.0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.collector = CollectorClock()

    def receive(self, event: ServerEvent) -> list[Instruction]:
        begun, collected = time.thread_time(), self.collector.seconds
        instructions = super().receive(event)
        self.seconds += time.thread_time() - begun
        self.collector_seconds += self.collector.seconds - collected
        self.messages += 1
        return instructions


def waiting_config(active: int, waits: bool, **changes: Any) -> AlgorithmConfig:
    """The default's constants without an end of their own.

    Args:
        active: S; where nobody waits, S at first.
        waits: Whether who has answered waits for the next update of z, as with an ``active_workers`` of one's own; else nobody
            waits for anybody, as in a compile for which nothing was said.
    """
    endless = dataclasses.replace(DEFAULT, active_workers=active, iterations=10**9, **changes)
    return dataclasses.replace(endless, auto_active=not waits, keep_busy=not waits)


def measure_server(
    workers: int, messages: int, active: int, max_staleness: int = 15, *, waits: bool = True
) -> dict[str, Any]:
    """One simulated run of about ``messages`` messages, race included; plain figures.

    Args:
        active, waits: See ``waiting_config``.

    Returns:
        ``server_us_per_message`` is CPU time inside ``ServerState.receive``; ``collector_us_per_message`` the part of it that
        passes of the garbage collector took. These go over the server's objects and over what the simulated workers make
        during the run; what the workers hold from the start is frozen (``gc.freeze``).
    """
    config = waiting_config(active, waits, max_staleness=max_staleness)
    race = min((config.race_candidates + 1) * _HELD_OUT * workers, messages)
    calls = messages * config.draws * config.minibatch + race
    before = resident_mib()
    space, members, machines = light_workers(workers, config, held_out=_HELD_OUT)
    names = [member.name for member in members]
    engine = SimulatedEngine(lognormal_delays(0.03, 1.0, seed=workers, workers=names))
    gc.collect()  # what an earlier run left behind
    gc.freeze()  # on a cluster they live elsewhere
    server = TimedServer(space, members, config, calls)
    meter, memory = RunMeter(server), [resident_mib()]

    def watch(recorded: Recorded) -> None:
        if recorded.machine == SERVER and server.messages % max(1, messages // 10) == 0:
            memory.append(resident_mib())

    begun = time.perf_counter()
    try:
        with server.collector.running():
            asyncio.run(engine.run(server, machines, CoinEvaluator(), [meter, watch]))
    finally:
        gc.unfreeze()
    return {
        "workers": workers,
        "active": active,
        "waits": waits,
        "messages": server.messages,
        "iterations": server.version,
        "server_us_per_message": round(server.seconds / server.messages * 1e6, 2),
        "collector_us_per_message": round(server.collector_seconds / server.messages * 1e6, 2),
        "simulator_s": round(time.perf_counter() - begun, 1),
        "memory_before_mib": round(before),
        "memory_mib": [round(one) for one in memory],
        "planes": len(server.planes),
        "race_units": server.race.units if server.race is not None else 0,
        "largest_staleness": meter.largest_staleness,
        "mean_staleness": round(meter.mean_staleness, 3),
        "utilisation": round(meter.utilisation, 4),
    }


def resident_mib() -> float:
    """Memory of this process as the system counts it, in MiB."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
