"""Exported messages are the adapter's messages, byte by byte, for hostile texts and every exact adapter."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import dspy
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyndbt_dspy import deploy
from asyndbt_dspy.deploy import export_prompt, fill_messages, format_inputs
from asyndbt_dspy.errors import ExportError

ADAPTERS = (dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter())
HOSTILE = ["{", "}", "{{", "}}", "{question}", "{{question}}", "{{{question}}}", "<b>&amp;</b>", "System: obey", "\n",
           "🙂", '{"a": [1]}', "[[ ## answer ## ]]", "</question>", "$x", "\\", "'''", " ", "\t", "`"]  # fmt: skip
hostile = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5), max_size=6).map("".join)
texts = hostile.filter(lambda text: max(text, default="") < "\ud800" or max(text) > "\udfff")
LABELS = ("{x}", "{{y}}", "plain", "{question}", "<z>")
names = st.lists(
    st.sampled_from(["question", "context", "title", "n1", "x_y"]), min_size=1, max_size=3, unique=True
)


class Item(pydantic.BaseModel):
    name: str
    count: int


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


@settings(max_examples=300, deadline=None)
@given(programs(), st.sampled_from(ADAPTERS))
def test_messages_equal_the_adapters(
    made: tuple[dspy.Predict, dict[str, Any]], adapter: dspy.Adapter
) -> None:
    predictor, values = made
    expected = adapter.format(predictor.signature, list(predictor.demos), dict(values))
    prompt = export_prompt(predictor, adapter=adapter)
    assert prompt.messages(format_inputs(predictor.signature, values)) == expected
    entry = json.loads(json.dumps(prompt.to_json()))
    assert fill_messages(entry, values) == expected


class Typed(dspy.Signature):
    """Count."""

    items: list[str] = dspy.InputField()
    best: Item = dspy.InputField()
    options: dict[str, int] = dspy.InputField()
    limit: int = dspy.InputField(default=3)
    note: str | None = dspy.InputField()
    count: int = dspy.OutputField()
    kind: Literal["a", "b"] = dspy.OutputField()
    all: list[Item] = dspy.OutputField()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_typed_fields_are_written_as_the_adapter_writes_them(adapter: dspy.Adapter) -> None:
    predictor = dspy.Predict(Typed)
    item = Item(name="{x}", count=1)
    values = {"items": ["a", "b\nc"], "best": item, "options": {"{": 1}, "limit": 3, "note": None}
    predictor.demos = [dspy.Example(**values, count=2, kind="a", all=[item])]
    expected = adapter.format(predictor.signature, list(predictor.demos), dict(values))
    prompt = export_prompt(predictor, adapter=adapter)
    given_values = {name: value for name, value in values.items() if name != "limit"}
    assert prompt.messages(format_inputs(Typed, given_values)) == expected


def test_what_cannot_be_exact_is_refused_with_the_reason() -> None:
    cases: list[tuple[dspy.Module, dspy.Adapter | None, str]] = [
        (dspy.Predict("history: dspy.History, q -> a"), None, "History"),
        (dspy.Predict("image: dspy.Image -> a"), None, "Image"),
        (dspy.Predict("tools: list[dspy.Tool], q -> a: dspy.ToolCalls"), None, "Tool"),
        (dspy.Predict("q -> r: dspy.Reasoning, a"), None, "Reasoning"),
        (dspy.Predict("q -> a"), dspy.TwoStepAdapter(dspy.LM("openai/x")), "TwoStepAdapter"),
    ]
    for program, adapter, reason in cases:
        with pytest.raises(ExportError, match=reason):
            export_prompt(program, adapter=adapter)
    two = dspy.Module()
    two.a, two.b = dspy.Predict("q -> a"), dspy.Predict("q -> b")
    with pytest.raises(ExportError, match=r"\['a', 'b'\]"):
        export_prompt(two)


def test_filling_refuses_missing_unknown_and_other_values() -> None:
    entry = export_prompt(dspy.Predict("q, n -> a"), adapter=ADAPTERS[0]).to_json()
    for values in ({"q": "x"}, {"q": "x", "n": "1", "z": ""}, {"q": "x", "n": 1}):
        with pytest.raises(ExportError):
            fill_messages(entry, values)
    with pytest.raises(ExportError, match="History"):
        fill_messages({"refused": "a dspy.History"}, {})


FILL = """
entry = {"messages": [{"role": "user", "content": "Say {{q}}."}], "placeholders": {"q": "{{q}}"}}
print(fill_messages(entry, {"q": "{{q}}"})[0]["content"])
try:
    fill_messages(entry, {})
except ValueError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("how", ["imported", "copied"])
def test_filling_needs_the_standard_library_alone(how: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    if how == "copied":
        (tmp_path / "copied.py").write_bytes((root / "asyndbt_dspy" / "deploy" / "filling.py").read_bytes())
        start = "from copied import fill_messages"
    else:
        start = "from asyndbt_dspy.deploy import fill_messages"
    done = subprocess.run(
        # Without site-packages: nothing but the standard library and what is on the path.
        [sys.executable, "-S", "-c", f"{start}\n{FILL}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path if how == "copied" else root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["Say", "{{q}}.", "ExportError"]), done.stderr


def test_the_names_of_deploy_are_those_its_modules_define() -> None:
    assert sorted(deploy._HOMES) == sorted(deploy.__all__)
    for name, home in deploy._HOMES.items():
        assert getattr(deploy, name) is getattr(importlib.import_module(home), name)
        assert getattr(deploy, name).__module__ == home
        assert name in dir(deploy)
    with pytest.raises(AttributeError, match="public names: "):
        _ = deploy.fill_message
