"""The estimate that the user sees before a run starts."""

from __future__ import annotations

import pytest

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.estimates import Estimate, WorkerPlan, estimate_run, rough_tokens
from asyndbt_dspy.lms.limits import RateLimits
from asyndbt_dspy.lms.prices import Price

PRICE = Price(prompt=1.0, completion=10.0)


def plan(name: str, **changes: object) -> WorkerPlan:
    settings = {"rollouts": 100, "calls_per_rollout": 2, "prompt_tokens": 500, "completion_tokens": 50}
    return WorkerPlan(name, **{**settings, **changes})  # type: ignore[arg-type]


def test_workers_add_up_and_work_side_by_side() -> None:
    found = estimate_run(
        [
            plan("eu", price=PRICE, seconds_per_call=2.0, max_concurrency=4),
            plan("us", price=PRICE, seconds_per_call=1.0, max_concurrency=4),
        ]
    )
    assert found == Estimate(200, 400, 220_000, pytest.approx(0.4), (), 100.0)


def test_limits_are_shared_by_the_workers_of_an_endpoint() -> None:
    limits = RateLimits(requests_per_minute=60)
    alone = estimate_run([plan("eu", limits=limits), plan("us", limits=limits)])
    together = estimate_run(
        [plan("eu", endpoint="x", limits=limits), plan("us", endpoint="x", limits=RateLimits(600))]
    )
    assert (alone.seconds, together.seconds) == (200.0, 400.0)
    assert estimate_run([plan("eu", limits=RateLimits(tokens_per_minute=1000))]).seconds == 6600.0


def test_what_is_unknown_is_said() -> None:
    found = estimate_run([plan("eu", price=PRICE), plan("lab")])
    assert (found.dollars, found.unpriced, found.seconds) == (pytest.approx(0.2), ("lab",), None)
    assert str(found) == (
        "200 metric calls, about 400 LM calls and 220,000 tokens, about $0.20 without lab (price unknown), time unknown"
    )
    assert estimate_run([plan("lab")]).dollars is None
    assert "price unknown" in str(estimate_run([plan("lab", seconds_per_call=27)]))
    assert "at least 90 min" in str(estimate_run([plan("lab", seconds_per_call=26.99)]))


def test_caps_that_will_end_the_run_early_are_named() -> None:
    found = estimate_run([plan("eu", price=PRICE)])
    assert found.over(Budget(lm_calls=100, tokens=10**6, dollars=0.1, seconds=1)) == {
        "lm_calls": (200, 100),
        "dollars": (pytest.approx(0.2), 0.1),
    }


def test_a_few_rollouts_make_a_plan_better() -> None:
    better = plan("eu").as_measured(3, lm_calls=9, prompt_tokens=9000, completion_tokens=90)
    assert (better.calls_per_rollout, better.prompt_tokens, better.completion_tokens) == (3, 1000, 10)
    # Nothing was answered, or all of it from a cache.
    assert plan("eu").as_measured(0, 0, 0, 0) == plan("eu").as_measured(3, 0, 0, 0) == plan("eu")


def test_numbers_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match=r"prompt_tokens=-1"):
        plan("eu", prompt_tokens=-1)
    with pytest.raises(ConfigurationError, match=r"max_concurrency=0"):
        plan("eu", max_concurrency=0)


def test_tokens_of_a_prompt_are_guessed_from_bytes() -> None:
    assert rough_tokens([{"content": "x" * 40}, {"role": "user"}]) == 18


def test_an_image_is_no_text_however_large_its_file() -> None:
    def prompt(size: int) -> list[dict[str, object]]:
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}
        return [{"content": [{"type": "text", "text": "x" * 40}, image, image]}]

    assert rough_tokens(prompt(10)) == rough_tokens(prompt(10**6)) == 4 + 10 + 2 * 1024
