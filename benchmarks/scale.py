"""What the server costs per message, from 100 to 10,000 workers, and what it holds in memory.

    python benchmarks/scale.py [--messages 1000000] [--repeats 3] [--out FILE]

The shipped server, driver and workers run in the simulator (workers with a policy that costs next to nothing). The time
inside ``ServerState.receive`` is summed up; everything that the server does is in it: checks, updates of z, multipliers
and duals, plane refreshes, requests, and the final race; also passes of the garbage collector, which go over
the server's objects and what the simulated workers make meanwhile, and are shown apart; what the workers hold from the start is
frozen, as on a cluster it would be elsewhere. Arms of a tenth of the messages are measured ``--repeats``
times, in turn, the long one in their middle, and the median counts: such a run is short, and a machine's speed varies from
minute to minute. Prints one JSON line, and each run on stderr as it is done.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import sys
from typing import Any

from asyndbt_dspy.simulation import measure_server


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    few = max(1000, options.messages // 10)
    short = [
        *((workers, few, workers // 2, {}) for workers in (100, 1_000)),
        (10_000, few, 100, {"max_staleness": 400}),  # an update from one in a hundred
        *((workers, few, workers // 2, {"waits": False}) for workers in (100, 1_000, 10_000)),  # the default
    ]
    measure_server(100, 5_000, 50)  # warm
    runs, middle, large = [], options.repeats // 2, {}
    for number in range(options.repeats):
        if number == middle:
            large = measure(10_000, options.messages, 5_000, {})
        runs.append([measure(*arm) for arm in short])
    small, wide, *others = [_median(list(arm)) for arm in zip(*runs, strict=True)]
    rows = [small, wide, large, *others]
    costs = [row["server_us_per_message"] for row in rows[:3]]
    own = [row["server_us_per_message"] - row["collector_us_per_message"] for row in rows[:3]]
    line = {
        "benchmark": "scale",
        "python": platform.python_version(),
        "largest_over_smallest_cost": round(max(costs) / min(costs), 3),
        "largest_over_smallest_own_cost": round(max(own) / min(own), 3),  # without the garbage collector
        "arms": rows,
    }
    text = json.dumps(line)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def measure(workers: int, messages: int, active: int, changes: dict[str, Any]) -> dict[str, Any]:
    row = measure_server(workers, messages, active, **changes)
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of median cost, with the costs of all."""
    runs.sort(key=lambda row: row["server_us_per_message"])
    return {**runs[len(runs) // 2], "all_us_per_message": [row["server_us_per_message"] for row in runs]}


if __name__ == "__main__":
    main()
