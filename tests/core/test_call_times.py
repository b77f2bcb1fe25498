"""When a call counts as far too slow."""

from __future__ import annotations

import math

import pytest

from asyndbt_dspy.core.call_times import limit_s, may_leave


@pytest.mark.parametrize(
    ("factor", "newest_s", "limit"),
    [
        (8.0, [1.0, 2.0, 3.0, 4.0, 50.0], 24.0),
        (8.0, [], math.inf),
        (8.0, [0.1, 1.0, 0.1, 0.1], 10.0),
        (8.0, [5.0], 40.0),
        (None, [1.0] * 64, math.inf),
        (8.0, [0.01] * 5, 1.0),
    ],
)
def test_a_call_may_take_a_multiple_of_the_median(
    factor: float | None, newest_s: list[float], limit: float
) -> None:
    assert limit_s(factor, newest_s) == limit


def test_a_third_of_a_unit_rounded_up_may_be_left_behind() -> None:
    assert [may_leave(calls) for calls in (1, 3, 4, 12)] == [1, 1, 2, 4]
    assert may_leave(5, share=2) == 3
