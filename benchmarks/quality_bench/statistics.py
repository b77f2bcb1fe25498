"""Intervals, paired tests and ranks. Plain functions of numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

RESAMPLES = 2_000


def mean(values: Sequence[float]) -> float:
    """Raises ``ZeroDivisionError`` for no values."""
    return sum(values) / len(values)


def bootstrap_interval(groups: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean over groups of the groups' means: groups are drawn again, then values within them.

    Args:
        groups: For instance per (task, LM) the scores of the seeds; what is drawn again is what could have been others.
    """
    generator = random.Random(seed)
    draws = []
    for _ in range(RESAMPLES):
        drawn = generator.choices(groups, k=len(groups))
        draws.append(mean([mean(generator.choices(group, k=len(group))) for group in drawn]))
    draws.sort()
    return draws[int(0.025 * RESAMPLES)], draws[min(RESAMPLES - 1, int(0.975 * RESAMPLES))]


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of so many wins against losses under a fair coin."""
    total, fewer = wins + losses, min(wins, losses)
    if not total:
        return 1.0
    tail = sum(math.comb(total, count) for count in range(fewer + 1)) / 2**total
    return min(1.0, 2 * tail)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Mean of ``first - second`` per test example in percent points, and its standard error.

    Args:
        first, second: Per example how often a method was right, in [0, 1]: the mean over its seeds. Seeds share the test
            examples, so they are averaged before, and not counted as examples of their own.
    """
    differences = [100.0 * (a - b) for a, b in zip(first, second, strict=True)]
    centre = mean(differences)
    spread = sum((one - centre) ** 2 for one in differences) / max(1, len(differences) - 1)
    return centre, math.sqrt(spread / len(differences))


def verdict(first: Sequence[float], second: Sequence[float]) -> int:
    """1 if ``first`` is more than two paired standard errors above ``second``, -1 if below, else 0."""
    centre, error = paired_difference(first, second)
    return 0 if abs(centre) <= 2 * error else (1 if centre > 0 else -1)


def ranks(scores: Mapping[str, float], tied: Mapping[tuple[str, str], bool]) -> dict[str, int]:
    """Ranks by score, 1 the best; neighbours that no test tells apart share the better rank.

    Args:
        scores: Higher is better.
        tied: Whether two keys are statistically equal, in either order.

    Ties chain only through the head of a group: a key shares the rank of the group's best, or starts a new group. So a
    long chain of small differences does not make everybody first.
    """
    order = sorted(scores, key=lambda name: (-scores[name], name))
    found: dict[str, int] = {}
    head = ""
    for place, name in enumerate(order, start=1):
        equal = head and (
            scores[name] == scores[head] or tied.get((head, name), tied.get((name, head), False))
        )
        if not equal:
            head = name
            found[name] = place
        else:
            found[name] = found[head]
    return found


def calls_to_reach(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The first ``calls`` of a curve of ``(calls, score)`` with a score of at least ``target``, ``None`` if there are none."""
    return next((calls for calls, score in sorted(curve) if score >= target), None)


def calls_to_hold(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """The first ``calls`` from which on ``target`` is held, ``None`` if it is not.

    A score that is reached by luck and lost again does not count: the last point below the target decides.
    """
    held: float | None = None
    for calls, score in sorted(curve):
        if score < target:
            held = None
        elif held is None:
            held = calls
    return held
