"""What a request can cost at most, before it is sent and without its tokenizer."""

from __future__ import annotations

from decimal import Decimal

import dspy
import pytest
from dspy.lm15 import Config, Message, Request, Response, TextPart, Usage
from hypothesis import given
from hypothesis import strategies as st

from asyndbt_dspy.lms.bounds import (
    MEDIA_TOKENS,
    likely_tokens,
    worst_completion_tokens,
    worst_prompt_tokens,
)
from asyndbt_dspy.lms.prices import Price, Tariff


def request_of(*texts: str, system: str | None = None, **config: object) -> Request:
    messages = tuple(Message.user(text) for text in texts)
    return Request(model="m", system=system, messages=messages, config=Config(**config))  # type: ignore[arg-type]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
def test_the_bound_holds_for_a_tokenizer_that_makes_a_token_of_every_byte(texts: list[str]) -> None:
    a_tokenizers_count = sum(len(text.encode()) for text in texts) + 8 * len(texts)
    assert worst_prompt_tokens(request_of(*texts)) >= a_tokenizers_count


def test_schemas_tools_and_media_count_too() -> None:
    plain = worst_prompt_tokens(request_of("hello"))
    schema = {"type": "json_schema", "schema": {"type": "object", "description": "x" * 500}}
    assert worst_prompt_tokens(request_of("hello", response_format=schema)) >= plain + 500
    assert worst_prompt_tokens(request_of("hello", system="s" * 300)) >= plain + 300

    def images(count: int) -> int:
        seen: list[int] = []

        class Engine:
            def complete(self, request: Request) -> Response:
                seen.append(worst_prompt_tokens(request))
                return answer()

        url = {"url": "data:image/png;base64,iVBORw0KGgo="}
        parts = [{"type": "text", "text": "what?"}, *[{"type": "image_url", "image_url": url}] * count]
        dspy.LM("mine/m", engine=Engine(), cache=False)(messages=[{"role": "user", "content": parts}])
        return seen[0]

    assert images(2) - images(0) == 2 * MEDIA_TOKENS


def test_the_completion_is_bounded_by_max_tokens() -> None:
    assert worst_completion_tokens(request_of("hello", max_tokens=7)) == 7
    assert worst_completion_tokens(request_of("hello")) > 10_000


def test_the_guess_for_rate_limits_is_of_the_right_size() -> None:
    assert 1000 <= likely_tokens(request_of("word " * 800, max_tokens=50)) <= 1100


def answer(**usage: int) -> Response:
    message = Message.assistant([TextPart("ok")])
    return Response(id="1", model="m", message=message, finish_reason="stop", usage=Usage(**usage))


@pytest.mark.parametrize(
    ("model", "usage", "tokens"),
    [
        ("openai/m", {"input_tokens": 10, "output_tokens": 5, "cache_read_tokens": 4}, (10, 5)),
        ("openai/m", {"input_tokens": 10, "output_tokens": 5, "total_tokens": 40}, (10, 30)),
        ("anthropic/m", {"input_tokens": 10, "output_tokens": 5, "cache_read_tokens": 90}, (100, 5)),
    ],
)
def test_tokens_are_read_as_each_provider_means_them(
    model: str, usage: dict[str, int], tokens: tuple[int, int]
) -> None:
    charge = Tariff(dspy.LM(model), Price(1, 10)).charge_of(request_of("?"), answer(**usage))
    assert charge is not None
    assert (charge.prompt_tokens, charge.completion_tokens) == tokens
    assert charge.dollars == Decimal(tokens[0] + 10 * tokens[1]) / 10**6


def test_an_answer_without_a_bill_has_no_charge() -> None:
    assert (
        Tariff(dspy.LM("openai/m"), Price(1, 1)).charge_of(request_of("?"), answer(output_tokens=3)) is None
    )


def test_the_worst_price_of_the_table_is_above_every_tier() -> None:
    worst = Tariff(dspy.LM("openai/gpt-4o-mini")).worst
    assert worst is not None
    assert worst.prompt >= 0.15
    assert worst.completion >= 0.6
    assert Tariff(dspy.LM("openai/no-such-model")).worst is None
