"""What a run will take, told before it starts: calls, tokens, dollars where the price is known, time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asyndbt_dspy.core.budget import Budget
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.limits import RateLimits
from asyndbt_dspy.lms.prices import Price

_BYTES_PER_TOKEN = 4
_MESSAGE_TOKENS = 4
_MEDIA_TOKENS = 1_024
"""Of an image, a sound or a document: what most providers bill for an image of common size. The worst case is in ``bounds``."""


@dataclass(frozen=True)
class WorkerPlan:
    """What one worker is expected to do.

    Attributes:
        worker: Its name.
        rollouts: >= 0.
        calls_per_rollout: LM calls of one run of the program, >= 0.
        prompt_tokens, completion_tokens: Of one call, on average, >= 0.
        price: ``None``: unknown.
        seconds_per_call: ``None``: unknown.
        max_concurrency: Calls in flight at a time, >= 1.
        endpoint: Workers with the same one share ``limits``.
        limits: Of the endpoint.

    Raises:
        ConfigurationError: a number out of range.
    """

    worker: str
    rollouts: float
    calls_per_rollout: float
    prompt_tokens: float
    completion_tokens: float
    price: Price | None = None
    seconds_per_call: float | None = None
    max_concurrency: int = 1
    endpoint: str = ""
    limits: RateLimits = field(default_factory=RateLimits)

    def __post_init__(self) -> None:
        for name in ("rollouts", "calls_per_rollout", "prompt_tokens", "completion_tokens"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigurationError(f"WorkerPlan({name}={value!r}) must be >= 0 and finite")
        if self.max_concurrency < 1:
            raise ConfigurationError(f"WorkerPlan(max_concurrency={self.max_concurrency}) must be at least 1")

    @property
    def lm_calls(self) -> float:
        return self.rollouts * self.calls_per_rollout

    @property
    def tokens(self) -> float:
        return self.lm_calls * (self.prompt_tokens + self.completion_tokens)

    @property
    def dollars(self) -> float | None:
        if self.price is None:
            return None
        return float(
            self.price.dollars(
                round(self.lm_calls * self.prompt_tokens), round(self.lm_calls * self.completion_tokens)
            )
        )

    def as_measured(
        self, rollouts: int, lm_calls: int, prompt_tokens: int, completion_tokens: int
    ) -> WorkerPlan:
        """The same plan with the averages of what this worker has done so far; unchanged where that is nothing, its tokens
        also where none were reported.

        Args:
            rollouts: That were made.
            lm_calls, prompt_tokens, completion_tokens: Of all of them together.
        """
        if not lm_calls or not rollouts:
            return self
        measured = replace(self, calls_per_rollout=lm_calls / rollouts)
        if not prompt_tokens and not completion_tokens:
            return measured
        return replace(
            measured,
            prompt_tokens=prompt_tokens / lm_calls,
            completion_tokens=completion_tokens / lm_calls,
        )


@dataclass(frozen=True)
class Estimate:
    """The sum of all plans.

    Attributes:
        metric_calls, lm_calls, tokens: Of the whole run.
        dollars: Of the workers whose price is known; ``None``: of none it is.
        unpriced: Workers whose price is unknown.
        seconds: At least so long, by the limits and what is known of the LMs' speed; ``None``: nothing is known.
    """

    metric_calls: int
    lm_calls: int
    tokens: int
    dollars: float | None
    unpriced: tuple[str, ...]
    seconds: float | None

    def over(self, budget: Budget) -> dict[str, tuple[float, float]]:
        """Caps that end the run before it has done all that was planned: ``{name: (expected, cap)}``."""
        expected: Mapping[str, float | None] = {
            "metric_calls": self.metric_calls,
            "lm_calls": self.lm_calls,
            "tokens": self.tokens,
            "dollars": self.dollars,
            "seconds": self.seconds,
        }
        found: dict[str, tuple[float, float]] = {}
        for name, amount in expected.items():
            cap = getattr(budget, name)
            if cap is not None and amount is not None and amount > cap:
                found[name] = (amount, cap)
        return found

    def __str__(self) -> str:
        money = "price unknown" if self.dollars is None else f"about ${self.dollars:.2f}"
        if self.dollars is not None and self.unpriced:
            money += f" without {', '.join(self.unpriced)} (price unknown)"
        seconds = "time unknown" if self.seconds is None else f"at least {_duration(self.seconds)}"
        return (
            f"{self.metric_calls:,} metric calls, about {self.lm_calls:,} LM calls and {self.tokens:,} tokens, "
            f"{money}, {seconds}"
        )


def estimate_run(plans: Sequence[WorkerPlan]) -> Estimate:
    """Add up what the workers are expected to do; they work side by side."""
    priced = [plan.dollars for plan in plans if plan.dollars is not None]
    durations = [*_worker_seconds(plans), *_endpoint_seconds(plans)]
    return Estimate(
        metric_calls=round(sum(plan.rollouts for plan in plans)),
        lm_calls=round(sum(plan.lm_calls for plan in plans)),
        tokens=round(sum(plan.tokens for plan in plans)),
        dollars=sum(priced) if priced else None,
        unpriced=tuple(plan.worker for plan in plans if plan.dollars is None),
        seconds=max(durations, default=None),
    )


def rough_tokens(messages: Iterable[Mapping[str, Any]]) -> int:
    """Tokens of a rendered prompt, guessed without the model's tokenizer: four bytes each, and a constant for each image,
    sound or document, of whatever size its file is."""
    return sum(_MESSAGE_TOKENS + _content_tokens(message.get("content", "")) for message in messages)


def _content_tokens(content: Any) -> int:
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [str(part.get("text", "")) for part in parts if part.get("type") == "text"]
    return sum(len(text.encode()) // _BYTES_PER_TOKEN for text in texts) + _MEDIA_TOKENS * (
        len(parts) - len(texts)
    )


def _worker_seconds(plans: Sequence[WorkerPlan]) -> list[float]:
    return [
        plan.lm_calls * plan.seconds_per_call / plan.max_concurrency
        for plan in plans
        if plan.seconds_per_call is not None
    ]


def _endpoint_seconds(plans: Sequence[WorkerPlan]) -> list[float]:
    """How long the limits alone make it; workers without an endpoint's name have one each."""
    shared: dict[str, list[WorkerPlan]] = defaultdict(list)
    for plan in plans:
        shared[plan.endpoint or f"worker {plan.worker}"].append(plan)
    found: list[float] = []
    for members in shared.values():
        limits = members[0].limits
        for plan in members[1:]:
            limits = limits.tighter(plan.limits)
        if limits.requests_per_minute is not None:
            found.append(60 * sum(plan.lm_calls for plan in members) / limits.requests_per_minute)
        if limits.tokens_per_minute is not None:
            found.append(60 * sum(plan.tokens for plan in members) / limits.tokens_per_minute)
    return found


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
