"""A shared rate limit as the provider sees it: never more than agreed in any minute, and hardly less.

    python benchmarks/limits.py [--rpm 600] [--minutes 3] [--limiter aiolimiter|asyncio-throttle] [--out FILE]

Three workers on one endpoint compile a classifier over HTTP against a provider on loopback that answers at once and
notes when each request arrived. Only ``requests_per_minute`` holds the workers back. Real time; the processor idles for most of
it. Prints one JSON line:

- ``most_in_60_s``: the largest number of requests in any 60-second window; ``bound``: the limit and one second's worth;
- ``used``: requests per minute from the first to the last, as a share of the limit;
- ``answered_429``: by the provider, which refuses what passes the bound.
"""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import argparse
import json
import logging
import pathlib
import platform
import sys

import dspy
from faults import INSTRUCTIONS, Sort, answer, data

from asyndbt_dspy import AsynDBT, Budget, Worker
from asyndbt_dspy.testing.provider import Provider


def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return bool(gold.label == prediction.label)


def measure(rpm: int, minutes: float, limiter: str) -> dict[str, object]:
    """One compile under a shared limit."""
    bound = rpm + -(-rpm // 60)
    with Provider(answer, requests_per_window=(bound, 60.0), keep_bodies=False) as provider:
        lm = dspy.LM(
            "openai/judge", api_base=provider.url, api_key="k", cache=False, temperature=0.0, max_tokens=100
        )
        workers = [
            Worker(
                f"w{number}",
                data(400 * number, 400),
                lm=lm,
                max_concurrency=16,
                requests_per_minute=rpm,
                limiter=limiter,  # type: ignore[arg-type]
            )
            for number in range(3)
        ]
        optimizer = AsynDBT(
            metric,
            workers=workers,
            budget=Budget(metric_calls=int(rpm * minutes)),
            progress=False,
            instructions={"self": INSTRUCTIONS},
        )
        with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
            optimizer.compile(dspy.Predict(Sort))
        seen = provider.seen()
    assert optimizer.result is not None
    span = seen[-1].at_s - seen[0].at_s
    return {
        "benchmark": "limits",
        "limiter": limiter,
        "requests_per_minute": rpm,
        "requests": len(seen),
        "seconds": round(span, 1),
        "most_in_60_s": provider.most_in_window(60.0),
        "bound": bound,
        "used": round((len(seen) - 1) / span * 60 / rpm, 4),
        "answered_429": sum(call.fault.kind == "status" for call in seen),
        "metric_calls": optimizer.result.metric_calls,
        "python": platform.python_version(),
    }


def main() -> int:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rpm", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--limiter", choices=("aiolimiter", "asyncio-throttle"), default="aiolimiter")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    logging.getLogger("asyndbt_dspy").setLevel(logging.ERROR)
    text = json.dumps(measure(arguments.rpm, arguments.minutes, arguments.limiter))
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
