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
