"""A compile on a Ray cluster of three nodes beside the same compile in this process.

    python benchmarks/ray_cluster.py [--data DIR] [--calls 300] [--overhead-calls 1000] [--out FILE]

Three local nodes (``ray.cluster_utils.Cluster``), one worker each, ``deterministic=True``.

- ``same_program``: the real SmolLM2 in float32 in every actor, sst2: is the program that of the local engine?
- ``killed``: the node of one worker dies in the middle: does the run end, with which program, and are rollouts that were
  recorded before asked of an LM again (``paid_twice``)?
- ``overhead_ms``: per metric call over the local engine, on a scripted LM that answers at once, so that the way to the actor and
  back is all there is (medians of five; starting actors is not in it, ``start_s`` says what that takes).

Prints one JSON line. Needs the extras ``ray`` and ``local``, and benchmark data (``--data`` or ``ASYNDBT_DATA``) for the real LM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import dspy
import ray
import ray_setups as setups
from ray.cluster_utils import Cluster

from asyndbt_dspy import AsynDBT, Budget, RayEngine, Worker
from asyndbt_dspy.runs.journal import read_journal

HERE = pathlib.Path(__file__).resolve().parent
ENV = {
    "env_vars": {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
}
NODE = {"num_cpus": 2, "object_store_memory": 100 * 1024 * 1024}
NAMES = ("w0", "w1", "w2")


class Watched(RayEngine):
    """Counts calls, times the start, and can kill the node of a worker after so many."""

    def __init__(
        self, setup: str, cluster: Any = None, kill_after: int | None = None, **options: Any
    ) -> None:
        super().__init__(setup, runtime_env=ENV, **options)
        self.cluster = cluster
        self.kill_after = kill_after
        self.killed = ""
        self.calls = 0
        self.start_s = 0.0

    async def start(self, workers: Any) -> None:
        begun = time.perf_counter()
        await super().start(workers)
        self.start_s = time.perf_counter() - begun

    async def call(self, worker: str, method: str, payload: str) -> str:
        self.calls += method == "rollout"
        if self.kill_after is not None and self.calls >= self.kill_after and not self.killed:
            info = ray._private.state.actors(self._actors["w1"]._actor_id.hex())
            self.killed = info["Address"]["NodeID"]
            node = next(one for one in self.cluster.extra if one.node_id == self.killed)
            await asyncio.to_thread(self.cluster.remove_node, node, False)
        return await super().call(worker, method, payload)


def compiled(
    program: Any, shards: Any, metric: Any, calls: int, engine: Any, lms: Any = None, **options: Any
) -> tuple[Any, Any, float]:
    """Program, result and seconds of one compile."""
    workers = [Worker(name, shards[name], **({"lm": lms[name]} if lms else {})) for name in NAMES]
    optimizer = AsynDBT(
        metric,
        workers=workers,
        engine=engine,
        deterministic=True,
        progress=False,
        budget=Budget(metric_calls=calls),
        **options,
    )
    begun = time.perf_counter()
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        made = optimizer.compile(program)
    return made, optimizer.result, time.perf_counter() - begun


def real(cluster: Any, data: str, calls: int) -> dict[str, Any]:
    """SmolLM2 here, on three nodes, and on three nodes of which one dies."""
    shards = {name: setups.shard(name, data) for name in NAMES}
    lms = {name: setups.model() for name in NAMES[:1]}
    here, _, seconds = compiled(
        setups.program(), shards, setups.metric, calls, None, dict.fromkeys(NAMES, lms["w0"])
    )
    lms["w0"].close()
    found: dict[str, Any] = {"local_s": round(seconds, 1)}
    for arm, kill_after in (("cluster", None), ("killed", calls // 2)):
        engine = Watched(
            "ray_setups:make",
            cluster,
            kill_after,
            arguments={"data": data},
            name=arm,
            resources={"w1": {"spot": 1}},
        )
        with tempfile.TemporaryDirectory() as folder:
            program, result, seconds = compiled(
                setups.program(), shards, setups.metric, calls, engine, run_dir=folder
            )
            keys = recorded_keys(pathlib.Path(folder))
        found[arm] = {
            "same_program": program.dump_state() == here.dump_state(),
            "metric_calls": result.metric_calls,
            "paid_twice": len(keys) - len(set(keys)),
            "set_aside": [worker.name for worker in result.workers if worker.set_aside],
            "node_killed": bool(engine.killed),
            "utilisation": round(result.utilisation, 3),
            "largest_staleness": result.largest_staleness,
            "mean_staleness": round(result.mean_staleness, 3),
            "start_s": round(engine.start_s, 1),
            "seconds": round(seconds, 1),
        }
    return found


def recorded_keys(folder: pathlib.Path) -> list[str]:
    """Keys of all recorded rollouts."""
    entries = (entry for path in folder.rglob("workers/*.jsonl") for entry in read_journal(path))
    return [entry["key"] for entry in entries if entry["kind"] == "rollout"]


def overhead(calls: int, rounds: int = 5) -> dict[str, Any]:
    """Wall time per metric call on a scripted LM, here and on the cluster."""
    shards = {name: setups.items(200, 1000 * number) for number, name in enumerate(NAMES)}
    here, there, starts = [], [], []
    results = []
    for number in range(rounds):
        lms = dict.fromkeys(NAMES, setups.scripted())
        _, result, seconds = compiled(setups.sorter(), shards, setups.metric, calls, None, lms, seed=number)
        here.append(1000 * seconds / result.metric_calls)
        engine = Watched("ray_setups:make_scripted", num_cpus=0.5, name=f"overhead-{number}")
        _, result, seconds = compiled(setups.sorter(), shards, setups.metric, calls, engine, seed=number)
        there.append(1000 * (seconds - engine.start_s) / result.metric_calls)
        starts.append(engine.start_s)
        results.append(result)
    return {
        "overhead_ms": round(statistics.median(there) - statistics.median(here), 2),
        "local_ms": [round(one, 2) for one in here],
        "cluster_ms": [round(one, 2) for one in there],
        "start_s": round(statistics.median(starts), 1),
        "utilisation": round(statistics.median(one.utilisation for one in results), 3),
        "largest_staleness": max(one.largest_staleness for one in results),
        "mean_staleness": round(statistics.fmean(one.mean_staleness for one in results), 3),
    }


def main() -> int:
    """Run all arms and print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=os.environ.get("ASYNDBT_DATA"))
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--overhead-calls", type=int, default=1000)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    cluster.extra = [cluster.add_node(**NODE, resources={"spot": 1}) for _ in range(2)]
    ray.init(address=cluster.address, namespace="asyndbt", log_to_driver=False)
    line: dict[str, Any] = {
        "benchmark": "ray_cluster",
        "ray": ray.__version__,
        **overhead(options.overhead_calls),
    }
    if options.data:
        line |= real(cluster, options.data, options.calls)
    text = json.dumps(line)
    sys.stdout.write(text + "\n")
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    ray.shutdown()
    cluster.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
