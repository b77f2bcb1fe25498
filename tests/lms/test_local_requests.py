"""Which requests the local engine takes: what it cannot do is refused, never passed over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.lm15 import Reasoning, UnsupportedFeatureError
from local_tiny import object_format, request, tiny_lm


@pytest.fixture(scope="module")
def lm() -> Iterator[dspy.LM]:
    made = tiny_lm(num_retries=0, max_tokens=4)
    yield made
    made.engine.close()


@pytest.mark.parametrize(
    ("settings", "feature"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"store": True}, "store"),
        ({"reasoning": Reasoning(effort="low")}, "reasoning"),
        ({"extensions": {"min_p": 0.3}}, "min_p"),
        ({"extensions": {"logit_bias": {"5": -100}}}, "logit_bias"),
        ({"probabilities": "required"}, "probabilities"),
        (
            {"probabilities": "required", "response_format": object_format(n={"type": "integer"})},
            "probabilities",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(lm: dspy.LM, settings: dict[str, Any], feature: str) -> None:
    with pytest.raises(UnsupportedFeatureError, match=feature):
        lm.engine.complete(request("?", **settings))


@pytest.mark.parametrize("settings", [{"logit_bias": {"5": -100}}, {"reasoning_effort": "low"}])
def test_keywords_of_dspy_are_refused_too(lm: dspy.LM, settings: dict[str, Any]) -> None:
    with pytest.raises(dspy.LMUnsupportedFeatureError):
        lm("hello", **settings)


def test_what_is_so_anyway_may_be_asked_for(lm: dspy.LM) -> None:
    form = object_format(label={"enum": ["a", "b"]})
    asked = request(
        "?",
        store=False,
        reasoning=Reasoning(effort="off"),
        frequency_penalty=0.0,
        user_id="somebody",
        extensions={},
        probabilities="required",
        response_format=form,
    )
    assert set(lm.engine.complete(asked).probabilities["label"]) == {"a", "b"}
    assert lm.engine.complete(request("?", probabilities="if_available", max_tokens=2)).text is not None


def test_equal_requests_are_answered_equally_where_the_seed_is_fixed_and_differ_where_it_is_free(
    lm: dspy.LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distinct(**settings: Any) -> int:
        return len(set(lm("hello", n=6, temperature=2.0, max_tokens=8, **settings)))

    assert distinct() == 1
    assert len({lm("hello", temperature=2.0, max_tokens=8, seed=seed)[0] for seed in range(6)}) > 1
    monkeypatch.setattr(lm.engine.core, "_deterministic", False)
    assert distinct(seed=3) == 1
    assert distinct() > 1
