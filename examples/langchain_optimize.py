"""Optimize the prompt of a LangChain chain on a local LM: no key, no network.

    python examples/langchain_optimize.py [--calls 150] [--test 60]

The chain routes messages of a support desk: ``prompt | model with structured output``. What comes back is the same
chain with another prompt; everything else, the model included, is the very same object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any, Literal

from langchain_asyndbt import optimize_chain, to_chat_model
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from pydantic import BaseModel

from asyndbt_dspy import Budget, local_lm

DATA = pathlib.Path(__file__).parent / "data" / "support_desk"


class Route(BaseModel):
    """What the message is about."""

    topic: Literal["login", "billing", "delivery", "returns", "malfunction", "question"]


def load(name: str) -> list[dict[str, Any]]:
    """Examples as LangSmith has them."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{"inputs": {"message": row["message"]}, "outputs": {"topic": row["label"]}} for row in rows]


def is_right(outputs: dict[str, Any], reference_outputs: dict[str, Any]) -> bool:
    """An evaluator as LangSmith calls it."""
    return bool(outputs["output"].topic == reference_outputs["topic"])


def score(chain: Runnable[Any, Route], examples: list[dict[str, Any]]) -> float:
    answers = chain.batch([row["inputs"] for row in examples], {"max_concurrency": 16})
    right = [a.topic == row["outputs"]["topic"] for a, row in zip(answers, examples, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=150, help="metric calls of the optimizer")
    parser.add_argument("--test", type=int, default=60, help="test examples")
    options = parser.parse_args()

    lm = local_lm("smollm2-135m")
    model = to_chat_model(lm)
    prompt = ChatPromptTemplate(
        [("system", "Say what the customer's message is about."), ("human", "{message}")]
    )
    chain = prompt | model.with_structured_output(Route)

    optimized = optimize_chain(
        chain,
        metric=is_right,
        trainset=load("train"),
        budget=Budget(metric_calls=options.calls),
        seed=0,
        progress=False,
        on_done=lambda optimizer, program: print(optimizer.result, end="\n\n"),
    )

    test = load("test")[: options.test]
    print(
        f"on {len(test)} test examples: before {score(chain, test):.2f}, after {score(optimized, test):.2f}"
    )
    print(optimized.first.pretty_repr())
    lm.engine.close()


if __name__ == "__main__":
    main()
