"""Two hosted providers and a local model as three workers of one compile, with a cap in money.

    OPENAI_API_KEY=… ANTHROPIC_API_KEY=… python examples/two_providers.py
    python examples/two_providers.py --second openai/llama3 --second-base http://localhost:8000/v1 --calls 120

Each worker has a third of the messages. The hosted ones are called over the wire, limited and priced; the local one
costs nothing. What comes out is one program; ``result.spending`` says who spent what.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any, Literal

import dspy

from asyndbt_dspy import AsynDBT, Budget, Price, Worker, local_lm

DATA = pathlib.Path(__file__).parent / "data" / "support_desk" / "train.jsonl"


class Topic(dspy.Signature):
    """Name the topic of a customer's message to a smart-home company."""

    message: str = dspy.InputField()
    topic: Literal["billing", "delivery", "returns", "login", "malfunction", "question"] = dspy.OutputField()


def metric(gold: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(gold.topic == prediction.topic)


def hosted(model: str, base: str | None, engine: str) -> dspy.LM:
    """A hosted LM: through DSPy's own client where it has one (``auto``), or through LiteLLM."""
    address = {} if base is None else {"api_base": base}
    return dspy.LM(model, engine=engine, temperature=0.0, max_tokens=60, num_retries=3, **address)


def main() -> int:
    """Compile, and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", default="openai/gpt-4o-mini")
    parser.add_argument("--first-base", help="address of a server that speaks OpenAI's protocol")
    parser.add_argument("--second", default="anthropic/claude-haiku-4-5")
    parser.add_argument("--second-base")
    parser.add_argument("--local", default="smollm2-135m")
    parser.add_argument("--engine", choices=("auto", "litellm"), default="auto")
    parser.add_argument("--calls", type=int, default=300, help="metric calls")
    parser.add_argument("--dollars", type=float, default=0.50)
    parser.add_argument("--out", type=pathlib.Path, help="file for the program")
    arguments = parser.parse_args()

    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    examples = [
        dspy.Example(message=row["message"], topic=row["label"]).with_inputs("message") for row in rows
    ]
    workers = [
        Worker(
            "first",
            examples[0::3],
            lm=hosted(arguments.first, arguments.first_base, arguments.engine),
            max_concurrency=16,
            requests_per_minute=600,
            price=Price(prompt=0.15, completion=0.60),
        ),
        Worker(
            "second",
            examples[1::3],
            lm=hosted(arguments.second, arguments.second_base, arguments.engine),
            max_concurrency=8,
            requests_per_minute=300,
            price=Price(prompt=1.0, completion=5.0),
        ),
        Worker("local", examples[2::3], lm=local_lm(arguments.local, max_tokens=60), max_concurrency=16),
    ]
    dspy.configure(adapter=dspy.JSONAdapter())
    optimizer = AsynDBT(
        metric,
        workers=workers,
        budget=Budget(metric_calls=arguments.calls, dollars=arguments.dollars),
        confirm=lambda estimate: bool(sys.stderr.write(f"expected: {estimate}\n")),
    )
    program = optimizer.compile(dspy.Predict(Topic))
    sys.stdout.write(f"{optimizer.result}\n")
    if arguments.out is not None:
        program.save(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
