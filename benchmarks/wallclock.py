"""How long a compile of 1,000 metric calls takes over HTTP where endpoints are unequal and some calls hang.

    python benchmarks/wallclock.py [--calls 1000] [--arms asyndbt,mipro_v2,…] [--seeds 1] [--out FILE]

Real time, a real OpenAI-compatible HTTP server on loopback. Eight endpoints; an answer takes log-normal time with median
300 ms and sigma 1, ten times that on one endpoint; 2 % of the calls never get an answer and end by the client's timeout (30 s,
for everybody; DSPy's client then tries again, for everybody). 32 calls in flight:

- ``asyndbt``: eight workers, one per endpoint, four calls in flight each; ``asyndbt_half``: where workers wait
  for each other, S = 4; ``asyndbt_balanced``: the eight workers all behind one load balancer, as the others are;
  ``asyndbt_hedged``: with ``hedge_after_s=3`` on the next endpoint.
- ``mipro_v2``, ``bootstrap_rs``, ``simba``, ``gepa`` (eight parallel proposals): 32 threads behind a load balancer that deals
  requests out to the endpoints in turn; settings with as many calls as ``--calls``, or the next more. Their proposers answer
  at once.

Answers are simulated, as in ``faults.py``: right or wrong by a fixed difficulty of each item against the worth of the prompt, so
that all searches have something to find. Every arm runs in a process of its own; the others at the same time, ours alone.

Prints one JSON line; ``ratio`` is ours to the fastest other, in seconds per metric call.
"""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import argparse
import json
import logging
import math
import pathlib
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import dspy
from faults import INSTRUCTIONS, Sort, answer, data, true_score

from asyndbt_dspy import AsynDBT, Budget, Worker, scripted_lm
from asyndbt_dspy.testing.provider import Call, Fault, Provider

ENDPOINTS, IN_FLIGHT = 8, 32
MEDIAN_S, SIGMA, SLOWER, HANGING, TIMEOUT_S = 0.3, 1.0, 10.0, 0.02, 30.0
TRAIN, VALID = 160, 60
OTHERS = ("mipro_v2", "bootstrap_rs", "simba", "gepa")
OURS = ("asyndbt", "asyndbt_half", "asyndbt_balanced", "asyndbt_hedged")


def latency(seed: int) -> Callable[[Call], Fault]:
    """By endpoint: the number in a worker's key, or in turn behind the load balancer."""
    rng, lock = random.Random(seed), threading.Lock()

    def fault(call: Call) -> Fault:
        endpoint = int(call.key[1:]) if call.key.startswith("e") else call.number % ENDPOINTS
        with lock:
            hangs, seconds = rng.random() < HANGING, MEDIAN_S * rng.lognormvariate(0.0, SIGMA)
        if hangs:
            return Fault("never")
        return Fault("slow", seconds=seconds * (SLOWER if endpoint == ENDPOINTS - 1 else 1.0))

    return fault


def lm(provider: Provider, key: str) -> dspy.LM:
    """An endpoint, or the load balancer."""
    return dspy.LM(
        "openai/sorter",
        api_base=provider.url,
        api_key=key,
        cache=False,
        temperature=0.0,
        max_tokens=100,
        num_retries=3,
        timeout=TIMEOUT_S,
    )


class Counter:
    """A metric that counts its calls, with feedback for those that want it."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, gold: Any, prediction: Any, trace: Any = None) -> float:
        with self._lock:
            self.calls += 1
        return float(gold.label == getattr(prediction, "label", None))

    def with_feedback(
        self, gold: Any, prediction: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None
    ) -> Any:
        """For GEPA."""
        return dspy.Prediction(score=self(gold, prediction), feedback=f"It is {gold.label}.")


def propose(messages: list[dict[str, Any]]) -> str:
    """A proposer that fills whatever fields it is asked for, with one of the instructions."""
    text = "\n".join(str(one["content"]) for one in messages)
    propose.count += 1  # type: ignore[attr-defined]
    instruction = INSTRUCTIONS[propose.count % len(INSTRUCTIONS)]  # type: ignore[attr-defined]
    asked = text.rsplit("Outputs will be a JSON object", 1)
    if len(asked) < 2:
        return f"```\n{instruction}\n```"
    fields = re.findall(r'"(\w+)": "\{', asked[1])
    return json.dumps(
        {one: {"self": instruction} if one == "module_advice" else instruction for one in fields}
    )


propose.count = 0  # type: ignore[attr-defined]


def ours(arm: str, provider: Provider, calls: int, seed: int, metric: Counter) -> tuple[Any, dict[str, Any]]:
    """Eight workers over the same examples."""
    keys = ["lb"] * ENDPOINTS if arm == "asyndbt_balanced" else [f"e{one}" for one in range(ENDPOINTS)]
    examples = data(0, TRAIN)
    workers = []
    for number, key in enumerate(keys):
        lms: Any = lm(provider, key)
        hedge = None
        if arm == "asyndbt_hedged":
            lms, hedge = [lms, lm(provider, keys[(number + 1) % (ENDPOINTS - 1)])], 3.0
        workers.append(
            Worker(
                f"w{number}",
                examples[number::ENDPOINTS],
                lm=lms,
                max_concurrency=IN_FLIGHT // ENDPOINTS,
                hedge_after_s=hedge,
            )
        )
    optimizer = AsynDBT(
        metric,
        workers=workers,
        budget=Budget(metric_calls=calls),
        active_workers=ENDPOINTS // 2 if arm == "asyndbt_half" else None,
        seed=seed,
        progress=False,
        instructions={"self": INSTRUCTIONS},
    )
    program = optimizer.compile(dspy.Predict(Sort), valset=data(5_000, VALID))
    result = optimizer.result
    assert result is not None
    return program, {
        "utilisation": round(result.utilisation, 3),
        "largest_staleness": result.largest_staleness,
        "mean_staleness": round(result.mean_staleness, 2),
        "set_aside": [worker.name for worker in result.workers if worker.set_aside],
        "missing": sum(worker.missing for worker in result.workers),
    }


def other(arm: str, provider: Provider, calls: int, seed: int, metric: Counter) -> tuple[Any, dict[str, Any]]:
    """One of DSPy's own, with 32 threads."""
    proposer = scripted_lm(propose, name="proposer")
    task = lm(provider, "lb")
    with dspy.context(lm=task, num_threads=IN_FLIGHT):
        return searched(arm, calls, seed, metric, proposer, task)


def searched(
    arm: str, calls: int, seed: int, metric: Counter, proposer: Any, task: Any
) -> tuple[Any, dict[str, Any]]:
    """Its compile, with settings for so many calls."""
    student, trainset, valset = dspy.Predict(Sort), data(0, TRAIN), data(5_000, VALID)
    if arm == "bootstrap_rs":
        candidates = max(1, calls // (VALID + 1) - 3)
        optimizer: Any = dspy.BootstrapFewShotWithRandomSearch(
            metric=metric, num_candidate_programs=candidates, num_threads=IN_FLIGHT, max_errors=10**6
        )
        return optimizer.compile(student, trainset=trainset, valset=valset), {
            "num_candidate_programs": candidates
        }
    if arm == "mipro_v2":
        # Each trial scores a minibatch of 35, every fifth one the whole valset; the student is scored before and at the end.
        trials = max(1, round((calls - 2 * VALID) / (35 + VALID / 5)))
        optimizer = dspy.MIPROv2(
            metric=metric,
            prompt_model=proposer,
            task_model=task,
            auto=None,
            num_candidates=6,
            num_threads=IN_FLIGHT,
            max_errors=10**6,
            seed=seed + 1,
        )
        return optimizer.compile(student, trainset=trainset, valset=valset, num_trials=trials), {
            "num_trials": trials
        }
    if arm == "simba":
        steps = max(
            1, math.ceil((calls - TRAIN) / 576)
        )  # as measured: 576 calls a step, and all of trainset at the end
        optimizer = dspy.SIMBA(
            metric=metric,
            prompt_model=proposer,
            num_threads=IN_FLIGHT,
            max_steps=steps,
            bsize=32,
            num_candidates=6,
        )
        return optimizer.compile(student, trainset=trainset, seed=seed), {"max_steps": steps}
    from gepa.strategies.proposal_sampling import IndependentSampling

    optimizer = dspy.GEPA(
        metric=metric.with_feedback,
        reflection_lm=proposer,
        max_metric_calls=calls,
        num_threads=IN_FLIGHT,
        seed=seed,
        gepa_kwargs={"sampling_strategy": IndependentSampling(8)},
    )
    return optimizer.compile(student, trainset=trainset, valset=valset), {"parallel_proposals": 8}


def one_arm(arm: str, calls: int, seed: int) -> dict[str, Any]:
    """One compile against its own provider."""
    for name in ("dspy", "asyndbt_dspy", "gepa"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
    metric = Counter()
    run = ours if arm in OURS else other
    with Provider(answer, fault=latency(seed), keep_bodies=False) as provider:
        begun = time.perf_counter()
        with dspy.context(adapter=dspy.JSONAdapter()):
            program, extra = run(arm, provider, calls, seed, metric)
        seconds = time.perf_counter() - begun
        seen = provider.seen()
    return {
        "arm": arm,
        "seed": seed,
        "seconds": round(seconds, 1),
        "metric_calls": metric.calls,
        "requests": len(seen),
        "ms_per_call": round(1000 * seconds / max(1, metric.calls), 1),
        "most_in_flight": provider.most_in_flight,
        "true_score": round(100 * true_score(program), 1),
        **extra,
    }


def in_process(arm: str, calls: int, seed: int) -> subprocess.Popen[str]:
    """An arm in a process of its own."""
    command = [sys.executable, __file__, "--one", arm, "--calls", str(calls), "--first-seed", str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def collected(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The row that an arm printed last."""
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}")
    row: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    sys.stderr.write(json.dumps(row) + "\n")
    return row


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over seeds, per arm, and ours against the fastest other."""
    arms = {row["arm"]: [one for one in rows if one["arm"] == row["arm"]] for row in rows}
    cost = {arm: statistics.median(one["ms_per_call"] for one in found) for arm, found in arms.items()}
    others = [cost[arm] for arm in OTHERS if arm in cost]
    ratios = {arm: round(cost[arm] / min(others), 3) for arm in OURS if arm in cost} if others else {}
    return {"benchmark": "wallclock", "ms_per_call": cost, "ratio": ratios, "rows": rows}


def main() -> int:
    """Run all arms and print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--arms", default=",".join((*OURS, *OTHERS)))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--one", help="run this arm here and print its row")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(one_arm(options.one, options.calls, options.first_seed)) + "\n")
        return 0
    wanted = options.arms.split(",")
    if unknown := sorted(set(wanted) - {*OURS, *OTHERS}):
        parser.error(f"no arms {unknown}; known: {', '.join((*OURS, *OTHERS))}")
    if options.out is not None and options.out.exists() and set(wanted) != {*OURS, *OTHERS}:
        parser.error(f"{options.out} is there, and its rows of other arms would be lost: give another --out")
    rows: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        rows += [collected(in_process(arm, options.calls, seed)) for arm in OURS if arm in wanted]
        running = [in_process(arm, options.calls, seed) for arm in OTHERS if arm in wanted]
        rows += [collected(process) for process in running]
    text = json.dumps(report(rows))
    sys.stdout.write(text + "\n")
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
