"""Journals: every whole line comes back, a torn end is dropped, damage is told apart from it."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyndbt_dspy.errors import JournalError
from asyndbt_dspy.runs.journal import FORMAT, JournalWriter, decode_line, encode_line, read_journal

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def written(path: Path, count: int) -> list[bytes]:
    journal = JournalWriter(path)
    for number in range(count):
        journal.append({"kind": "rollout", "number": number, "text": "line\nwith 'breaks' \u2028 \udcff"})
    journal.close()
    return path.read_bytes().splitlines(keepends=True)


def numbers(path: Path) -> list[int]:
    return [entry["number"] for entry in read_journal(path) if entry["kind"] == "rollout"]


@given(number=st.integers(0, 10**9), entry=st.dictionaries(st.text(), JSON))
@settings(max_examples=200)
def test_a_line_gives_back_its_entry_exactly(number: int, entry: dict[str, Any]) -> None:
    line = encode_line(number, entry)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    again = decode_line(number, line[:-1])
    assert again == entry and json.dumps(again) == json.dumps(entry)


@given(place=st.integers(0, 10**6), byte=st.integers(1, 255))
@settings(max_examples=200)
def test_a_line_with_one_changed_byte_is_refused(place: int, byte: int) -> None:
    line = bytearray(encode_line(7, {"kind": "rollout", "score": 0.5, "key": "ab" * 8})[:-1])
    line[place % len(line)] ^= byte
    with pytest.raises((ValueError, KeyError, TypeError)):
        decode_line(7, bytes(line))


def test_a_line_in_another_place_is_refused() -> None:
    with pytest.raises(ValueError, match="number 3 where 4 is due"):
        decode_line(4, encode_line(3, {"kind": "rollout"})[:-1])


def test_a_line_is_one_write_that_the_system_has_when_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JournalWriter(tmp_path / "a.jsonl")
    writes: list[bytes] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, line: writes.append(line) or real(file, line))
    journal.append({"kind": "rollout", "number": 1})
    assert len(writes) == 1
    assert (tmp_path / "a.jsonl").read_bytes().endswith(writes[0]), "nothing is kept back in a buffer"


def test_a_torn_last_line_is_dropped_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    *whole, last = written(path, 3)
    for length in range(len(last)):
        path.write_bytes(b"".join(whole) + last[:length])
        assert numbers(path) == [0, 1]
        journal = JournalWriter(path)
        journal.append({"kind": "rollout", "number": 9})
        journal.close()
        assert numbers(path) == [0, 1, 9], "the torn end is cut off before the next line is written"


def test_a_torn_heading_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    (heading,) = written(path, 0)
    path.write_bytes(heading[:10])
    assert list(read_journal(path)) == []
    assert len(written(path, 2)) == 3


def test_damage_in_the_middle_names_file_line_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = written(path, 4)
    lines[2] = lines[2].replace(b'"number":1', b'"number":7')
    path.write_bytes(b"".join(lines))
    for use in (lambda: list(read_journal(path)), lambda: JournalWriter(path)):
        with pytest.raises(
            JournalError, match=r"a\.jsonl, line 3 is damaged: its checksum.*without resume=True"
        ):
            use()


def test_a_missing_line_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = written(path, 4)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(JournalError, match="line 3 is damaged: it has number 3 where 2 is due"):
        list(read_journal(path))


def test_another_file_and_a_newer_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(encode_line(0, {"kind": "rollout"}) + encode_line(1, {}))
    with pytest.raises(JournalError, match="does not begin as a journal does"):
        list(read_journal(path))
    path.write_bytes(encode_line(0, {"kind": "journal", "format": FORMAT + 1}) + encode_line(1, {}))
    with pytest.raises(JournalError, match="update asyndbt-dspy"):
        list(read_journal(path))


def test_a_folder_in_the_place_of_a_journal_is_refused(tmp_path: Path) -> None:
    for use in (lambda: list(read_journal(tmp_path)), lambda: JournalWriter(tmp_path)):
        with pytest.raises(JournalError, match=r"cannot read .*without resume=True"):
            use()


def test_a_journal_is_written_as_bytes_where_files_are_text_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary, flags, real = 1 << 40, [], os.open  # the flag of Windows
    monkeypatch.setattr(os, "O_BINARY", binary, raising=False)
    monkeypatch.setattr(
        os, "open", lambda path, how, mode: flags.append(how) or real(path, how & ~binary, mode)
    )
    JournalWriter(tmp_path / "a.jsonl").close()
    assert flags and all(how & binary for how in flags)


@pytest.mark.parametrize("fails", ["write", "ftruncate"])
def test_a_journal_that_cannot_be_begun_leaves_no_file_open(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []

    def note(*arguments: Any) -> int:
        opened.append(really(*arguments))
        return opened[-1]

    def refuse(*arguments: Any) -> int:
        raise OSError(28, "no space left on device")

    really = os.open
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", note)
        patched.setattr(os, fails, refuse)
        with pytest.raises(JournalError, match="no space left"):
            JournalWriter(tmp_path / "j.jsonl")
    (file,) = opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    journal = JournalWriter(path)

    def write(start: int) -> None:
        for number in range(start, start + 50):
            journal.append({"kind": "rollout", "number": number})

    threads = [threading.Thread(target=write, args=(start,)) for start in range(0, 400, 50)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(numbers(path)) == list(range(400))


def test_after_a_failed_write_nothing_is_glued_to_the_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    journal = JournalWriter(path)
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, line: real(file, line[:20]))
    with pytest.raises(JournalError, match=r"20 of \d+ bytes were written.*Free the disk"):
        journal.append({"kind": "rollout", "number": 0})
    monkeypatch.setattr(os, "write", real)
    with pytest.raises(JournalError, match="not written any more"):
        journal.append({"kind": "rollout", "number": 1})
    assert numbers(path) == []
    JournalWriter(path).append({"kind": "rollout", "number": 2})
    assert numbers(path) == [2]


@pytest.mark.parametrize("moment", ["write", "fsync"])
def test_after_an_interrupt_in_the_middle_of_a_write_no_line_follows_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The line is there, and the journal was never told: its number would be given again."""
    path = tmp_path / "a.jsonl"
    journal = JournalWriter(path, fsync=True)
    real = getattr(os, moment)

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(os, moment, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            journal.append({"kind": "rollout", "number": 0})
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    with pytest.raises(JournalError, match="not written any more: its last line was interrupted"):
        journal.append({"kind": "rollout", "number": 1})
    journal.close()
    JournalWriter(path).append({"kind": "rollout", "number": 2})
    assert numbers(path) == [0, 2]


def test_fsync_waits_for_the_disk_after_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    journal = JournalWriter(tmp_path / "a.jsonl", fsync=True)
    journal.append({"kind": "rollout"})
    assert len(synced) == 2, "heading and line"


def test_what_is_no_json_is_refused_before_it_is_written(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path / "a.jsonl")
    with pytest.raises(JournalError, match="'rollout' is no strict JSON"):
        journal.append({"kind": "rollout", "score": float("nan")})
    journal.append({"kind": "rollout", "number": 1})
    assert numbers(tmp_path / "a.jsonl") == [1]
