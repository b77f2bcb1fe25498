"""What a run may spend."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from asyndbt_dspy.errors import ConfigurationError

_WHOLE = ("metric_calls",)


@dataclass(frozen=True)
class Budget:
    """Hard caps of one run; ``None`` is no cap.

    Attributes:
        metric_calls: Completed rollouts (program and metric on one example), setup and final race included. >= 1.
        seconds: Wall-clock seconds of the search, > 0; when they are over, the final race runs.

    Raises:
        ConfigurationError: a value that is no positive, finite number.
    """

    metric_calls: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value <= 0:
                raise ConfigurationError(
                    f"Budget({field.name}={value!r}) must be a positive, finite number; leave it out for no cap"
                )
            if field.name in _WHOLE and value != int(value):
                raise ConfigurationError(f"Budget({field.name}={value!r}) must be a whole number")
        if self.metric_calls is None and self.seconds is None:
            raise ConfigurationError("Budget() sets no cap at all; give at least metric_calls=… or seconds=…")
