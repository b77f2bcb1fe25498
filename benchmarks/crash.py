"""``kill -9`` at random moments of a compile: is anything paid for twice, and is the result that of an undisturbed run?

    python benchmarks/crash.py [--kills 200] [--out FILE]

Each run compiles a classifier with three workers, ``deterministic=True`` and a ``run_dir``, against an OpenAI-compatible
provider on loopback (its own process, a real socket), DSPy's cache off. It is killed at a random moment and resumed; three in
ten are killed again while they resume. The provider notes every prompt it is asked. Every answer carries the hash of its
prompt, the metric passes it on, and so the journals say which prompts were recorded: a prompt that is asked again by a process
that found it recorded was paid for twice. Odd runs go through LiteLLM, even ones through DSPy's own client.

Prints one JSON line: ``kills``, ``paid_twice`` (prompts), ``identical`` (kills whose run ended with the very program and
result of the undisturbed run).
"""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import argparse
import contextlib
import hashlib
import json
import logging
import pathlib
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import dspy
import litellm  # noqa: F401 - imported before the forks, so that each of them need not

from asyndbt_dspy import AsynDBT, Budget
from asyndbt_dspy.testing.provider import Provider

LABELS = ("red", "green", "blue")
CLIENTS = ("auto", "litellm")
SEEDS = 3
AGAIN = 0.3
"""Share of resumed runs that are killed once more."""
LATENCY_S = 0.004
VOLATILE = frozenset({"seconds", "busy_s", "time_s", "spending"})
"""Times; and the account of attempts, in which those that a kill cut off count as cut."""


class Sort(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField()
    label: Literal["red", "green", "blue"] = dspy.OutputField()
    ticket: str = dspy.OutputField(desc="number of the answer")


def ticket_of(messages: Any) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


def answerer(log: int) -> Callable[[list[dict[str, Any]]], str]:
    """Answers by hash, better with good instructions and demos; notes every prompt in the file ``log``."""

    def answer(messages: list[dict[str, Any]]) -> str:
        ticket = ticket_of(messages)
        os.write(log, f"{ticket}\n".encode())
        last = str(messages[-1]["content"])
        number = int(last.split("item ", 1)[1].split()[0])
        skill = 2 + 3 * ("step by step" in str(messages[0]["content"])) + len(messages) // 2
        is_right = int(ticket, 16) % 10 < min(9, skill)
        label = LABELS[number % 3] if is_right else LABELS[(number + 1) % 3]
        return json.dumps({"label": label, "ticket": ticket})

    return answer


def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> dspy.Prediction:
    return dspy.Prediction(score=float(gold.label == prediction.label), feedback=prediction.ticket)


def compile_once(url: str, client: str, seed: int, run_dir: pathlib.Path, calls: int) -> dict[str, Any]:
    """One compile to its end; what must be the same for an undisturbed and a resumed run."""
    examples = [
        dspy.Example(message=f"item {number} of the list", label=LABELS[number % 3]).with_inputs("message")
        for number in range(90)
    ]
    options = {"engine": "litellm"} if client == "litellm" else {}
    lm = dspy.LM(
        "openai/judge", api_base=url, api_key="k", cache=False, temperature=0.0, max_tokens=100, **options
    )
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        optimizer = AsynDBT(
            metric,
            workers=3,
            budget=Budget(metric_calls=calls),
            deterministic=True,
            seed=seed,
            progress=False,
            instructions={"self": ["Sort the message step by step.", "Sort it quickly."]},
            run_dir=run_dir,
            resume=True,
        )
        program = optimizer.compile(dspy.Predict(Sort), trainset=examples)
    assert optimizer.result is not None
    return {"program": program.dump_state(), "result": steady(optimizer.result.to_dict())}


def steady(value: Any) -> Any:
    """Without times and costs of attempts."""
    if isinstance(value, dict):
        return {name: steady(one) for name, one in value.items() if name not in VOLATILE}
    return [steady(one) for one in value] if isinstance(value, list) else value


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a copy of this process, which has imported everything and started no thread; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        logging.getLogger("crash").exception("a compile failed")
    finally:
        os._exit(status)


@contextlib.contextmanager
def provider(asked: pathlib.Path) -> Iterator[str]:
    """A provider in a process of its own; yields its address."""
    reading, writing = os.pipe()

    def serve() -> None:
        log = os.open(asked, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with Provider(answer=answerer(log), latency_s=LATENCY_S, keep_bodies=False) as server:
            os.write(writing, server.url.encode())
            os.close(writing)
            signal.pause()

    pid = fork(serve)
    os.close(writing)
    url = os.read(reading, 1000).decode()
    os.close(reading)
    try:
        yield url
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def recorded(run_dir: pathlib.Path) -> set[str]:
    """Tickets of the rollouts in the journals' whole lines."""
    found = set()
    for path in run_dir.glob("runs/*/workers/*.jsonl"):
        for line in path.read_bytes().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)["entry"] if line.endswith(b"\n") else {}
                if entry.get("kind") == "rollout":
                    found.add(entry["feedback"])
    return found


class Crashes:
    """Runs that are killed and resumed, and what came of them."""

    def __init__(self, url: str, asked: pathlib.Path, folder: pathlib.Path, calls: int, seed: int) -> None:
        self.url, self.asked, self.folder, self.calls = url, asked, folder, calls
        self.random = random.Random(seed)
        self.expected: dict[tuple[str, int], tuple[Any, float]] = {}
        self.kills = self.identical = self.runs = self.ended_before = 0
        self.paid_twice = self.found_recorded = 0

    def one_run(self, may_kill: int) -> None:
        """Compile, kill, resume, perhaps kill again (at most ``may_kill`` times in all), and compare."""
        client, seed = CLIENTS[self.runs % 2], self.runs // 2 % SEEDS
        self.runs += 1
        expected, seconds = self._undisturbed(client, seed)
        run_dir, outcome = self.folder / f"run-{self.runs}", self.folder / f"run-{self.runs}.json"
        kills = 0
        for is_last in (False, self.random.random() >= AGAIN or may_kill < 2, True):
            known, before = recorded(run_dir), self._asked()
            self.found_recorded += len(known)
            limit = None if is_last else self.random.uniform(0, seconds)
            was_killed = self._process(client, seed, run_dir, outcome, limit)
            after = self._asked()[len(before) :]
            self.paid_twice += sum(ticket in known for ticket in after)
            kills += was_killed
            if not was_killed:
                break
        self.ended_before += not kills
        self.kills += kills
        same = outcome.exists() and json.loads(outcome.read_text()) == expected
        self.identical += kills * same
        if same:
            shutil.rmtree(run_dir)
        else:
            logging.getLogger("crash").error("run %d differs: %s, %s", self.runs, run_dir, outcome)

    def _undisturbed(self, client: str, seed: int) -> tuple[Any, float]:
        if (client, seed) not in self.expected:
            folder = self.folder / f"undisturbed-{client}-{seed}"
            outcome = folder.with_suffix(".json")
            started = time.monotonic()
            self._process(client, seed, folder, outcome, None)
            self.expected[client, seed] = json.loads(outcome.read_text()), time.monotonic() - started
        return self.expected[client, seed]

    def _process(
        self, client: str, seed: int, run_dir: pathlib.Path, outcome: pathlib.Path, limit_s: float | None
    ) -> bool:
        """One process that compiles; killed after ``limit_s``. Returns whether it was killed before its end."""

        def work() -> None:
            found = compile_once(self.url, client, seed, run_dir, self.calls)
            outcome.write_text(json.dumps(found))

        pid = fork(work)
        if limit_s is not None:
            time.sleep(limit_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return True
        if os.WEXITSTATUS(status):
            raise SystemExit(f"a compile failed with status {os.WEXITSTATUS(status)}: see above")
        return False

    def _asked(self) -> list[str]:
        return self.asked.read_text().split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--calls", type=int, default=120, help="metric calls of a compile")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        asked = folder / "asked.log"
        asked.touch()
        started = time.monotonic()
        with provider(asked) as url:
            crashes = Crashes(url, asked, folder, arguments.calls, arguments.seed)
            while crashes.kills < arguments.kills:
                crashes.one_run(arguments.kills - crashes.kills)
        line = {
            "benchmark": "crash",
            "kills": crashes.kills,
            "paid_twice": crashes.paid_twice,
            "identical": crashes.identical,
            "runs": crashes.runs,
            "recorded_rollouts_found_on_resume": crashes.found_recorded,
            "runs_over_before_the_kill": crashes.ended_before,
            "metric_calls": arguments.calls,
            "seconds": round(time.monotonic() - started, 1),
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
    print(json.dumps(line))
    if arguments.out:
        arguments.out.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
