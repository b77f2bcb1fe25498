"""Deaths of a process, without one: from a chosen journal line on, nothing is written and everything unwinds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dspy
import kit

from asyndbt_dspy import AsynDBT
from asyndbt_dspy.runs.journal import JournalWriter, read_journal
from asyndbt_dspy.runs.result import Result

VOLATILE = frozenset({"seconds", "utilisation", "busy_s", "time_s", "spending"})


class Killed(BaseException):
    """The process is gone."""


@contextlib.contextmanager
def killed_before(is_last: Callable[[dict[str, Any]], bool]) -> Iterator[list[dict[str, Any]]]:
    """Let all lines be written up to the first that ``is_last`` picks, then none, in no journal.

    Yields:
        The lines that were to be written and were not; empty: the process did not die.
    """
    real: Any = JournalWriter.append
    lost: list[dict[str, Any]] = []

    def append(journal: JournalWriter, entry: Any) -> None:
        if lost or is_last(entry):
            lost.append(entry)
            raise Killed
        real(journal, entry)

    JournalWriter.append = append  # type: ignore[method-assign]
    try:
        with contextlib.suppress(Killed):
            yield lost
    finally:
        JournalWriter.append = real  # type: ignore[method-assign]


@contextlib.contextmanager
def killed_after(lines: int | None) -> Iterator[None]:
    """Let so many lines of all journals together be written, then none; ``None``: all."""
    written = 0

    def is_over(entry: dict[str, Any]) -> bool:
        nonlocal written
        written += 1
        return lines is not None and written > lines

    with killed_before(is_over):
        yield


class Asked:
    """A script that notes what it is asked."""

    def __init__(self, script: Any) -> None:
        self.script = script
        self.prompts: list[str] = []

    def __call__(self, messages: Any) -> Any:
        self.prompts.append(json.dumps(messages))
        return self.script(messages)


def compiled(
    run_dir: Path | None, script: Any, student: Any = None, *, lm: dspy.LM | None = None, **options: Any
) -> tuple[AsynDBT, Any]:
    """One compile; its optimizer, and the program or ``None`` where the process died."""
    student = student or dspy.Predict(kit.Sort)
    lm = lm or kit.scripted_lm(script, temperature=0.0)
    settings = {"workers": 2, "instructions": kit.texts_for(student), "run_dir": run_dir} | options
    settings |= {"resume": settings.get("resume", run_dir is not None)}
    optimizer = kit.optimizer(**settings)
    program = None
    with dspy.context(lm=lm):
        own = isinstance(settings["workers"], list)
        program = optimizer.compile(student, trainset=None if own else kit.examples(60))
    return optimizer, program


def steady(value: Any) -> Any:
    """A result without times, and without what attempts cost that died with their process."""
    if isinstance(value, Result):
        return steady(value.to_dict())
    if isinstance(value, dict):
        return {name: steady(one) for name, one in value.items() if name not in VOLATILE}
    return [steady(one) for one in value] if isinstance(value, list) else value


def entries(run_dir: Path, kind: str, run: int = 1) -> list[dict[str, Any]]:
    """Entries of one kind in all journals of a run."""
    paths = sorted((run_dir / "runs" / f"{run:04d}").rglob("*.jsonl"))
    return [entry for path in paths for entry in read_journal(path) if entry["kind"] == kind]


def lines_written(run_dir: Path, run: int = 1) -> int:
    paths = (run_dir / "runs" / f"{run:04d}").rglob("*.jsonl")
    return sum(len(path.read_bytes().splitlines()) for path in paths)
