"""The demo: three workers improve a support-desk classifier on a local LM, without a key and without a network.

    python examples/support_desk.py                 one seed, everything compared
    python examples/support_desk.py --seeds 5       five seeds of ours
    python examples/support_desk.py --score runs/demo/program.json      score a saved program (a new process)

Each worker has its own shard, skewed towards other classes than its neighbours', and they are unequally fast. What
comes out is one program. ``runs/demo/result.json`` holds the figures.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import os
import pathlib
import random
import subprocess
import sys
import time
from typing import Any, Literal

import dspy

from asyndbt_dspy import AsynDBT, Budget, Worker, local_lm

DATA = pathlib.Path(__file__).parent / "data" / "support_desk"
MODEL = "smollm2-135m"
TEAMS = {
    "login": "account",
    "billing": "payment",
    "delivery": "shipping",
    "returns": "shipping",
    "malfunction": "device",
    "question": "device",
}
"""Topic of a message (as the data has it) -> team that answers it."""
LEANINGS = {
    "north": ("billing", "delivery"),
    "south": ("returns", "login"),
    "web": ("malfunction", "question"),
}
"""Topics that a worker's shard holds more of."""
CONCURRENCY = {"north": 12, "south": 6, "web": 2}


class Route(dspy.Signature):
    """Route a customer's message to the right team of a smart-home company.

    account: passwords, codes, locked accounts and signing in.
    payment: charges, invoices and refunds of the subscription.
    shipping: orders, parcels, addresses, delays and sending goods back.
    device: a device or the app does not work, or a question about how it works.
    """

    message: str = dspy.InputField()
    team: Literal["account", "payment", "shipping", "device"] = dspy.OutputField()


def load(name: str) -> list[dspy.Example]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        dspy.Example(message=row["message"], team=TEAMS[row["label"]], topic=row["label"]).with_inputs(
            "message"
        )
        for row in rows
    ]


def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(gold.team == prediction.team)


def skewed_shards(examples: list[dspy.Example], seed: int) -> dict[str, list[dspy.Example]]:
    """Half of each topic goes to the worker that leans towards it, the rest to the others."""
    rng = random.Random(seed)
    shards: dict[str, list[dspy.Example]] = {name: [] for name in LEANINGS}
    for topic in TEAMS:
        members = [one for one in examples if one.topic == topic]
        rng.shuffle(members)
        home = next(name for name, leaning in LEANINGS.items() if topic in leaning)
        others = [name for name in LEANINGS if name != home]
        half = len(members) // 2
        shards[home] += members[:half]
        for place, one in enumerate(members[half:]):
            shards[others[place % 2]].append(one)
    for shard in shards.values():
        rng.shuffle(shard)
    return shards


def answers(program: dspy.Module, examples: list[dspy.Example]) -> list[str]:
    """The program's answers, several at a time."""
    calls = [(program, one.inputs()) for one in examples]
    parallel = dspy.Parallel(num_threads=32, disable_progress_bar=True, provide_traceback=True)
    return [str(getattr(one, "team", "")) for one in parallel(calls)]


def accuracy(found: list[str], examples: list[dspy.Example]) -> float:
    return sum(answer == one.team for answer, one in zip(found, examples, strict=True)) / len(examples)


def optimize(
    student: dspy.Module, trainset: list[dspy.Example], calls: int, seed: int, **options: Any
) -> tuple[Any, Any]:
    """Ours: three workers, asynchronous."""
    workers = [
        Worker(name, shard, max_concurrency=CONCURRENCY[name])
        for name, shard in skewed_shards(trainset, seed).items()
    ]
    optimizer = AsynDBT(metric, workers=workers, budget=Budget(metric_calls=calls), seed=seed, **options)
    return optimizer.compile(student), optimizer.result


def random_search(student: dspy.Module, trainset: list[dspy.Example], calls: int, seed: int) -> dspy.Module:
    """``BootstrapFewShotWithRandomSearch`` with as many metric calls and as many demos as ours has slots."""
    shuffled = random.Random(seed).sample(trainset, len(trainset))
    validation, pool = shuffled[:40], shuffled[40:]
    # The student, a labelled set, a bootstrapped set and n random ones, each scored on every validation example.
    candidates = max(1, calls // len(validation) - 3)
    optimizer = dspy.BootstrapFewShotWithRandomSearch(
        metric=metric,
        max_bootstrapped_demos=2,
        max_labeled_demos=4,
        num_candidate_programs=candidates,
        num_threads=16,
    )
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        return optimizer.compile(student, trainset=pool, valset=validation)  # it prints a bar per candidate


def show(program: dspy.Module) -> None:
    for name, predictor in program.named_predictors():
        print(f"\n--- predictor {name!r}: instructions\n{predictor.signature.instructions}")
        for demo in predictor.demos:
            print(f"--- demo: [{demo.get('team')}] {demo.get('message')}")


def score_saved(path: pathlib.Path) -> list[str]:
    """In a new process: load the program and answer the test part."""
    program = dspy.Predict(Route)
    program.load(path)
    return answers(program, load("test"))


def main() -> None:
    arguments = parse()
    logging.getLogger("dspy").setLevel(logging.WARNING)
    # float32: a reloaded program then answers exactly as the saved one, whatever else is in the batch.
    dspy.configure(lm=local_lm(arguments.lm, deterministic=True), adapter=dspy.JSONAdapter())
    if arguments.score:
        print(json.dumps(score_saved(arguments.score)))
        return
    train, test = load("train"), load("test")
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    student = dspy.Predict(Route)
    student_score = accuracy(answers(student, test), test)
    common = collections.Counter(one.team for one in train).most_common(1)[0][0]
    print(f"student                           {student_score:6.1%}  (test part, {len(test)} messages)")
    print(f"majority class                    {accuracy([common] * len(test), test):6.1%}")
    labelled = dspy.LabeledFewShot(k=4).compile(student, trainset=train)
    print(f"LabeledFewShot(4)                 {accuracy(answers(labelled, test), test):6.1%}")
    if not arguments.skip_random_search:
        searched = random_search(student, train, arguments.calls, seed=0)
        shown = accuracy(answers(searched, test), test)
        print(f"BootstrapFewShotWithRandomSearch  {shown:6.1%}  (about as many calls)")
    scores: list[float] = []
    for seed in range(arguments.seeds):
        begun = time.perf_counter()
        options = {"demo_ending": False} if arguments.demos_as_shown else {}
        program, result = optimize(student, train, arguments.calls, seed, **options)
        found = answers(program, test)
        scores.append(accuracy(found, test))
        path = arguments.out / ("program.json" if not seed else f"program-{seed}.json")
        program.save(path)
        print(
            f"AsynDBT, seed {seed}                   {scores[-1]:6.1%}  in {time.perf_counter() - begun:.0f} s"
        )
        if not seed:
            first, first_result, first_answers, first_path = program, result, found, path
    mean = sum(scores) / len(scores)
    if len(scores) > 1:
        print(
            f"AsynDBT, mean of {len(scores)} seeds          {mean:6.1%}  ({mean - student_score:+.1%} over the student)"
        )
    print(f"\n{first_result}")
    show(first)
    reloaded = in_new_process(first_path, arguments.lm)
    same = sum(one == other for one, other in zip(reloaded, first_answers, strict=True))
    print(
        f"\nsaved to {first_path}; loaded in a new process it answers {same} of {len(test)} messages as before"
    )
    figures = {
        "student_score": student_score,
        "optimized_score": mean,
        "scores": scores,
        "metric_calls": first_result.metric_calls,
        "seconds": time.perf_counter() - started,
        "program_path": str(first_path),
        "reloaded_same_answers": same,
        "test_messages": len(test),
    }
    (arguments.out / "result.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (arguments.out / "run.json").write_text(first_result.to_json() + "\n", encoding="utf-8")
    if same != len(test):
        sys.exit("the reloaded program answers differently")


def in_new_process(path: pathlib.Path, lm: str) -> list[str]:
    command = [sys.executable, __file__, "--score", str(path), "--lm", lm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds of ours")
    parser.add_argument("--calls", type=int, default=300, help="metric calls of each optimizer")
    parser.add_argument("--lm", default=MODEL, help="what local_lm takes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/demo"))
    parser.add_argument("--score", type=pathlib.Path, help="only score this saved program")
    parser.add_argument("--demos-as-shown", action="store_true", help="set demo_ending=False")
    parser.add_argument("--skip-random-search", action="store_true", help="leave the slowest comparison out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
