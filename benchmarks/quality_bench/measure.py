"""Measures how many LM calls the other optimizers' settings make, and writes ``chosen.json``.

An LM that costs nothing answers right half of the time, so that bootstrapping succeeds now and then; proposals are texts of
their own. The data has the shape of each task: as many examples and labels, the same program.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

from quality_bench import cells, optimizers, settings
from quality_bench.counting import CountedMetric
from quality_bench.lms import Lms, counted_lms
from quality_bench.tasks import TASKS, Examples, Task

SIZES = {"sst2": (120, 20), "ag_news": (240, 40), "trec": (360, 60), "banking77": (600, 100)}
"""Examples of trainset and valset per data folder; the other binary tasks are as sst2."""


class HalfRight:
    """An engine that fills any schema. The label is right for half of all prompts, which half is their hash's choice."""

    supports_function_calling = False
    supports_reasoning = False
    supports_response_schema = True
    supported_params = frozenset(
        {"temperature", "max_tokens", "stop", "seed", "response_format", "top_p", "n"}
    )

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    def complete(self, request: Request) -> Response:
        schema = dict((request.config.response_format or {}).get("schema") or {})
        text = "".join(getattr(part, "text", "") for part in request.messages[-1].parts)
        code = hashlib.sha256(f"{request!r}".encode()).digest()
        found = re.search(r"example (\d+)", text)
        number = int(found[1]) if found else code[1]
        right = self.labels[number % len(self.labels)]
        wrong = self.labels[(number + 1) % len(self.labels)]
        answer = _fill(schema, schema, right if code[0] % 2 else wrong, code.hex()[:8])
        return Response(
            id="half-right",
            model=request.model,
            message=Message.assistant([TextPart(json.dumps(answer) if schema else f"text {code.hex()[:8]}")]),
            finish_reason="stop",
            usage=Usage(input_tokens=1, output_tokens=1),
        )


class AsyncHalfRight(HalfRight):
    async def complete(self, request: Request) -> Response:  # type: ignore[override]
        return super().complete(request)


def _fill(part: Mapping[str, Any], root: Mapping[str, Any], label: str, word: str) -> Any:
    """A value that fits a JSON schema: the label where it may stand, a word for free text."""
    while "$ref" in part:
        part = root["$defs"][part["$ref"].rsplit("/", 1)[1]]
    if "enum" in part:
        return label if label in part["enum"] else part["enum"][0]
    if "anyOf" in part:
        return _fill(part["anyOf"][0], root, label, word)
    kind = part.get("type")
    if kind == "object":
        return {
            name: _fill(inner, root, label, f"{word} {name}")
            for name, inner in part.get("properties", {}).items()
        }
    plain = {"array": [], "integer": 1, "number": 1.0, "boolean": True, "null": None}
    return plain.get(str(kind), f"text {word}")


def half_right_lms(task: Task) -> Lms:
    """Both roles over an LM that answers right half of the time."""
    lm = dspy.LM(
        "measure/half-right", engine=HalfRight(task.labels), async_engine=AsyncHalfRight(task.labels)
    )
    return counted_lms("half-right", lm)


def made_examples(task: Task, train: int, valid: int, test: int = 0) -> Examples:
    """Numbered examples of a task whose labels follow their numbers."""

    def part(first: int, count: int) -> list[dspy.Example]:
        return [
            dspy.Example(
                **dict.fromkeys(task.inputs, f"example {number}"),
                label=task.labels[number % len(task.labels)],
            ).with_inputs(*task.inputs)
            for number in range(first, first + count)
        ]

    return Examples(part(0, train), part(train, valid), part(train + valid, test))


def calls_of(name: str, task: Task, examples: Examples, budget: int, chosen: settings.Settings) -> int:
    """Task-LM calls of one optimizer with one setting."""
    lms = half_right_lms(task)
    calls = lms.book.start(0)
    optimizer = optimizers.find(name)
    job = optimizers.Job(task, lms, examples, budget, 0, CountedMetric(feedback=optimizer.feedback))
    with dspy.context(lm=lms.task, adapter=dspy.JSONAdapter()), cells.quiet():
        optimizers.SEARCHES[name](job, chosen)
    return calls.of("task")


def main(budgets: Sequence[int], names: Sequence[str] = settings.SEARCHERS) -> None:
    """Measure these optimizers at every budget on every shape of task; rewrites their part of ``chosen.json``."""
    table: dict[str, Any] = settings.table()
    for name in names:
        for folder, (train, valid) in SIZES.items():
            for task in (one for one in TASKS.values() if one.folder == folder):
                examples = made_examples(task, train, valid)
                shape = settings.Shape(valid, task.predictors)
                for budget in budgets:
                    rung, calls = settings.select(
                        settings.ladder(name, budget, shape),
                        budget,
                        lambda rung: calls_of(name, task, examples, budget, rung.settings),  # noqa: B023
                    )
                    key = settings.key(name, budget, shape)
                    table[key] = {"measured_calls": calls, "settings": rung.settings}
                    print(f"{key}: {calls} calls, {rung.settings}", file=sys.stderr, flush=True)
    settings.CHOSEN.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
