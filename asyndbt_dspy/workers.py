"""What a user says of a worker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.limits import LimiterName, RateLimits
from asyndbt_dspy.lms.prices import Price

DEFAULT_CONCURRENCY = 8


@dataclass(frozen=True)
class Worker:
    """One worker: a data shard and the LM that evaluates candidates on it.

    Attributes:
        name: Unique among the workers of a run; appears in results and logs.
        trainset: The shard. It never leaves the worker; only demos of a sharing worker do. ``None``: a part of the ``trainset``
            that ``compile`` is given, which is dealt out evenly to all workers without a shard.
        valset: Held-out examples for the final race; without it a quarter of the shard is kept back, up to half where all workers
            together would keep fewer than 24.
        lm: The LM of this worker; ``None``: the LM of the surrounding ``dspy.context`` or ``dspy.configure``. Predictors
            with an LM of their own keep it. A list: LMs or keys in order; one that is dead is left out and tried again
            later.
        max_concurrency: Rollouts in flight at a time, at least 1; LM calls likewise where they are metered (a cap on calls, tokens
            or dollars, prices, a rate limit, several LMs). Programs and metrics that are not ``async`` share 64 threads between all
            workers.
        requests_per_minute, tokens_per_minute: Of this worker's endpoint, > 0; workers on one endpoint share the tightest.
        hedge_after_s: A call without an answer for so long is sent to the worker's next LM too; the first answer counts,
            the other call is cancelled, both are counted. > 0; ``None``: never.
        limiter: Library that keeps the rates.
        price: Of this worker's LMs; goes before the price table.
        share_demos: False for a private shard, which has to be the worker's own: none of its text reaches other workers, the
            server, the log or the result.

    Raises:
        ConfigurationError: an empty name or shard, an empty list of LMs, or a number out of its range.
    """

    name: str
    # Logs print settings, and private examples stay out of logs.
    trainset: Sequence[dspy.Example] | None = field(default=None, repr=False)
    valset: Sequence[dspy.Example] | None = field(default=None, repr=False)
    lm: Any = field(default=None, repr=False)
    max_concurrency: int = DEFAULT_CONCURRENCY
    share_demos: bool = True
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    hedge_after_s: float | None = None
    limiter: LimiterName = "aiolimiter"
    price: Price | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ConfigurationError(f"worker name {self.name!r} must be a str")
        if not self.name or self.name == "server":
            raise ConfigurationError(
                f"worker name {self.name!r} is empty or taken by the server; choose another"
            )
        if self.trainset is not None and not len(self.trainset):
            raise ConfigurationError(
                f"worker {self.name!r} has 0 training examples; give it at least 4, or None for a part of compile's trainset"
            )
        if self.trainset is None and not self.share_demos:
            raise ConfigurationError(
                f"worker {self.name!r} is private (share_demos=False) and has no trainset; what it shares with others cannot be "
                "private, so give it its own"
            )
        if self.max_concurrency < 1:
            raise ConfigurationError(
                f"worker {self.name!r}: max_concurrency={self.max_concurrency} must be at least 1"
            )
        if isinstance(self.lm, list | tuple) and not self.lm:
            raise ConfigurationError(
                f"worker {self.name!r}: lm is an empty list; give at least one LM, or None"
            )
        if self.hedge_after_s is not None and not 0 < self.hedge_after_s < math.inf:
            raise ConfigurationError(
                f"worker {self.name!r}: hedge_after_s={self.hedge_after_s!r} must be > 0 seconds, or None"
            )
        try:
            RateLimits(self.requests_per_minute, self.tokens_per_minute, self.limiter)
        except ConfigurationError as error:
            raise ConfigurationError(f"worker {self.name!r}: {error}") from error

    @property
    def shard(self) -> Sequence[dspy.Example]:
        """Its examples; empty where it has none of its own."""
        return () if self.trainset is None else self.trainset

    @property
    def lms(self) -> list[Any]:
        """Its own LMs in order; empty where it uses the surrounding one."""
        if self.lm is None:
            return []
        return list(self.lm) if isinstance(self.lm, list | tuple) else [self.lm]

    @property
    def first_lm(self) -> Any:
        """The LM it asks first; ``None``: the surrounding one."""
        return next(iter(self.lms), None)
