"""An exported prompt sends the adapter's messages, before and after it was written and read; nothing is lost."""

from __future__ import annotations

import json
from typing import Any, Literal

import dspy
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_asyndbt import (
    load_prompt,
    prompt_inputs,
    response_format,
    to_chat_model,
    to_parser,
    to_prompt,
    to_runnable,
)
from langchain_asyndbt.messages import to_openai
from langchain_core.exceptions import OutputParserException
from langchain_core.load import dumps
from langchain_core.messages import BaseMessage
from scripted_chat import chat_lm

from asyndbt_dspy.errors import ExportError

ADAPTERS = (
    dspy.ChatAdapter(use_json_adapter_fallback=False),
    dspy.JSONAdapter(),
    dspy.XMLAdapter(use_json_adapter_fallback=False),
)
HOSTILE = [
    "{",
    "}",
    "{{",
    "}}",
    "{question}",
    "{{question}}",
    "<b>&amp;</b>",
    "System: obey",
    "\n",
    "🙂",
    '{"a": [1]}',
]
MORE = [
    "[[ ## answer ## ]]",
    "</question>",
    "%s",
    "\\",
    "'''",
    " ",
    "\t",
    "```",
    "Human: x",
    "{% x %}",
    "\x00",
    "\u2028",
]
texts = st.lists(
    st.sampled_from(HOSTILE + MORE) | st.text(st.characters(codec="utf-8"), max_size=5), max_size=6
).map("".join)
LABELS = ("{x}", "{{y}}", "plain", "{question}", "<z>")
names = st.lists(
    st.sampled_from(["question", "context", "title", "n1", "x_y"]), min_size=1, max_size=3, unique=True
)


@st.composite
def programs(draw: st.DrawFn) -> tuple[dspy.Predict, dict[str, Any]]:
    inputs, outputs = draw(names), draw(st.sampled_from([("answer",), ("answer", "label")]))
    fields: dict[str, Any] = {name: (str, dspy.InputField(desc=draw(texts) or None)) for name in inputs}
    # The names of a Literal's labels are in the last message, beside the inputs.
    types = {"answer": str, "label": Literal[LABELS]}
    fields |= {name: (types[name], dspy.OutputField(desc=draw(texts))) for name in outputs}
    predictor = dspy.Predict(dspy.Signature(fields, draw(texts) or "x"))
    every = (*inputs, *outputs)
    predictor.demos = [
        dspy.Example(**{name: draw(texts) for name in draw(st.sampled_from([every, every[1:] or every]))})
        for _ in range(draw(st.integers(0, 3)))
    ]
    return predictor, {name: draw(texts) for name in inputs}


def plain(messages: list[BaseMessage]) -> list[dict[str, Any]]:
    return [{"role": m["role"], "content": m["content"]} for m in to_openai(messages)]


@settings(max_examples=300, deadline=None)
@given(programs(), st.sampled_from(ADAPTERS))
def test_messages_equal_the_adapters_before_and_after_dumps(
    made: tuple[dspy.Predict, dict[str, Any]], adapter: dspy.Adapter
) -> None:
    predictor, values = made
    expected = adapter.format(predictor.signature, list(predictor.demos), dict(values))
    prompt = to_prompt(predictor, adapter=adapter)
    assert plain(prompt.invoke(values).to_messages()) == expected
    assert plain(load_prompt(dumps(prompt)).invoke(values).to_messages()) == expected


class Item(pydantic.BaseModel):
    name: str
    count: int


class Typed(dspy.Signature):
    """Count."""

    items: list[str] = dspy.InputField()
    best: Item = dspy.InputField()
    limit: int = dspy.InputField(default=3)
    label: Literal["low", "high"] = dspy.OutputField()
    count: int = dspy.OutputField()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_values_of_other_types_are_written_by_prompt_inputs(adapter: dspy.Adapter) -> None:
    program = dspy.Predict(Typed)
    values = {"items": ["a", "{b}"], "best": Item(name="x", count=1)}
    chain = prompt_inputs(program) | to_prompt(program, adapter=adapter)
    expected = adapter.format(Typed, [], {**values, "limit": 3})
    assert plain(chain.invoke(values).to_messages()) == expected


def test_other_objects_are_not_read_as_prompts() -> None:
    text = json.dumps(
        {"lc": 1, "type": "constructor", "id": ["langchain", "llms", "openai", "OpenAI"], "kwargs": {}}
    )
    with pytest.raises(ValueError, match="not allowed"):
        load_prompt(text)


def test_the_response_format_is_what_dspy_sends() -> None:
    program = dspy.Predict(Typed)
    seen: list[Any] = []

    def answer(request: Any) -> str:
        raise AssertionError("the schema is answered by the engine")

    lm = chat_lm(answer)
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        program(items=["a"], best=Item(name="x", count=1))
    seen = [request.config.response_format for request in lm.engine.requests]
    exported = response_format(program, adapter=dspy.JSONAdapter())
    assert exported["type"] == "json_schema"
    assert exported["json_schema"]["schema"] == seen[0]["schema"]
    assert exported["json_schema"]["strict"] == seen[0]["strict"]
    assert response_format(program, adapter=dspy.ChatAdapter()) is None


def test_what_cannot_be_exact_is_refused() -> None:
    with pytest.raises(ExportError, match="History"):
        to_prompt(dspy.Predict("history: dspy.History, q -> a"))
    with pytest.raises(ExportError, match="none can be called 'self'"):
        to_prompt(dspy.Predict("self -> a"))


def test_no_response_format_of_inputs_that_a_prompt_cannot_express() -> None:
    program = dspy.Predict("history: dspy.History, q -> a: list[int]")
    with pytest.raises(ExportError, match="'history' is a History"):
        response_format(program, adapter=dspy.JSONAdapter())

    class Strict(dspy.JSONAdapter):
        def format(self, signature: Any, demos: Any, inputs: Any) -> Any:
            raise KeyError("no such value")

    with pytest.raises(ExportError, match=r"Strict sends nothing.*KeyError"):
        response_format(dspy.Predict("q -> a"), adapter=Strict())


class Extract(dspy.Signature):
    """Find the label."""

    text: str = dspy.InputField()
    label: Literal["low", "high", "none"] = dspy.OutputField()


def by_content(request: Any) -> str:
    """Answers from the whole prompt; sometimes in no readable form."""
    said = str(request.system) + "".join(m.text for m in request.messages)
    number = sum(said.encode()) % 7
    label = ("low", "high", "none")[number % 3]
    if number == 6:
        return "no idea"
    if "JSON object" in said:
        return json.dumps({"label": label})
    if "[[ ## label ## ]]" in said:
        return f"[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]"
    return f"<label>\n{label}\n</label>"


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_no_loss_on_extraction(adapter: dspy.Adapter) -> None:
    """Program, runnable and prompt | model | parser score alike on 100 examples, failures included."""
    program = dspy.Predict(Extract)
    program.demos = [dspy.Example(text="{x} <y>", label="low"), dspy.Example(text="b", label="none")]
    # Without a declared schema the three send the same requests; with one it is bound beside the prompt.
    lm = chat_lm(by_content)
    lm.engine.supported_params = frozenset()
    examples = [{"text": f"text {n} {{braces}}"} for n in range(100)]
    gold = [("low", "high", "none")[n % 3] for n in range(100)]

    def direct(inputs: dict[str, str]) -> str:
        with dspy.context(lm=lm, adapter=adapter):
            return program(**inputs).label

    runnable = to_runnable(program, lm=lm, adapter=adapter)
    chain = to_prompt(program, adapter=adapter) | to_chat_model(lm) | to_parser(program, adapter=adapter)
    forms = (
        direct,
        lambda inputs: runnable.invoke(inputs)["label"],
        lambda inputs: chain.invoke(inputs)["label"],
    )
    answers = [[attempt(form, inputs) for inputs in examples] for form in forms]
    assert answers[0] == answers[1] == answers[2]
    scores = {sum(a == g for a, g in zip(found, gold, strict=True)) for found in answers}
    assert len(scores) == 1
    assert 0 < next(iter(scores)) < 100
    assert None in answers[0], "unreadable answers must be among those compared"


def attempt(form: Any, inputs: dict[str, str]) -> str | None:
    try:
        return form(inputs)
    except (OutputParserException, dspy.utils.exceptions.AdapterParseError):
        return None
