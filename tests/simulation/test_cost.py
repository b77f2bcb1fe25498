"""What the server costs per message, and which part of it the garbage collector takes."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from asyndbt_dspy.core.messages import Instruction, ServerEvent
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.simulation import measure_server
from asyndbt_dspy.simulation.cost import TimedServer, waiting_config
from asyndbt_dspy.simulation.machines import light_machines


def test_a_run_says_what_a_message_costs_and_what_of_it_is_the_collectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before, frozen, seen = gc.get_threshold(), gc.get_freeze_count(), []
    receive = TimedServer.receive

    def noting(server: TimedServer, event: ServerEvent) -> list[Instruction]:
        if not seen:  # it counts all of the process's objects: once is enough
            seen.append(gc.get_freeze_count())
        elif server.messages == 200:
            seen.append(sum(isinstance(one, np.random.Generator) for one in gc.get_objects()))
        return receive(server, event)

    monkeypatch.setattr(TimedServer, "receive", noting)
    gc.set_threshold(20)  # so that a short run has passes
    try:
        row = measure_server(20, 400, 10)
    finally:
        gc.set_threshold(*before)
    assert seen[0] > frozen + 20, "the workers are none of what the server's passes go over"
    assert seen[1] == 0, "nor are the random numbers of the simulation"
    assert len(seen) == 2
    assert gc.get_freeze_count() <= frozen, "and are let go of afterwards"
    assert row["messages"] >= 400 and row["iterations"] > 0 and row["race_units"] > 0
    assert 0.0 < row["collector_us_per_message"] < row["server_us_per_message"]
    assert 1 <= row["largest_staleness"] <= 14


def test_a_pass_counts_where_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def collecting(server: ServerState, event: ServerEvent) -> list[Instruction]:
        gc.collect()
        return []

    server, _ = light_machines(3, waiting_config(2, True), calls=100, held_out=4, server_type=TimedServer)
    assert isinstance(server, TimedServer)
    monkeypatch.setattr(ServerState, "receive", collecting)
    server.receive(None)  # type: ignore[arg-type]
    assert server.collector_seconds == 0.0 < server.seconds, "nobody watches the collector outside of a run"
    with server.collector.running():
        gc.collect()
        assert server.collector.seconds > 0.0 == server.collector_seconds, (
            "a pass between two messages is not the server's"
        )
        server.receive(None)  # type: ignore[arg-type]
    assert 0.0 < server.collector_seconds < min(server.seconds, server.collector.seconds)
    assert server.collector not in gc.callbacks
