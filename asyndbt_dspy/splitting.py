"""Parts of all workers' examples, such that none is on both sides, whoever else holds it.

Examples with equal inputs are one example here: rows that repeat within a trainset, and what several workers hold. If one copy
were a demo and another one raced on, a program that knows its demos by heart would win.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import dspy

from asyndbt_dspy.programs import checks
from asyndbt_dspy.programs.labels import example_labels

logger = logging.getLogger(__name__)

Examples = list[dspy.Example]


def split(
    trainsets: Sequence[Examples],
    fractions: Sequence[float | None],
    student: dspy.Module,
    seeds: Sequence[int],
) -> tuple[list[Examples], list[Examples]]:
    """Two stratified parts of each worker's examples; copies of an example are on one side, at all workers.

    Args:
        fractions: Of each worker's examples for the second part, in (0, 1); ``None``: all are for the first one, but for what
            others have in their second one.
        seeds: One per worker. Where workers share examples, all are split at once, by the first seed and the smallest fraction.

    Raises:
        ConfigurationError: fewer than two different examples to split.
    """
    keys = [[checks.inputs_text(example) for example in examples] for examples in trainsets]
    wanted = [number for number, fraction in enumerate(fractions) if fraction is not None]
    if not wanted:
        return [list(examples) for examples in trainsets], [[] for _ in trainsets]
    if _share(keys):
        pooled = {
            key: one for number in wanted for key, one in zip(keys[number], trainsets[number], strict=True)
        }
        fraction = min(one for one in fractions if one is not None)
        second = dict.fromkeys(range(len(trainsets)), _second(pooled, fraction, student, seeds[0]))
    else:
        second = {number: set() for number in range(len(trainsets))}
        for number in wanted:
            unique = dict(zip(reversed(keys[number]), reversed(trainsets[number]), strict=True))
            unique = dict(reversed(unique.items()))  # of copies the first one, in the given order
            second[number] = _second(unique, fractions[number] or 0.0, student, seeds[number])
    firsts, seconds = [], []
    for number, (own, examples) in enumerate(zip(keys, trainsets, strict=True)):
        firsts.append([one for key, one in zip(own, examples, strict=True) if key not in second[number]])
        is_split = fractions[number] is not None
        seconds.append(
            [one for key, one in zip(own, examples, strict=True) if is_split and key in second[number]]
        )
    return firsts, seconds


def dealt(parts: Sequence[Examples]) -> list[Examples]:
    """Each different example once, at one of those that hold it: asked of several, one result would count several times."""
    holders: dict[str, dict[int, dspy.Example]] = {}
    for number, examples in enumerate(parts):
        for example in examples:
            holders.setdefault(checks.inputs_text(example), {}).setdefault(number, example)
    found: list[Examples] = [[] for _ in parts]
    for copies in holders.values():
        taker = min(copies, key=lambda number: (len(found[number]), number))
        found[taker].append(copies[taker])
    return found


def tell_of_copies(trainsets: Sequence[Examples]) -> None:
    """Warn where examples repeat."""
    keys = [checks.inputs_text(example) for examples in trainsets for example in examples]
    copies = len(keys) - len(set(keys))
    if copies:
        logger.warning(
            "%d of %d training examples have the inputs of another one. Copies are kept on one side, demos and estimates or the "
            "final race, and each is raced on once: the race has %d different examples to draw on.",
            copies,
            len(keys),
            len(set(keys)),
        )


def tell_of_valset_copies(valsets: Sequence[Examples]) -> None:
    """Warn where the examples that a user keeps for the race repeat, within one valset or at several workers."""
    keys = [checks.inputs_text(example) for examples in valsets for example in examples]
    if len(set(keys)) < len(keys):
        logger.warning(
            "%d of %d examples of valsets have the inputs of another one; each is raced on once, by one worker, so the race has "
            "%d different ones to draw on.",
            len(keys) - len(set(keys)),
            len(keys),
            len(set(keys)),
        )


def _share(keys: Sequence[Sequence[str]]) -> bool:
    """Whether two workers hold one example."""
    return max(Counter(key for own in keys for key in set(own)).values(), default=0) > 1


def _second(unique: dict[str, dspy.Example], fraction: float, student: dspy.Module, seed: int) -> set[str]:
    names, examples = list(unique), list(unique.values())
    strata = example_labels(student, examples)
    _, second = checks.held_out(range(len(names)), fraction=fraction, seed=seed, strata=strata)
    return {names[number] for number in second}
