"""What a user says of a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from asyndbt_dspy.errors import ConfigurationError

DEFAULT_CONCURRENCY = 8


@dataclass(frozen=True)
class Worker:
    """One worker: a data shard and the LM that evaluates candidates on it.

    Attributes:
        name: Unique among the workers of a run; appears in results and logs.
        trainset: The shard. It never leaves the worker; only demos of a sharing worker do.
        valset: Held-out examples for the final race; without it a quarter of the shard is kept back.
        lm: The LM of this worker; ``None``: the LM of the surrounding ``dspy.context`` or ``dspy.configure``. Predictors
            with an LM of their own keep it.
        max_concurrency: Rollouts in flight at a time, at least 1.
        share_demos: False for a private shard: none of its text reaches other workers, the server, the log or the result.

    Raises:
        ConfigurationError: an empty name or shard, or ``max_concurrency`` below 1.
    """

    name: str
    trainset: Sequence[dspy.Example] = field(
        repr=False
    )  # logs print settings, and private examples stay out of logs
    valset: Sequence[dspy.Example] | None = field(default=None, repr=False)
    lm: Any = field(default=None, repr=False)
    max_concurrency: int = DEFAULT_CONCURRENCY
    share_demos: bool = True

    def __post_init__(self) -> None:
        if not self.name or self.name == "server":
            raise ConfigurationError(
                f"worker name {self.name!r} is empty or taken by the server; choose another"
            )
        if not len(self.trainset):
            raise ConfigurationError(f"worker {self.name!r} has 0 training examples; give it at least 4")
        if self.max_concurrency < 1:
            raise ConfigurationError(
                f"worker {self.name!r}: max_concurrency={self.max_concurrency} must be at least 1"
            )
