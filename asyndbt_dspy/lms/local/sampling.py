"""Choosing one of several outcomes from their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sampler:
    """Temperature, top-p and top-k sampling with an own random stream per request.

    The stream depends on the seed and on how many draws the request made, never on what else is in the batch.

    Attributes:
        temperature: >= 0; 0 takes the likeliest outcome.
        top_p: Keep the likeliest outcomes that reach this mass, 0..1.
        top_k: Keep this many outcomes, or None.
        seed: Of the stream.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0
    _stream: np.random.Generator | None = field(default=None, init=False, repr=False)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest outcome is always taken."""
        return self.temperature <= 0 or self.top_k == 1

    def choose(self, log_probabilities: np.ndarray) -> int:
        """Index of the outcome; -inf marks what is not allowed.

        Args:
            log_probabilities: [n], need not be normalised; at least one finite.
        """
        best = int(np.argmax(log_probabilities))
        if self.greedy:
            return best
        with np.errstate(invalid="ignore", over="ignore"):
            weights = np.exp(
                (log_probabilities.astype(np.float64) - log_probabilities[best]) / self.temperature
            )
        weights[~np.isfinite(weights)] = 0.0
        order = np.argsort(-weights, kind="stable")
        kept = weights[order]
        if self.top_k is not None:
            kept = kept[: self.top_k]
        cumulative = np.cumsum(kept)
        if self.top_p < 1.0:
            # The outcome that crosses the mass is kept, so that at least one is.
            count = int(np.searchsorted(cumulative, self.top_p * cumulative[-1])) + 1
            cumulative = cumulative[:count]
        if self._stream is None:
            self._stream = np.random.Generator(np.random.Philox(key=self.seed & (2**64 - 1)))
        draw = self._stream.random() * cumulative[-1]
        index = min(int(np.searchsorted(cumulative, draw, side="right")), len(cumulative) - 1)
        return int(order[index])
