"""Append-only journals: one JSON object per line, numbered and with a checksum.

    {"seq":0,"crc":"5a3d9c01","entry":{"kind":"journal","format":1,…}}
    {"seq":1,"crc":"77e0b1f2","entry":{"kind":"rollout",…}}

A line is handed to the operating system in one write before ``append`` returns: it survives the death of the process,
and with ``fsync`` that of the machine. A process that dies in the middle of a write leaves a torn last line, which is
dropped. A line that is wrong anywhere else is damage, and an error.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from asyndbt_dspy.errors import JournalError

FORMAT = 1
"""Version of lines and entries. A reader reads its own and older formats."""

_MIDDLE = b',"entry":'


def encode_line(number: int, entry: Mapping[str, Any]) -> bytes:
    """One line. ``entry`` is strict JSON data (no NaN).

    Raises:
        JournalError: something in ``entry`` is no JSON.
    """
    try:
        text = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError) as error:
        raise JournalError(f"an entry of kind {entry.get('kind')!r} is no strict JSON: {error}") from error
    return b'{"seq":%d,"crc":"%08x"%s%s}\n' % (number, _checksum(number, text), _MIDDLE, text)


def decode_line(number: int, line: bytes) -> dict[str, Any]:
    """The entry of line ``number``.

    Raises:
        ValueError: no such line, or another checksum than the line says.
    """
    start = line.index(_MIDDLE)
    head = json.loads(line[:start] + b"}")
    text = line[start + len(_MIDDLE) : -1]
    if head["seq"] != number:
        raise ValueError(f"it has number {head['seq']} where {number} is due")
    if head["crc"] != f"{_checksum(number, text):08x}" or line[-1:] != b"}":
        raise ValueError("its checksum does not fit its content")
    entry = json.loads(text)
    if not isinstance(entry, dict):
        raise ValueError("its entry is no JSON object")
    return entry


def _checksum(number: int, text: bytes) -> int:
    return zlib.crc32(text, zlib.crc32(b"%d" % number))


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a journal in order, its heading first; a torn last line is left out.

    Raises:
        JournalError: a damaged line that is not the last one, a missing heading, a newer format, or a file that cannot be
            read.
    """
    for entry, _ in _entries(path):
        yield entry


def _entries(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Entries, each with the offset at which its line ends."""
    try:
        yield from _read_entries(path)
    except OSError as error:
        raise JournalError(
            f"cannot read {path}: {error}. Restore the file from a copy, or start a new run (without resume=True)"
        ) from error


def _read_entries(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                if not line.endswith(b"\n"):
                    return
                entry = decode_line(number, line[:-1])
            except (ValueError, KeyError, TypeError) as error:
                if not file.read(1):
                    return  # the last line: a write that a crash cut short
                raise JournalError(
                    f"{path}, line {number + 1} is damaged: {error}. Restore the file from a copy, or start a new run "
                    "(without resume=True)"
                ) from error
            if number == 0:
                _check_heading(path, entry)
            end += len(line)
            yield entry, end


def _check_heading(path: Path, entry: Mapping[str, Any]) -> None:
    known = entry.get("format")
    if entry.get("kind") != "journal" or not isinstance(known, int):
        raise JournalError(f"{path} does not begin as a journal does: {str(dict(entry))[:80]}")
    if not 1 <= known <= FORMAT:
        raise JournalError(
            f"{path} has format {known}; 1..{FORMAT} are known here; update asyndbt-dspy to read it"
        )


class JournalWriter:
    """Appends to one journal. Safe to use from every thread of one process.

    Args:
        path: Created with a heading where it is absent or empty; else continued after its last whole line.
        fsync: Wait after each line until the disk has it.
        heading: Further fields of the first line of a new journal.

    Raises:
        JournalError: the file cannot be opened or written, or is damaged.
    """

    def __init__(self, path: Path, *, fsync: bool = False, heading: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.fsync = fsync
        self._lock = threading.Lock()
        self._broken = ""
        count, end = 0, 0
        if path.exists():
            for _, line_end in _entries(path):
                count, end = count + 1, line_end
        try:
            # On Windows a file is opened as text, whose line ends are two bytes, unless one says otherwise.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._file = os.open(path, flags, 0o600)
        except OSError as error:
            raise JournalError(f"cannot write {path}: {error}") from error
        self._count = count
        try:
            os.ftruncate(self._file, end)
            if not count:
                self.append({"kind": "journal", "format": FORMAT, **(heading or {})})
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise JournalError(f"cannot write {path}: {error}") from error
            raise

    def append(self, entry: Mapping[str, Any]) -> None:
        """Hand ``entry`` to the operating system.

        Raises:
            JournalError: it could not be written, or an earlier one was not (an interrupt in the middle of a write included);
                nothing is written after that, so that resuming finds whole lines.
        """
        with self._lock:
            if self._broken:
                raise JournalError(f"{self.path} is not written any more: {self._broken}")
            line = encode_line(self._count, entry)
            # A signal (Ctrl-C) may raise anywhere in here, and then nobody knows whether the line is written: until it is,
            # the journal counts as broken.
            self._broken = "its last line was interrupted"
            try:
                written = os.write(self._file, line)
                if written != len(line):
                    raise OSError(f"{written} of {len(line)} bytes were written")
                if self.fsync:
                    os.fsync(self._file)
            except OSError as error:
                self._broken = str(error)
                raise JournalError(
                    f"cannot write {self.path}: {error}. Free the disk and go on with resume=True"
                ) from error
            self._count += 1
            self._broken = ""

    def close(self) -> None:
        """Further appends fail; closing twice does nothing."""
        with self._lock:
            if self._broken != "it is closed":
                self._broken = "it is closed"
                os.close(self._file)
