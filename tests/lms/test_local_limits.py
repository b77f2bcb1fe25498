"""Answers that end early: at max_tokens, and where the model's context ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import dspy
import numpy as np
import pytest
import torch
from dspy.utils.exceptions import ContextWindowExceededError
from local_tiny import object_format, request, scheduler_of, tiny_lm, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel


@pytest.fixture(scope="module")
def lm() -> Iterator[dspy.LM]:
    made = tiny_lm(num_retries=0)
    yield made
    made.engine.close()


def decode(answer: Any, written: str) -> None:
    """Decode as a model would that likes the first label best, and writes `written` wherever it is free to."""
    rest = iter(answer.encode(written))
    while not answer.done:
        trie = answer.ask().trie
        if trie is not None:
            answer.take_labels(np.linspace(-1.0, -2.0, len(trie.scored_rows)))
            continue
        scores = np.full(answer.vocabulary, -20.0)
        scores[next(rest)] = 0.0
        answer.take_token(scores)


@pytest.mark.parametrize("max_tokens", range(24, 34, 3))
@pytest.mark.parametrize(
    ("schema", "written"),
    [
        ({"type": "integer"}, "1" * 60),
        ({"type": "number"}, "3." + "1" * 60),
        ({"type": "array", "items": {"type": "integer"}}, "1," * 20),
    ],
)
def test_a_value_in_progress_is_closed_as_it_is(
    lm: dspy.LM, schema: dict[str, Any], written: str, max_tokens: int
) -> None:
    # Another field follows: there a number is left by a comma, not by a bracket.
    form = object_format(n=schema, ok={"type": "boolean"})
    job, _ = lm.engine.core.prepare(request("?", response_format=form, max_tokens=max_tokens))
    decode(job.answer, written)
    found = json.loads(job.answer.text)
    assert found["ok"] is True
    assert set(json.dumps(found["n"])) <= set("0123., []")
    assert "00" not in job.answer.text
    assert job.answer.finish_reason == "length"
    assert job.answer.output_tokens <= max_tokens


def learned_positions() -> Any:
    """A model that has no position past its context: to go on there is an error in the middle of a pass."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=257)).eval()


LABEL = {"type": "string", "enum": ["alphaalphaalpha", "betabetabetabeta"]}


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    "fields", [{"label": LABEL}, {"reason": {"type": "string"}, "label": LABEL, "n": {"type": "integer"}}]
)
def test_no_answer_goes_past_the_context(fields: dict[str, Any], learned: bool) -> None:
    model = learned_positions() if learned else tiny_model(context=128)
    lm = tiny_lm(model=model, fused=not learned, num_retries=0)
    refused = []
    for length in range(12, 110, 3):
        asked = request(
            "x" * length, response_format=object_format(**fields), temperature=1.0, seed=length, top_p=0.9
        )
        try:
            response = lm(asked)
        except ContextWindowExceededError:
            refused.append(length)
            continue
        assert not refused, "a longer prompt leaves less room"
        assert set(json.loads(response.text)) == set(fields)
        assert response.usage.total_tokens <= 128
    assert 12 < refused[0] < 90
    lm.engine.close()


def test_an_answer_that_outgrows_its_reserve_ends_at_the_context() -> None:
    lm = tiny_lm(model=learned_positions(), fused=False, num_retries=0)
    nested: dict[str, Any] = {"type": "integer"}
    for name in ("first_long_name", "second_long_name", "third_long_name"):
        nested = {
            "type": "object",
            "properties": {name: nested},
            "required": [name],
            "additionalProperties": False,
        }
    for length in range(40, 80):
        form = object_format(n=nested, label=LABEL)
        try:
            response = lm(request("x" * length, response_format=form))
        except ContextWindowExceededError:
            break
        assert response.usage.total_tokens <= 128 or response.finish_reason == "length"
    assert scheduler_of(lm).passes > 0
    lm.engine.close()


def test_a_bare_number_that_begins_another_ends_or_goes_on(lm: dspy.LM) -> None:
    form = {"type": "json_schema", "schema": {"enum": [1, 10, 100]}}
    found = {
        json.loads(lm(request("?", response_format=form, temperature=2.0, seed=seed)).text)
        for seed in range(20)
    }
    assert found <= {1, 10, 100}
    assert len(found) > 1
