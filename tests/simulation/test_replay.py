"""Recorded messages cost what their quickest replay costs, and lead where they led."""

from __future__ import annotations

import itertools

import pytest

from asyndbt_dspy.core.messages import Instruction, ServerEvent
from asyndbt_dspy.core.server import ServerState
from asyndbt_dspy.simulation import replay_server


def test_the_quickest_of_all_replays_counts_part_by_part() -> None:
    # Two readings a part, two parts a replay: 2 and 3 seconds in the first replay, 1 and 4 in the second.
    durations = itertools.chain.from_iterable([0.0, one] for one in (2.0, 3.0, 1.0, 4.0))
    found = replay_server(20, 300, 10, times=2, clock=durations.__next__)
    assert 200 < found["messages"] <= 400
    assert found["us_per_message"] == pytest.approx(1e6 * 4.0 / found["messages"], abs=0.01)


def test_a_replay_that_ends_elsewhere_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    first = replay_server(20, 300, 10, times=1)
    assert replay_server(20, 300, 10, times=2)["state"] == first["state"]
    kept = ServerState.receive

    def forgetful(server: ServerState, event: ServerEvent) -> list[Instruction]:
        """Loses one answer's nominations, where it is asked past the recording."""
        found = kept(server, event)
        if not getattr(server, "received", True):
            server.nominations.pop(0, None)
        return found

    monkeypatch.setattr(ServerState, "receive", forgetful)
    with pytest.raises(RuntimeError, match="ended otherwise"):
        replay_server(20, 300, 10, times=1)
