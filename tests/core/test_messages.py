"""The codec: every message survives JSON, old recordings stay readable, garbage is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from asyndbt_dspy.core import messages, snapshots
from asyndbt_dspy.core.messages import FORMAT, decode, encode
from asyndbt_dspy.core.policies import Nomination
from asyndbt_dspy.errors import ProtocolError

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "messages_format_1.json"

reals = st.floats(allow_nan=False)
numbers = st.integers(0, 10**6)
names = st.text(max_size=8)
arms = st.lists(st.integers(0, 99), max_size=4).map(tuple)
vectors = hnp.arrays(np.float64, st.integers(0, 5))
matrices = hnp.arrays(np.float64, st.tuples(st.integers(0, 3), st.integers(0, 3)))
nominations = st.lists(st.builds(Nomination, arms, reals, reals, numbers), max_size=3).map(tuple)
scores = st.lists(st.lists(st.none() | reals, max_size=3).map(tuple), max_size=3).map(tuple)
outcomes = st.builds(messages.Outcome, st.none() | reals, st.none() | reals, st.none() | reals, st.booleans())

MESSAGES = {
    "StepRequest": st.builds(
        messages.StepRequest,
        names,
        numbers,
        vectors,
        vectors,
        vectors,
        vectors,
        matrices,
        numbers,
        numbers,
        numbers,
        arms,
    ),
    "StepReply": st.builds(
        messages.StepReply,
        names,
        numbers,
        vectors,
        st.none() | vectors,
        vectors,
        st.none() | matrices,
        st.none() | matrices,
        matrices,
        nominations,
        numbers,
        numbers,
        st.floats(),
        numbers,
    ),
    "RoundRequest": st.builds(messages.RoundRequest, names, numbers, numbers, vectors, vectors, vectors),
    "RoundReply": st.builds(messages.RoundReply, names, numbers, numbers, vectors, numbers),
    "RaceRequest": st.builds(messages.RaceRequest, names, numbers, st.lists(arms, max_size=3).map(tuple), arms),
    "RaceReply": st.builds(messages.RaceReply, names, numbers, scores, scores, numbers),
    "Stop": st.builds(messages.Stop, names),
    "WorkerLost": st.builds(messages.WorkerLost, names, names),
    "StopSearch": st.builds(messages.StopSearch, names, st.booleans(), st.none() | numbers, st.booleans()),
    "ArmsJoined": st.builds(messages.ArmsJoined, arms),
    "Scored": st.builds(
        messages.Scored,
        names,
        numbers,
        st.lists(st.lists(outcomes, max_size=3).map(tuple), max_size=3).map(tuple),
        numbers,
    ),
    "Evaluate": st.builds(
        messages.Evaluate,
        names,
        numbers,
        st.lists(arms, max_size=3).map(tuple),
        st.lists(arms, max_size=3).map(tuple),
        st.booleans(),
    ),
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, arrays and not-a-number included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        alike = one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
        return alike and np.nan_to_num(one).tobytes() == np.nan_to_num(other).tobytes()
    if dataclasses.is_dataclass(one):
        return all(
            same(getattr(one, part.name), getattr(other, part.name)) for part in dataclasses.fields(one)
        )
    if isinstance(one, tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other)


@pytest.mark.parametrize("kind", MESSAGES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_message_survives_strict_json(kind: str, data: st.DataObject) -> None:
    message = data.draw(MESSAGES[kind])
    text = json.dumps(encode(message), allow_nan=False)
    oldest = 2 if getattr(message, "repeat", 0) else 1
    oldest = 3 if getattr(message, "minibatch", 0) else oldest
    oldest = 4 if isinstance(message, messages.ArmsJoined) or getattr(message, "open", ()) else oldest
    oldest = 5 if any(one.skipped for row in getattr(message, "outcomes", ()) for one in row) else oldest
    is_told = isinstance(message, messages.StopSearch) and (message.is_dry or message.calls is not None)
    oldest = 6 if is_told else oldest
    assert json.loads(text)["format"] == oldest
    assert same(decode(json.loads(text)), message)


@pytest.mark.parametrize("kind", sorted(MESSAGES))
@given(data=st.data())
def test_a_snapshot_shows_all_that_a_message_holds(kind: str, data: st.DataObject) -> None:
    """Snapshots are how two states are found equal: of a machine that holds messages they show what these say."""
    message = data.draw(MESSAGES[kind])
    name, shown = snapshots.plain(message)
    assert name == kind and set(shown) == {one.name for one in dataclasses.fields(message)}
    for one in dataclasses.fields(message):
        assert shown[one.name] == snapshots.plain(getattr(message, one.name))
    if kind == "StepReply" and message.nominations:
        assert shown["nominations"][0][1]["count"] == message.nominations[0].count


def test_the_strategies_cover_every_message_there_is() -> None:
    assert set(MESSAGES) | {"Outcome", "Nomination"} == set(messages._CODEC)


def test_numpy_scalars_become_plain_numbers() -> None:
    lost = messages.RoundReply("w", np.int64(3), 0, np.array([1.0]), np.int64(2))  # type: ignore[arg-type]
    assert json.loads(json.dumps(encode(lost)))["version"] == 3


def _without_later_fields(state: Any) -> Any:
    """An encoded message without fields that came after the fixture was written; all of them may be missing."""
    if isinstance(state, list):
        return [_without_later_fields(item) for item in state]
    if not isinstance(state, dict):
        return state
    later = {"Outcome": {"margin"}}.get(state.get("type", ""), set())
    return {name: _without_later_fields(value) for name, value in state.items() if name not in later}


def test_recordings_of_format_1_stay_readable() -> None:
    """Written once; a later format must still decode them to the same messages."""
    for entry in json.loads(FIXTURE.read_text()):
        message = decode(entry)
        assert type(message).__name__ == entry["type"]
        again = encode(message)
        assert _without_later_fields(again) == entry


def test_the_fixture_holds_every_kind() -> None:
    kinds = {entry["type"] for entry in json.loads(FIXTURE.read_text())}
    assert kinds == set(MESSAGES) - {"ArmsJoined"}


def test_a_message_of_format_4_stays_readable() -> None:
    entry = {"format": 4, "type": "ArmsJoined", "open": [6, 1]}
    assert decode(entry) == messages.ArmsJoined((6, 1))
    assert encode(messages.ArmsJoined((6, 1))) == entry


def test_a_message_of_format_5_stays_readable() -> None:
    skipped = {"type": "Outcome", "score": None, "cross_entropy": None, "margin": None, "skipped": True}
    entry = {"format": 5, "type": "Scored", "worker": "w0", "task": 3, "outcomes": [[skipped]], "calls": 0}
    message = messages.Scored("w0", 3, ((messages.Outcome(None, skipped=True),),), 0)
    assert decode(entry) == message
    assert encode(message) == entry


GOOD = {"format": 1, "type": "Stop", "worker": "w0"}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (None, "no format number"),
        ([], "no format number"),
        ({"type": "Stop", "worker": "w0"}, "no format number"),
        ({**GOOD, "format": FORMAT + 1}, "update asyndbt-dspy"),
        ({**GOOD, "format": 0}, "not known here"),
        ({**GOOD, "type": "Nonsense"}, "unknown message type 'Nonsense'"),
        ({**GOOD, "type": ["Stop"]}, "unknown message type"),
        ({"format": 1, "worker": "w0"}, "unknown message type None"),
        ({**GOOD, "more": 1}, "does not fit format 1"),
        ({"format": 1, "type": "Stop"}, "does not fit format 1"),
        ({**GOOD, "worker": {"array": [1.0], "shape": [3]}}, "does not fit format 1"),
        ({**GOOD, "worker": {"array": ["x"], "shape": [1]}}, "does not fit format 1"),
        ({**GOOD, "worker": {"array": [1.0]}}, "does not fit format 1"),
        ({**GOOD, "worker": {"float": "many"}}, "does not fit format 1"),
    ],
    ids=str,
)
def test_garbage_is_refused(state: Any, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        decode(state)
