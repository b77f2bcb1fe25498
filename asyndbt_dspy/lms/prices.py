"""What a token costs: given by the user, or from the price table that DSPy ships (LiteLLM's)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import dspy
from dspy.clients.backend_selection import select_backend
from dspy.clients.costs import estimate_cost
from dspy.clients.model_metadata import model_info, rate
from dspy.lm15 import Request, Response

from asyndbt_dspy.core.budget import Charge
from asyndbt_dspy.errors import ConfigurationError

_MILLION = Decimal(10**6)
_SEPARATE_CACHE_COUNT = ("anthropic",)
"""Providers whose prompt tokens leave out what was read from or written to their cache."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens.

    Attributes:
        prompt, completion: >= 0.

    Raises:
        ConfigurationError: a price below 0, or none at all.
    """

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf:
                raise ConfigurationError(
                    f"Price({name}={value!r}) must be >= 0, in US dollars per million tokens"
                )

    def dollars(self, prompt_tokens: int, completion_tokens: int) -> Decimal:
        """Exact."""
        prompt, completion = Decimal(str(self.prompt)), Decimal(str(self.completion))
        return (prompt * prompt_tokens + completion * completion_tokens) / _MILLION


class Tariff:
    """What calls of one LM cost.

    Args:
        lm: Its model and provider name the row of the table.
        price: Goes before the table.

    Attributes:
        worst: The highest price that a call can have; ``None``: unknown.
    """

    def __init__(self, lm: dspy.BaseLM, price: Price | None = None) -> None:
        self._given = price
        self._provider, self._model = _place_of(lm)
        self.worst = price if price is not None else _worst_of_table(self._provider, self._model)

    def worst_case(self, prompt_tokens: int, completion_tokens: int) -> Charge:
        """The most that a call with so many tokens can cost; 0 dollars where the price is unknown."""
        dollars = Decimal(0) if self.worst is None else self.worst.dollars(prompt_tokens, completion_tokens)
        return Charge(prompt_tokens, completion_tokens, dollars)

    def charge_of(self, request: Request, response: Response) -> Charge | None:
        """What an answer has cost; ``None`` where the provider did not report its tokens."""
        usage = response.usage
        if usage.input_tokens is None or usage.output_tokens is None:
            return None
        prompt = usage.input_tokens
        if any(name in self._provider for name in _SEPARATE_CACHE_COUNT):
            prompt += (usage.cache_read_tokens or 0) + (usage.cache_write_tokens or 0)
        if not prompt:
            return None  # LiteLLM's way to say that nothing was reported: every prompt has a token
        # Some totals have thinking tokens beside the completion's; they are billed.
        completion = max(usage.output_tokens, (usage.total_tokens or 0) - prompt)
        return Charge(prompt, completion, self._dollars(request, response, prompt, completion))

    def _dollars(self, request: Request, response: Response, prompt: int, completion: int) -> Decimal:
        if self._given is not None:
            return self._given.dollars(prompt, completion)
        if self.worst is None:
            return Decimal(0)
        cost, _ = estimate_cost(
            response, provider=self._provider, requested_model=self._model, request=request
        )
        # A dimension without a rate of its own: the highest rates are above it.
        return self.worst.dollars(prompt, completion) if cost is None else Decimal(repr(float(cost)))


def _place_of(lm: dspy.BaseLM) -> tuple[str, str]:
    """(provider, model) as the price table names them; an engine of one's own has no provider."""
    engine = getattr(lm, "engine", None)
    prefix, _, rest = lm.model.partition("/")
    plain = (prefix, rest) if rest else ("openai", prefix)
    if engine is None or not isinstance(engine, str):
        return "", lm.model
    if engine == "litellm":
        return str(lm.kwargs.get("custom_llm_provider") or plain[0]), plain[1]
    resolution: Any = select_backend(lm).resolution
    return (resolution.provider, resolution.model) if resolution is not None else plain


def _worst_of_table(provider: str, model: str) -> Price | None:
    """The highest prompt and completion rate of a model's row, over its tiers and token classes."""
    info = model_info(provider, model) if provider else {}
    prompt = [one for key in info if _is_rate(key, ("input_cost", "cache_")) and (one := rate(info, key))]
    completion = [one for key in info if _is_rate(key, ("output_cost",)) and (one := rate(info, key))]
    if rate(info, "input_cost_per_token") is None or rate(info, "output_cost_per_token") is None:
        return None
    return Price(max(prompt, default=0.0) * 1e6, max(completion, default=0.0) * 1e6)


def _is_rate(key: str, beginnings: tuple[str, ...]) -> bool:
    return key.startswith(beginnings) and "token" in key and "batches" not in key
