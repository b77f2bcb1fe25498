"""Three workers on a Ray cluster, each with its own SmolLM2 and its own part of the messages.

    python examples/ray_workers.py                       # starts a cluster on this machine
    python examples/ray_workers.py --address auto        # the cluster that this machine belongs to (`ray start --head`)

What a node needs is this file: ``make`` builds a worker there, from its name and JSON arguments. Here the messages are
read from the folder beside it; on a real cluster give ``make`` a path or a bucket that its node can read.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any, Literal

import dspy

from asyndbt_dspy import AsynDBT, Budget, RayEngine, RolloutHost, Worker, local_lm

HERE = pathlib.Path(__file__).resolve().parent
DATA = HERE / "data" / "support_desk" / "train.jsonl"
NAMES = ("w0", "w1", "w2")


class Topic(dspy.Signature):
    """Name the topic of a customer's message to a smart-home company."""

    message: str = dspy.InputField()
    topic: Literal["billing", "delivery", "returns", "login", "malfunction", "question"] = dspy.OutputField()


def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(gold.topic == prediction.topic)


def shard(worker: str, path: str) -> list[dspy.Example]:
    """Every third message, by the worker's number."""
    rows = [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]
    return [
        dspy.Example(message=row["message"], topic=row["label"]).with_inputs("message")
        for row in rows[NAMES.index(worker) :: len(NAMES)]
    ]


def make(worker: str, path: str) -> RolloutHost:
    """A worker on its node: program, metric, LM, shard."""
    return RolloutHost(
        dspy.Predict(Topic),
        metric,
        lm=local_lm("smollm2-135m"),
        examples=shard(worker, path),
        adapter=dspy.JSONAdapter(),
    )


def main() -> int:
    """Compile, and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", help="of a cluster; without it one is started here")
    parser.add_argument("--calls", type=int, default=300, help="metric calls")
    parser.add_argument("--num-cpus", type=float, default=0.5, help="of each worker")
    parser.add_argument("--num-gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--out", type=pathlib.Path, help="file for the program")
    arguments = parser.parse_args()

    engine = RayEngine(
        "ray_workers:make",
        arguments={"path": str(DATA)},
        address=arguments.address,
        num_cpus=arguments.num_cpus,
        num_gpus=arguments.num_gpus,
        runtime_env={
            "env_vars": {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        },
    )
    optimizer = AsynDBT(
        metric,
        workers=[Worker(name, shard(name, str(DATA))) for name in NAMES],
        engine=engine,
        budget=Budget(metric_calls=arguments.calls),
        progress=False,
    )
    with dspy.context(adapter=dspy.JSONAdapter()):
        program = optimizer.compile(dspy.Predict(Topic))
    sys.stdout.write(f"{optimizer.result}\n")
    if arguments.out is not None:
        program.save(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
