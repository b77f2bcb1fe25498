"""A compile through a provider that fails: does the account agree, and is the program that of an undisturbed run?

    python benchmarks/faults.py [--seeds 20] [--calls 1000] [--share 0.2] [--out FILE]

Four workers compile a classifier over HTTP against an OpenAI-compatible provider on loopback; 20 % of the requests fail:
429 with retry-after, 500, 503, 504, broken JSON, cut connections, silence (the client's timeout ends it), a content
filter; some are slow. From half of the calls on the provider refuses the key of the fourth worker for good. Odd seeds go
through LiteLLM, even ones through DSPy's own client; DSPy's cache is off, ``deterministic=True``.

The provider's answers are right or wrong by a fixed difficulty of each example against the worth of the prompt (an
instruction, how many classes its demos show, which class comes last): simulated, so that the worth of every program is known.
Every answer carries a ticket, the hash of its prompt, which the metric notes.

Prints one JSON line over all seeds:

- ``attempts_differ``: runs whose ledger and provider count different numbers of attempts;
- ``tokens_differ``: runs whose ledger books other tokens than the provider billed for what it delivered, ``below_bill``: runs
  that book fewer for the rest than were billed;
- ``scores_from_failures``: scored rollouts whose ticket belongs to no delivered answer;
- ``same_program``, ``within_2_points``: seeds whose program is that of the run without faults, and seeds where it is, or is worth
  less than 2 points less or more; ``differences``: in points.
"""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import argparse
import hashlib
import json
import logging
import pathlib
import platform
import random
import sys
import time
from typing import Any, Literal

import dspy

from asyndbt_dspy import AsynDBT, Budget, Price, Worker
from asyndbt_dspy.testing.provider import Call, Fault, Provider

LABELS = ("red", "green", "blue")
CLIENTS = ("auto", "litellm")
MAGIC = "Look at the number of the item before you sort it."
INSTRUCTIONS = [MAGIC, "Sort it quickly.", "Sort the message; read it twice."]
TEST = range(10_000, 12_000)
KINDS = (
    Fault("status", status=429, retry_after_s=0.05),
    Fault("status", status=500),
    Fault("status", status=503),
    Fault("status", status=504),
    Fault("status", status=400, code="content_filter"),
    Fault("broken_json"),
    Fault("cut"),
    Fault("never"),
    Fault("slow", seconds=0.1),
)


class Sort(dspy.Signature):
    """Sort the message."""

    message: str = dspy.InputField()
    label: Literal["red", "green", "blue"] = dspy.OutputField()
    ticket: str = dspy.OutputField(desc="number of the answer")


def ticket_of(messages: Any) -> str:
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


def difficulty(number: int) -> float:
    """In [0, 1), of one item."""
    return int(hashlib.sha256(f"item {number}".encode()).hexdigest()[:8], 16) / 2**32


def worth(instruction: str, shown: list[str]) -> float:
    """Share of items that a prompt gets right: its instruction, and the labels of its demos in their order."""
    last = 0.06 if shown and shown[-1] == "blue" else 0.0
    return 0.35 + 0.3 * (MAGIC in instruction) + 0.07 * len(set(shown)) + last


def answer(messages: list[dict[str, Any]]) -> str:
    """The provider's reply: right where the prompt is worth more than the item is difficult."""
    shown = [json.loads(one["content"])["label"] for one in messages if one["role"] == "assistant"]
    number = int(str(messages[-1]["content"]).split("item ", 1)[1].split()[0])
    is_right = difficulty(number) < worth(str(messages[0]["content"]), shown)
    return json.dumps({"label": LABELS[(number + (0 if is_right else 1)) % 3], "ticket": ticket_of(messages)})


def true_score(program: dspy.Module) -> float:
    """On items that no run has seen, without a provider."""
    predictor = program.predictors()[0]
    value = worth(predictor.signature.instructions, [demo["label"] for demo in predictor.demos])
    return sum(difficulty(number) < value for number in TEST) / len(TEST)


def data(start: int, count: int) -> list[dspy.Example]:
    return [
        dspy.Example(message=f"item {number} of the list", label=LABELS[number % 3]).with_inputs("message")
        for number in range(start, start + count)
    ]


def compiled(provider: Provider, client: str, seed: int, calls: int) -> tuple[dspy.Module, Any, list[str]]:
    """One compile; the program, the result and the tickets of all scored rollouts."""
    tickets: list[str] = []

    def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
        tickets.append(prediction.ticket)
        return bool(gold.label == prediction.label)

    workers = [
        Worker(
            f"w{number}",
            data(60 * number, 60),
            lm=dspy.LM(
                "openai/judge",
                api_base=provider.url,
                api_key=f"k{number}",
                engine=client,
                cache=False,
                temperature=0.0,
                max_tokens=100,
                num_retries=3,
                timeout=4.0,
            ),
            max_concurrency=8,
            price=Price(0.15, 0.6),
        )
        for number in range(4)
    ]
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        optimizer = AsynDBT(
            metric,
            workers=workers,
            budget=Budget(metric_calls=calls),
            deterministic=True,
            seed=seed,
            progress=False,
            instructions={"self": INSTRUCTIONS},
        )
        program = optimizer.compile(dspy.Predict(Sort))
    return program, optimizer.result, tickets


def fault_plan(seed: int, share: float, calls: int) -> Any:
    """Which request fails how; from half of the calls on the fourth worker's key is dead."""
    rng = random.Random(seed)
    plan = [rng.choice(KINDS) if rng.random() < share else Fault() for _ in range(20 * calls)]

    def fault(call: Call) -> Fault:
        if call.key == "k3" and call.number >= calls // 2:
            return Fault("status", status=401)
        return plan[call.number]

    return fault


def one_seed(seed: int, share: float, calls: int) -> dict[str, Any]:
    """A run with faults beside one without."""
    client, started = CLIENTS[seed % 2], time.perf_counter()
    with Provider(answer) as provider:
        clean, _, _ = compiled(provider, client, seed, calls)
    with Provider(answer, fault=fault_plan(seed, share, calls)) as provider:
        program, result, tickets = compiled(provider, client, seed, calls)
        seen = provider.seen()
    delivered = [call for call in seen if call.delivered]
    lost_tokens = sum(call.tokens for call in seen if not call.delivered)
    known = {ticket_of(call.body["messages"]) for call in delivered}
    lines = list(result.spending.values())
    booked = sum(line["prompt_tokens"] + line["completion_tokens"] for line in lines)
    return {
        "seed": seed,
        "client": client,
        "attempts": len(seen),
        "failed": len(seen) - len(delivered),
        "attempts_differ": sum(line["attempts"] for line in lines) - len(seen),
        "tokens_differ": booked - sum(call.tokens for call in delivered),
        "tokens_over_bill": sum(line["cut_tokens"] for line in lines) - lost_tokens,
        "scores_from_failures": sum(ticket not in known for ticket in tickets),
        "metric_calls": result.metric_calls,
        "set_aside": [worker.name for worker in result.workers if worker.set_aside],
        "same_program": program.dump_state() == clean.dump_state(),
        "clean": round(100 * true_score(clean), 2),
        "faulty": round(100 * true_score(program), 2),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    """Run all seeds and print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.2, help="of requests that fail, in [0, 1)")
    parser.add_argument("--out", type=pathlib.Path, default=None)
    arguments = parser.parse_args()
    logging.getLogger("dspy").setLevel(logging.ERROR)
    logging.getLogger("asyndbt_dspy").setLevel(logging.ERROR)
    logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
    runs = []
    for seed in range(arguments.seeds):
        runs.append(one_seed(seed, arguments.share, arguments.calls))
        sys.stderr.write(json.dumps(runs[-1]) + "\n")
    differences = [round(run["faulty"] - run["clean"], 2) for run in runs]
    line = {
        "benchmark": "faults",
        "seeds": len(runs),
        "calls": arguments.calls,
        "share": arguments.share,
        "attempts": sum(run["attempts"] for run in runs),
        "failed_attempts": sum(run["failed"] for run in runs),
        "attempts_differ": sum(run["attempts_differ"] != 0 for run in runs),
        "tokens_differ": sum(run["tokens_differ"] != 0 for run in runs),
        "below_bill": sum(run["tokens_over_bill"] < 0 for run in runs),
        "scores_from_failures": sum(run["scores_from_failures"] for run in runs),
        "dead_worker_set_aside": sum("w3" in run["set_aside"] for run in runs),
        "same_program": sum(run["same_program"] for run in runs),
        "within_2_points": sum(
            run["same_program"] or abs(gap) < 2 for run, gap in zip(runs, differences, strict=True)
        ),
        "differences": differences,
        "clean": [run["clean"] for run in runs],
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "python": platform.python_version(),
        "dspy": dspy.__version__,
    }
    text = json.dumps(line)
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
