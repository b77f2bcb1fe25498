"""What the journals of a long run cost: time per recorded rollout, memory, and the time to read them on resume.

    python benchmarks/journal.py [--rollouts 100000] [--out FILE]

Records so many rollouts of four workers through the recorder that compiles use, each as it is recorded there, then opens the
same ``run_dir`` with ``resume=True`` in a fresh process and takes every rollout back. Memory is the peak above what the
imports take. Prints one JSON line.
"""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import argparse
import hashlib
import json
import pathlib
import platform
import resource
import tempfile
import time
from typing import Any

import dspy

from asyndbt_dspy.programs.paid_rollouts import PaidRollout, RolloutKey
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.recording.recorder import RunRecorder
from asyndbt_dspy.runs.run_directory import RunDirectory

WORKERS = ("eu", "us", "asia", "lab")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def recorder(folder: pathlib.Path) -> RunRecorder:
    manifest = {"package": "benchmark", "fingerprints": {}, "budget": {}}
    directory = RunDirectory(folder, resume=True, manifest=manifest)
    return RunRecorder(directory, WORKERS, frozenset(), "benchmark")


def key(number: int) -> RolloutKey:
    return RolloutKey(hashlib.sha256(b"%d" % number).digest(), is_repeatable=True)


def record(folder: pathlib.Path, rollouts: int) -> dict[str, Any]:
    """Record, and say what it took."""
    base, program = peak_mb(), dspy.Predict("question -> answer")
    book = recorder(folder)
    started = time.perf_counter()
    for number in range(rollouts):
        rollout = Rollout(
            float(number % 2), 0.1 + number / rollouts, seconds=0.25, feedback="right" * (number % 5)
        )
        book.keep(WORKERS[number % 4], key(number), program, PaidRollout(rollout, (1, 250, 12)))
    seconds = time.perf_counter() - started
    book.close()
    return {"ms_per_rollout": seconds / rollouts * 1e3, "recording_mb": peak_mb() - base}


def resume(folder: pathlib.Path, rollouts: int) -> dict[str, Any]:
    """Read, take every rollout, and say what it took."""
    base, program = peak_mb(), dspy.Predict("question -> answer")
    started = time.perf_counter()
    book = recorder(folder)
    read_s = time.perf_counter() - started
    for number in range(rollouts):
        paid = book.take(WORKERS[number % 4], key(number), program, trace=False)
        assert paid is not None and paid.rollout.score == float(number % 2), number
    taken_s = time.perf_counter() - started
    book.close()
    return {"resume_reads_s": read_s, "resume_reads_and_takes_s": taken_s, "resume_mb": peak_mb() - base}


def in_a_process(work: Any, *arguments: Any) -> dict[str, Any]:
    """The result of ``work`` in a copy of this process, whose memory begins with the imports alone."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writing, json.dumps(work(*arguments)).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=100_000)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        found = in_a_process(record, folder, arguments.rollouts)
        size = sum(path.stat().st_size for path in folder.rglob("*.jsonl"))
        found |= in_a_process(resume, folder, arguments.rollouts)
    line = {
        "benchmark": "journal",
        "rollouts": arguments.rollouts,
        **{name: round(value, 3) for name, value in found.items()},
        "disk_mb": round(size / 2**20, 1),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(line))
    if arguments.out:
        arguments.out.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
