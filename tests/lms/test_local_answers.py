"""Schemas -> segments, tries and samplers, without a model."""

from __future__ import annotations

import json
from enum import Enum
from typing import Any, Literal, Optional

import numpy as np
import pydantic
import pytest

from asyndbt_dspy.lms.local.answers import Choice, Forced, Free, Unconstrained, plan_answer
from asyndbt_dspy.lms.local.sampling import Sampler
from asyndbt_dspy.lms.local.token_tree import build_trie, label_log_probabilities


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


def schema_of(**fields: Any) -> dict[str, Any]:
    model = pydantic.create_model("Answer", __config__=pydantic.ConfigDict(extra="forbid"), **fields)
    return {"type": "json_schema", "schema": model.model_json_schema()}


def labels_of(response_format: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    plan = plan_answer(response_format, indented=False)
    return {segment.field: segment.labels for segment in plan.segments if isinstance(segment, Choice)}


def test_enumerations_of_every_kind_become_choices() -> None:
    found = labels_of(
        schema_of(
            literal=(Literal["a", "b"], ...),
            flag=(bool, ...),
            colour=(Colour, ...),
            number=(Literal[1, 2, 3], ...),
            maybe=(Optional[Literal["x", "y"]], ...),  # noqa: UP045 - the schema of this form is what is tested
            level=(pydantic.conint(ge=0, le=3), ...),
        )
    )
    assert found == {
        "literal": ("a", "b"),
        "flag": ("true", "false"),
        "colour": ("red", "blue"),
        "number": ("1", "2", "3"),
        "maybe": ("x", "y", "null"),
        "level": ("0", "1", "2", "3"),
    }


@pytest.mark.parametrize("indented", [False, True])
def test_an_answer_is_the_json_that_dspy_would_write(indented: bool) -> None:
    response_format = schema_of(reason=(str, ...), label=(Literal['say "hi"', "é"], ...), score=(int, ...))
    plan = plan_answer(response_format, indented=indented)
    text = ""
    for segment in plan.segments:
        if isinstance(segment, Forced):
            text += segment.text
        elif isinstance(segment, Choice):
            text += segment.texts[0]
        elif isinstance(segment, Free):
            value = '"why"' if json.loads(segment.schema)["type"] == "string" else "7"
            text += segment.before + value + segment.after
    expected = {"reason": "why", "label": 'say "hi"', "score": 7}
    assert text == json.dumps(expected, indent=2 if indented else None, ensure_ascii=False)


def test_one_allowed_value_is_forced() -> None:
    plan = plan_answer(schema_of(kind=(Literal["only"], ...)), indented=False)
    assert plan.segments == (Forced('{"kind": "only"}'),)


def test_optional_properties_and_other_roots_are_left_to_the_grammar() -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "additionalProperties": False}
    assert isinstance(
        plan_answer({"type": "json_schema", "schema": schema}, indented=False).segments[0], Free
    )
    assert isinstance(plan_answer({"type": "json_object"}, indented=False).segments[0], Free)
    assert plan_answer(None, indented=False).segments == (Unconstrained(),)


def test_values_of_a_forbidden_type_are_no_labels() -> None:
    schema = {"type": "json_schema", "schema": {"type": "string", "enum": ["a", 1, True, "b"]}}
    assert labels_of(schema) == {"": ("a", "b")}


def test_a_number_that_begins_another_is_left_to_the_grammar_where_nothing_ends_it() -> None:
    numbers = {"enum": [1, 10, 2]}
    assert isinstance(
        plan_answer({"type": "json_schema", "schema": numbers}, indented=False).segments[0], Free
    )
    assert labels_of({"type": "json_schema", "schema": {"enum": [1, 20, 3]}}) == {"": ("1", "20", "3")}
    assert labels_of({"type": "json_schema", "schema": {"enum": ["a", "ab"]}}) == {"": ("a", "ab")}
    assert labels_of(schema_of(level=(Literal[1, 10], ...))) == {"level": ("1", "10")}


def brute_force(labels: list[list[int]], scores: dict[tuple[int, ...], dict[int, float]]) -> np.ndarray:
    sums = np.array([sum(scores[tuple(run[:i])][token] for i, token in enumerate(run)) for run in labels])
    weights = np.exp(sums - sums.max())
    return weights / weights.sum()


def test_labels_that_share_a_beginning_get_their_exact_share() -> None:
    labels = [[5, 1], [5, 2, 3], [5, 2, 4], [6]]
    generator = np.random.default_rng(0)
    scores: dict[tuple[int, ...], dict[int, float]] = {}
    for run in labels:
        for depth, token in enumerate(run):
            scores.setdefault(tuple(run[:depth]), {}).setdefault(token, float(-generator.exponential()))
    trie = build_trie(labels)
    assert trie.common == ()
    assert trie.tree is not None
    assert trie.tree.tokens == (5, 2)
    assert trie.tree.visible.tolist() == [[True, False], [True, True]]
    contexts = [(), (5,), (5, 2)]
    edges = np.array(
        [
            scores[contexts[row]][token]
            for row, token in zip(trie.scored_rows, trie.scored_tokens, strict=True)
        ]
    )
    np.testing.assert_allclose(
        np.exp(label_log_probabilities(trie, edges)), brute_force(labels, scores), rtol=1e-12
    )


def test_a_common_beginning_is_forced_not_scored() -> None:
    trie = build_trie([[1, 2, 3], [1, 2, 4]])
    assert trie.common == (1, 2)
    assert trie.tree is None
    assert trie.scored_tokens.tolist() == [3, 4]


def test_sampler_follows_the_distribution_and_its_seed() -> None:
    log_probabilities = np.log([0.6, 0.3, 0.1])
    sampler = Sampler(temperature=1.0, seed=3)
    draws = [sampler.choose(log_probabilities) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.6, 0.3, 0.1], atol=0.03)
    again = Sampler(temperature=1.0, seed=3)
    assert [again.choose(log_probabilities) for _ in range(50)] == draws[:50]


def test_sampler_top_p_top_k_and_masked_outcomes() -> None:
    log_probabilities = np.array([np.log(0.5), np.log(0.3), np.log(0.2), -np.inf])
    assert {Sampler(1.0, 0.6, None, seed).choose(log_probabilities) for seed in range(60)} == {0, 1}
    assert {Sampler(1.0, 1.0, 1, seed).choose(log_probabilities) for seed in range(20)} == {0}
    assert {Sampler(2.0, 1.0, None, seed).choose(log_probabilities) for seed in range(200)} == {0, 1, 2}
    assert Sampler(0.0, 1.0, None, 0).choose(log_probabilities) == 0
