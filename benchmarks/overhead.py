"""CPU time that the optimizer itself costs per metric call.

    python benchmarks/overhead.py [--calls 600] [--out FILE]

The same rollouts (program by program, example by example) are run twice in one process on a scripted LM that answers at
once: inside a compile, and in a plain asyncio loop. The difference of process CPU time, divided by the number of metric
calls, is the overhead; once as it is by default, and once metered (``prices=``), where each attempt is reserved for, counted
and settled. The default and the metered compile alternate. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import platform
import statistics
import time
from typing import Any, Literal

import dspy

from asyndbt_dspy import AsynDBT, Budget, Price, scripted_lm

LABELS = ("red", "green", "blue")


class Sort(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField()
    label: Literal["red", "green", "blue"] = dspy.OutputField()


RUNS: list[tuple[Any, str]] = []


class Recorder(dspy.Module):
    """Notes every run, so that the very same runs can be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.sort = dspy.Predict(Sort)

    async def aforward(self, message: str) -> dspy.Prediction:
        RUNS.append((self, message))
        return await self.sort.acall(message=message)


def script(messages: list[dict[str, str]]) -> str:
    last = messages[-1]["content"]
    return json.dumps({"label": LABELS[(len(last) + len(messages)) % 3]})


def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(gold.label == prediction.label)


async def plain(runs: list[tuple[Any, str]], golds: dict[str, dspy.Example]) -> None:
    """The same rollouts, 24 at a time, and their scores; nothing else."""
    gate = asyncio.Semaphore(24)

    async def one(program: Any, message: str) -> bool:
        async with gate:
            return metric(golds[message], await program.acall(message=message))

    await asyncio.gather(*(one(program, message) for program, message in runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    dspy.configure(lm=scripted_lm(script), adapter=dspy.JSONAdapter())
    examples = [
        dspy.Example(message=f"item {number} " + "x" * (number % 7), label=LABELS[number % 3]).with_inputs(
            "message"
        )
        for number in range(360)
    ]
    golds = {one.message: one for one in examples}
    overheads: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(2 * arguments.repeats):
        seed, is_metered = divmod(repeat, 2)
        RUNS.clear()
        optimizer = AsynDBT(
            metric,
            workers=3,
            budget=Budget(metric_calls=arguments.calls),
            seed=seed,
            progress=False,
            prices={"scripted/lm": Price(0.0, 0.0)} if is_metered else {},
        )
        started = time.process_time()
        optimizer.compile(Recorder(), trainset=examples)
        inside = time.process_time() - started
        runs = list(RUNS)
        started = time.process_time()
        asyncio.run(plain(runs, golds))
        outside = time.process_time() - started
        assert optimizer.result is not None and bool(optimizer.result.spending) == bool(is_metered)
        overheads[bool(is_metered)].append((inside - outside) / len(runs) * 1e3)
    median, metered = (statistics.median(overheads[one]) for one in (False, True))
    line = {
        "benchmark": "overhead",
        "metric_calls": arguments.calls,
        "overhead_ms_per_call": round(median, 3),
        "all_ms": [round(one, 3) for one in overheads[False]],
        "metered_ms_per_call": round(metered, 3),
        "all_metered_ms": [round(one, 3) for one in overheads[True]],
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(json.dumps(line))
    if arguments.out:
        arguments.out.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
