"""What a message costs the server alone: recorded messages of simulated runs, replayed into fresh servers.

    python benchmarks/server_replay.py [--messages 20000] [--times 12] [--out FILE]

``benchmarks/scale.py`` times the server between thousands of simulated workers that empty the processor's caches, on
whatever else the machine does. Here nothing else runs: the messages of a search are recorded once (100, 1,000 and 10,000 workers,
who wait for updates of z or do not) and then taken by a fresh server as often as ``--times`` says; per 200 messages the quickest
time counts. All servers must end in one state; two versions are compared by ``state``. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform

from asyndbt_dspy.simulation import replay_server


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    sizes = ((100, 50), (1_000, 500), (10_000, 5_000))
    arms = [
        replay_server(workers, options.messages, active, options.times, waits=waits)
        for waits in (True, False)
        for workers, active in sizes
    ]
    line = json.dumps({"benchmark": "server_replay", "python": platform.python_version(), "arms": arms})
    print(line)
    if options.out:
        options.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
