"""What a ``run_dir`` holds, who may write it, and which of its runs goes on.

run_dir/
  lock, holder.json             one process at a time
  runs/0001/
    manifest.json               what was run: fingerprints and settings, no text and no keys
    server.jsonl                events, instruction texts, LM attempts that belong to no worker
    workers/<name>.jsonl        rollouts and LM attempts of one worker
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from asyndbt_dspy.errors import ConfigurationError, JournalError, ResumeError

MANIFEST_FORMAT = 1
_HOLDER = "holder.json"

_PARTS = {
    "program": "the program (structure, signatures, instructions or demos)",
    "teacher": "the teacher",
    "metric": "the metric (its name or its code)",
    "adapter": "DSPy's adapter",
    "valset": "the valset",
}


class RunDirectory:
    """A locked ``run_dir`` and the one run in it that is being written.

    Args:
        path: Made where it is absent.
        resume: Continue the newest run; where there is none, a first one is started.
        manifest: What this run is: ``{"package": …, "fingerprints": {…}, "budget": {…}}``, strict JSON.

    Attributes:
        number: Of this run, from 1.
        folder: Of this run.
        run_id: Of this run in all its processes; no other run has it.
        is_resumed: Whether it continues an earlier process.
        raised: Caps of the budget that are higher than those of the earlier process; ``keep_budget`` writes them down.

    Raises:
        ConfigurationError: a file in the place of the folder, or a folder that cannot be written.
        JournalError: another process runs in it (named), or its manifest cannot be read.
        ResumeError: the newest run is of something else; the error lists every difference.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool, manifest: Mapping[str, Any]) -> None:
        self.path = Path(path)
        _make(self.path)
        self._lock = filelock.FileLock(str(self.path / "lock"), thread_local=False)
        self._acquire()
        try:
            self._sign()
            numbers = self.numbers()
            self.is_resumed = resume and bool(numbers)
            self.raised: tuple[str, ...] = ()
            self._manifest = manifest
            self.run_id = uuid.uuid4().hex
            if self.is_resumed:
                self.number = numbers[-1]
                self._check(manifest)
            else:
                self.number = (numbers[-1] if numbers else 0) + 1
                self._begin(manifest)
        except BaseException:
            self._lock.release()
            raise

    @property
    def folder(self) -> Path:
        return self.folder_of(self.number)

    @property
    def server_journal(self) -> Path:
        return self.folder / "server.jsonl"

    def worker_journal(self, worker: str, number: int | None = None) -> Path:
        """The journal of ``worker`` in this run, or in run ``number``."""
        folder = self.folder_of(self.number if number is None else number)
        return folder / "workers" / f"{safe_name(worker)}.jsonl"

    def folder_of(self, number: int) -> Path:
        return self.path / "runs" / f"{number:04d}"

    def numbers(self) -> list[int]:
        """Numbers of all runs, oldest first."""
        found = (self.path / "runs").iterdir()
        return sorted(int(one.name) for one in found if re.fullmatch(r"\d{4,}", one.name))

    def keep_budget(self) -> None:
        """From now on the raised budget is that of the run; after its journal says that it was raised."""
        if self.raised:
            try:
                self._write_manifest(self.folder, self._manifest)
            except OSError as error:
                raise JournalError(
                    f"cannot write the manifest of {self.folder}: {error}. Free the disk and go on with resume=True"
                ) from error

    def close(self) -> None:
        """Let others in."""
        self._lock.release()

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise JournalError(
                f"run_dir {str(self.path)!r} is in use by {_described_holder(self.path)}; wait until it ends, or choose "
                "another run_dir"
            ) from error
        except OSError as error:
            raise _unwritable(self.path, error) from error

    @property
    def _holder(self) -> Path:
        return self.path / _HOLDER

    def _sign(self) -> None:
        """Say who holds the lock."""
        me = {"pid": os.getpid(), "host": this_host()}
        try:
            self._holder.write_text(json.dumps(me), encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _begin(self, manifest: Mapping[str, Any]) -> None:
        """The folder appears with its manifest in it, or not at all."""
        temporary = self.path / "runs" / "new"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            (temporary / "workers").mkdir(parents=True)
            self._write_manifest(temporary, manifest)
            temporary.rename(self.folder)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _write_manifest(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        content = {"format": MANIFEST_FORMAT, "run_id": self.run_id, **manifest}
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
        part = folder / "manifest.json.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(folder / "manifest.json")

    def _check(self, manifest: Mapping[str, Any]) -> None:
        known = read_manifest(self.folder / "manifest.json")
        differences = (
            *_package_difference(known, manifest),
            *differences_of(known["fingerprints"], manifest["fingerprints"]),
            *_lowered(known["budget"], manifest["budget"]),
        )
        if differences:
            raise ResumeError(
                f"run {self.number} in {str(self.path)!r} is of something else and cannot be resumed: "
                f"{'; '.join(differences)}. Undo the change, or start a new run without resume=True (it shares the "
                "rollouts that are still valid)",
                differences,
            )
        self.raised = tuple(
            name for name, cap in manifest["budget"].items() if cap != known["budget"].get(name)
        )
        self.run_id = str(known.get("run_id") or self.run_id)  # runs of before it have none


_DEVICES = re.compile(r"con|prn|aux|nul|com[0-9]|lpt[0-9]")
"""No files on Windows, whatever follows the first dot."""


def safe_name(worker: str) -> str:
    """A file name for any worker name, different for different names (whatever the file system makes of case)."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,59}", worker) and not _DEVICES.fullmatch(worker):
        return worker
    readable = re.sub(r"[^a-z0-9_-]+", "-", worker.lower()).strip("-")[:40]
    readable += "-" * bool(_DEVICES.fullmatch(readable))
    return (
        f"{readable or 'worker'}.{hashlib.sha256(worker.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    )


def differences_of(known: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Every difference between two fingerprints, one sentence each."""
    found: list[str] = []
    for name in sorted({*known, *given}):
        old, new = known.get(name), given.get(name)
        if old == new:
            continue
        path = f"{prefix}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences_of(old, new, f"{path}.")
        elif path == "workers":
            if sorted(old or ()) == sorted(new or ()):  # else they were added or removed
                found.append(f"the order of the workers was {old} and is {new}")
        elif path in _PARTS:
            found.append(f"{_PARTS[path]} changed")
        elif path.startswith(("data.", "lms.")):
            found.append(_worker_difference(path, old, new))
        else:
            found.append(f"{path} was {old!r} and is {new!r}")
    return tuple(found)


def _worker_difference(path: str, old: Any, new: Any) -> str:
    kind, worker = path.split(".", 1)
    if old is None or new is None:
        return f"worker {worker!r} was {'added' if old is None else 'removed'}"
    if kind == "data":
        return f"the data of worker {worker!r} changed"
    return f"the LM of worker {worker!r} changed (model, endpoint or sampling)"


def read_manifest(path: Path) -> dict[str, Any]:
    """What was run.

    Raises:
        JournalError: it cannot be read, or is of a newer format.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(known, dict):
        raise _unreadable(path, "it is no JSON object")
    version = known.get("format")
    if not isinstance(version, int) or not 1 <= version <= MANIFEST_FORMAT:
        raise JournalError(
            f"{path} has format {version!r}; 1..{MANIFEST_FORMAT} are known here; update asyndbt-dspy"
        )
    for name in ("fingerprints", "budget"):
        if not isinstance(known.get(name), dict):
            raise _unreadable(path, f"it has no {name!r}")
    return known


def _unreadable(path: Path, why: object) -> JournalError:
    return JournalError(f"cannot read {path}: {why}; start a new run without resume=True")


def _package_difference(known: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    old, new = known.get("package"), given["package"]
    if old == new:
        return ()
    return (f"it was written by asyndbt-dspy {old}, and this is {new}",)


def _lowered(known: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """Caps may be raised or lifted, never lowered: what is over is spent."""
    found = []
    for name, new in given.items():
        old = known.get(name)
        if new is not None and (old is None or new < old):
            found.append(
                f"Budget({name}={new:g}) is below the {'unlimited' if old is None else old} of before"
            )
    return tuple(found)


def _make(path: Path) -> None:
    try:
        if path.exists() and not path.is_dir():  # where its name is too long, nobody can tell
            raise ConfigurationError(f"run_dir={str(path)!r} is a file; give a folder")
        (path / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise _unwritable(path, PermissionError("no permission to write"))


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"run_dir={str(path)!r} cannot be written: {error}; choose a folder that can")


def holder_of(run_dir: Path) -> tuple[int, str]:
    """Process and host of who locked it last; ``(0, "")`` where nobody can tell."""
    try:
        holder = json.loads((run_dir / _HOLDER).read_text(encoding="utf-8"))
        return int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, ""


def this_host() -> str:
    """As ``holder_of`` names it."""
    return socket.gethostname()


def _described_holder(run_dir: Path) -> str:
    pid, host = holder_of(run_dir)
    return f"process {pid} on {host}" if pid else "another process"
