"""Bring a DSPy program to LangChain: a saved artifact, a prompt without DSPy, and a check that nothing is lost.

python examples/langchain_export.py [--test 40]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile
from typing import Literal

import dspy
from langchain_asyndbt import load_prompt, response_format, to_chat_model, to_parser, to_prompt, to_runnable
from langchain_core.load import dumps

from asyndbt_dspy import local_lm
from asyndbt_dspy.deploy import load_artifact, save_artifact

DATA = pathlib.Path(__file__).parent / "data" / "support_desk"


class Route(dspy.Signature):
    """Say what the customer's message is about."""

    message: str = dspy.InputField()
    topic: Literal["login", "billing", "delivery", "returns", "malfunction", "question"] = dspy.OutputField()


def load(name: str) -> list[dspy.Example]:
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [dspy.Example(message=row["message"], topic=row["label"]).with_inputs("message") for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--test", type=int, default=40, help="test examples")
    options = parser.parse_args()

    lm, adapter = local_lm("smollm2-135m", deterministic=True), dspy.JSONAdapter()
    trainset, test = load("train"), load("test")[: options.test]
    # Any DSPy program will do; to keep this short, its demos are not searched for.
    program = dspy.LabeledFewShot(k=4).compile(dspy.Predict(Route), trainset=trainset)

    with tempfile.TemporaryDirectory() as folder:
        saved = save_artifact(
            program, pathlib.Path(folder) / "route", trainset=trainset, adapter=adapter, lm=lm
        )
        print("saved:", ", ".join(sorted(file.name for file in saved.iterdir())))
        program = load_artifact(saved)

    # What a service without DSPy needs: the prompt as text, and what DSPy sends beside it.
    text = dumps(to_prompt(program, adapter=adapter))
    schema = response_format(program, adapter=adapter)
    print(f"prompt: {len(text)} characters of JSON")

    model = to_chat_model(lm)
    chain = load_prompt(text) | model.bind(response_format=schema) | to_parser(program, adapter=adapter)
    runnable = to_runnable(program, lm=lm, adapter=adapter)

    inputs = [{"message": example.message} for example in test]
    with dspy.context(lm=lm, adapter=adapter):
        by_program = [program(**values).topic for values in inputs]
    by_runnable = [answer["topic"] for answer in runnable.batch(inputs)]
    by_chain = [answer["topic"] for answer in chain.batch(inputs)]
    right = sum(answer == example.topic for answer, example in zip(by_program, test, strict=True))
    print(f"right: {right} of {len(test)}")
    print("program, runnable and chain answer alike:", by_program == by_runnable == by_chain)
    lm.engine.close()


if __name__ == "__main__":
    main()
