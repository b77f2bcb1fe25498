"""Rates in real time, told apart on a busy machine too."""

from __future__ import annotations

from collections.abc import Sequence


def assert_rate(times_s: Sequence[float], per_second: int) -> None:
    """No more came than the rate lets through, with two and a half seconds' worth at once.

    The gate lets one second's worth through at once. The rest is for a busy machine, where the first request is late and
    others bunch up behind it, so that a count within one second says nothing. Twice the rate exceeds this after six
    seconds' worth.
    """
    assert len(times_s) >= 6 * per_second, "too few to tell a rate from twice as much"
    assert len(times_s) <= per_second * (2.5 + max(times_s) - min(times_s))
