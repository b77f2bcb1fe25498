"""An LM whose answers depend on every byte of the prompt, and programs of several kinds."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Literal

import dspy
from dspy.lm15 import Message, Request, Response, TextPart, Usage

FIELD = re.compile(r"`(?:\[\[ ## )?(\w+)(?: ## \]\])?`")


class HashEngine:
    """Answers every output field with a hash of the whole prompt: another prompt is another answer."""

    supported_params = frozenset({"temperature"})

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __deepcopy__(self, memo: dict) -> HashEngine:
        return self

    def complete(self, request: Request) -> Response:
        texts = [str(request.system)] + [f"{m.role}:{m.text}" for m in request.messages]
        prompt = "\n".join(texts)
        self.prompts.append(prompt)
        digest = hashlib.sha256(prompt.encode()).hexdigest()
        ask = request.messages[-1].text.rsplit("Respond with", 1)[1]
        names = [name for name in FIELD.findall(ask) if name != "completed"]
        values = {name: self.value(name, digest) for name in names}
        if "JSON object" in ask:
            text = json.dumps(values)
        else:
            text = "".join(f"[[ ## {n} ## ]]\n{_text(v)}\n\n" for n, v in values.items())
            text += "[[ ## completed ## ]]"
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant([TextPart(text)]),
            finish_reason="stop",
            usage=Usage(input_tokens=len(prompt), output_tokens=len(text)),
        )

    def value(self, name: str, digest: str) -> object:
        number = int(digest, 16)
        if name == "next_tool_name":
            return ("lookup", "finish")[number % 2]
        if name == "next_tool_args":
            return {"word": digest[:4]}
        if name == "label":
            return ("low", "high", "none")[number % 3]
        return digest[:12]


class AsyncHashEngine:
    def __init__(self, sync: HashEngine) -> None:
        self.sync = sync

    def __deepcopy__(self, memo: dict) -> AsyncHashEngine:
        return self

    async def complete(self, request: Request) -> Response:
        return self.sync.complete(request)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def hash_lm() -> dspy.LM:
    engine = HashEngine()
    return dspy.LM("test/hash", engine=engine, async_engine=AsyncHashEngine(engine), cache=False)


def lookup(word: str) -> str:
    """Look a word up."""
    return f"meaning of {word}"


class Classify(dspy.Signature):
    """Say how urgent the message is."""

    message: str = dspy.InputField(desc="what the customer wrote")
    tags: list[str] = dspy.InputField()
    label: Literal["low", "high", "none"] = dspy.OutputField()


class TwoSteps(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.summarize = dspy.Predict("message -> summary")
        self.decide = dspy.ChainOfThought("summary, message -> answer")

    def forward(self, message: str) -> dspy.Prediction:
        summary = self.summarize(message=message).summary
        return self.decide(summary=summary, message=message)


def single() -> dspy.Module:
    return dspy.Predict(Classify)


def react() -> dspy.Module:
    return dspy.ReAct("message -> answer", tools=[lookup], max_iters=3)


KINDS = {"single": single, "two_steps": TwoSteps, "react": react}


def tuned(kind: str) -> dspy.Module:
    """A program of that kind with other instructions and demos than it was written with."""
    program = KINDS[kind]()
    for number, (_, predictor) in enumerate(program.named_predictors()):
        text = predictor.signature.instructions + f'\nMind {{braces}} and "quotes" — №{number} 🙂.'
        predictor.signature = predictor.signature.with_instructions(text)
        predictor.demos = [demo_of(predictor, i) for i in range(3)]
    return program


def demo_of(predictor: dspy.Predict, number: int) -> dspy.Example:
    values: dict[str, object] = {
        name: f"{name} {number} <b>{{x}}</b>\nnext line" for name in predictor.signature.fields
    }
    for name, info in predictor.signature.fields.items():
        if name == "label":
            values[name] = ("low", "high", "none")[number % 3]
        elif name == "next_tool_name":
            values[name] = "lookup"
        elif info.annotation is not str and "list" in str(info.annotation):
            values[name] = ["a", f"b{number}"]
        elif "dict" in str(info.annotation):
            values[name] = {"word": f"w{number}"}
    return dspy.Example(**values, source="a note that is no field").with_inputs(
        *predictor.signature.input_fields
    )


def examples(kind: str, count: int = 12) -> list[dspy.Example]:
    made = []
    for number in range(count):
        fields: dict[str, object] = {"message": f"message {number} {{'a': 1}} <i>"}
        if kind == "single":
            fields["tags"] = ["x", str(number)]
        made.append(dspy.Example(**fields, answer=str(number)).with_inputs(*fields))
    return made
