"""A LangChain chain over sst2 with a small local LM, before and after ``optimize_chain``.

    python benchmarks/langchain_chain.py --data DIR [--lm gemma3-270m] [--seeds 3] [--calls 300]
                                         [--forms structured text]
                                         [--out benchmarks/results/langchain_chain.jsonl]

Two chains with one plain template. ``structured``: ``prompt | model.with_structured_output(…)``, where the model
can only choose between the two labels, so that it cannot fail for the form of its answer. ``text``: ``prompt | model |
parser``, where the model writes freely and the parser takes its first word.

trainset = train + pool, valset = valid, test only at the end. Three scores on the test set: the chain as it was, the
optimized DSPy program, and the chain that came back, which must score exactly what the program scores. One JSON line
per run, then one with the means of each form. The data folder is never copied (``--data`` or ``ASYNDBT_DATA``).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pathlib
import statistics
import sys
import time
from typing import Any, Literal

import dspy
from langchain_asyndbt import optimize_chain, to_chat_model
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable
from pydantic import BaseModel

from asyndbt_dspy import Budget, local_lm

TASK = "Classify the sentiment of the sentence from a film review as positive or negative."
BATCH = 16


class FirstWord(BaseOutputParser[str]):
    """The first word of the answer, without case and punctuation."""

    def parse(self, text: str) -> str:
        words = text.split()
        return words[0].strip(".,:;!\"'").lower() if words else ""


class Review(BaseModel):
    """A film review."""

    label: Literal["positive", "negative"]


def load(folder: pathlib.Path, part: str) -> list[dict[str, Any]]:
    """LangSmith-style examples of one part of sst2."""
    lines = (folder / "sst2" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{"inputs": {"sentence": row["sentence"]}, "outputs": {"label": row["label"]}} for row in rows]


def is_right(outputs: dict[str, Any], reference_outputs: dict[str, Any]) -> bool:
    """A LangSmith evaluator."""
    return label_of(outputs["output"]) == reference_outputs["label"]


def label_of(answer: Any) -> str:
    """The label in either chain's output."""
    return str(answer.label if isinstance(answer, Review) else answer)


def make_chain(lm: dspy.LM, form: str) -> Runnable[Any, Any]:
    prompt, model = ChatPromptTemplate([("system", TASK), ("human", "{sentence}")]), to_chat_model(lm)
    if form == "structured":
        return prompt | model.with_structured_output(Review)
    return prompt | model.bind(stop=["\n"], max_tokens=4) | FirstWord()


def answers_of_chain(chain: Runnable[Any, Any], test: list[dict[str, Any]]) -> list[str]:
    found = chain.batch([row["inputs"] for row in test], {"max_concurrency": BATCH})
    return [label_of(answer) for answer in found]


def answers_of_program(program: Any, test: list[dict[str, Any]]) -> list[str]:
    pairs = [(program, dspy.Example(**row["inputs"]).with_inputs(*row["inputs"])) for row in test]
    found = dspy.Parallel(num_threads=BATCH, disable_progress_bar=True)(pairs)
    return [label_of(prediction["output"]) for prediction in found]


def accuracy(answers: list[str], test: list[dict[str, Any]]) -> float:
    return statistics.fmean(a == row["outputs"]["label"] for a, row in zip(answers, test, strict=True))


def run(lm: dspy.LM, data: pathlib.Path, form: str, seed: int, calls: int, name: str) -> dict[str, Any]:
    chain = make_chain(lm, form)
    test = load(data, "test")
    kept: dict[str, Any] = {}

    def keep(optimizer: Any, program: Any) -> None:
        kept.update(result=optimizer.result, program=program)

    start = time.perf_counter()
    optimized = optimize_chain(
        chain,
        metric=is_right,
        trainset=[*load(data, "train"), *load(data, "pool")],
        valset=load(data, "valid"),
        budget=Budget(metric_calls=calls),
        demos_per_class=2,
        seed=seed,
        progress=False,
        on_done=keep,
    )
    seconds = time.perf_counter() - start
    by_program, by_chain = answers_of_program(kept["program"], test), answers_of_chain(optimized, test)
    before, after = accuracy(answers_of_chain(chain, test), test), accuracy(by_chain, test)
    return {
        "task": "sst2",
        "lm": name,
        "form": form,
        "seed": seed,
        "metric_calls": kept["result"].metric_calls,
        "winner": kept["result"].winner,
        "before": round(before, 4),
        "after": round(after, 4),
        "gain": round(after - before, 4),
        "dspy_form": round(accuracy(by_program, test), 4),
        "different_answers": sum(a != b for a, b in zip(by_program, by_chain, strict=True)),
        "test_examples": len(test),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=os.environ.get("ASYNDBT_DATA"))
    parser.add_argument("--lm", default="gemma3-270m")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--forms", nargs="+", choices=("structured", "text"), default=["structured", "text"])
    parser.add_argument("--out", type=pathlib.Path, default=None)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data or set ASYNDBT_DATA")
    # Answers that a small token limit cut off are what the text chain is about.
    logging.getLogger("dspy.clients.lm").setLevel(logging.ERROR)
    # The chain that comes back and the DSPy form are compared answer by answer: batches must not matter.
    lm = local_lm(options.lm, deterministic=True)
    for form in options.forms:
        lines = []
        for seed in range(options.seeds):
            lines.append(run(lm, pathlib.Path(options.data), form, seed, options.calls, options.lm))
            write(lines[-1], options.out)
        means = {
            key: round(statistics.fmean(line[key] for line in lines), 4)
            for key in ("before", "after", "gain")
        }
        different = sum(line["different_answers"] for line in lines)
        summary = {
            "task": "sst2",
            "lm": options.lm,
            "form": form,
            "seeds": options.seeds,
            "calls": options.calls,
        }
        write({**summary, **means, "different_answers": different}, options.out)
    lm.engine.close()
    return 0


def write(line: dict[str, Any], out: pathlib.Path | None) -> None:
    text = json.dumps(line)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
