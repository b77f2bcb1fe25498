"""What the server costs per message, from 100 to 10,000 workers, and what it holds in memory.

    python benchmarks/scale.py [--messages 1000000] [--out FILE]

The shipped server, driver and workers run in the simulator (workers with a policy that costs next to nothing). The time
inside ``ServerState.receive`` is summed up; everything that the server does is in it: checks, updates of z, multipliers
and duals, plane refreshes, requests, and the final race. Prints one JSON line, and each arm on stderr as it is done.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import sys

from asyndbt_dspy.simulation import measure_server


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    few = max(1000, options.messages // 10)
    measure_server(100, 5_000, 50)  # warm
    rows = []
    for workers, messages, active, changes in (
        (100, few, 50, {}),
        (1_000, few, 500, {}),
        (10_000, options.messages, 5_000, {}),
        (10_000, few, 100, {"max_staleness": 400}),  # an update from one in a hundred
        *((workers, few, workers // 2, {"waits": False}) for workers in (100, 1_000, 10_000)),  # the default
    ):
        rows.append(measure_server(workers, messages, active, **changes))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    costs = [row["server_us_per_message"] for row in rows[:3]]
    line = {
        "benchmark": "scale",
        "python": platform.python_version(),
        "largest_over_smallest_cost": round(max(costs) / min(costs), 3),
        "arms": rows,
    }
    text = json.dumps(line)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
