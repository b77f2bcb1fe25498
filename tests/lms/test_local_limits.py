"""Answers that end early: at max_tokens, and where the model's context ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import dspy
import numpy as np
import pytest
from local_tiny import object_format, request, tiny_lm


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
