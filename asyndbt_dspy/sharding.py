"""From the user's data to shards: who holds which examples, and what each is for."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import dspy
import numpy as np

from asyndbt_dspy import splitting
from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs import checks
from asyndbt_dspy.programs.labels import example_labels
from asyndbt_dspy.programs.shards import race_count
from asyndbt_dspy.recording.identities import data_identity
from asyndbt_dspy.workers import DEFAULT_CONCURRENCY, Worker

logger = logging.getLogger(__name__)

_FEW = (
    "worker %r has %d examples left to estimate on, so its minibatches have %d, not %d. With so few examples hardly any program "
    "can be told from the student; give it more if there are"
)
_FEW_OF_MANY = (
    "%d of %d workers have %s examples left to estimate on, so their minibatches have no more, not %d: %s. With so few examples "
    "hardly any program can be told from the student; use fewer workers, or give more examples if there are"
)
_NAMED = 5
"""Workers that a message names; of more it says how many."""
_DEFAULT_WORKERS = 3
_RACE_PART = (0.25, 0.5)
"""Least and largest part of the examples that is kept back for the race."""


@dataclass(frozen=True)
class Shard:
    """One worker's examples, split so that nothing is used twice.

    Attributes:
        worker: As the user described it.
        estimate: Examples that candidates are scored on during the search.
        pool: Examples that may become demos.
        held_out: Examples of the final race.
        group: Workers of one group hold each other's race examples and take over from one that is gone; "": nobody does.
    """

    worker: Worker
    estimate: tuple[dspy.Example, ...]
    pool: tuple[dspy.Example, ...]
    held_out: tuple[dspy.Example, ...]
    group: str = ""


def make_workers(
    workers: int | Sequence[Worker] | None,
    trainset: Sequence[dspy.Example] | None,
    student: dspy.Module,
    config: AlgorithmConfig,
    *,
    shard_key: Any,
    has_valset: bool,
    seed: int,
    num_threads: int | None = None,
    limits: Mapping[str, Any] | None = None,
) -> list[Worker]:
    """The user's workers, those without a shard each with a part of ``trainset``; or ``workers`` new ones that share it.

    Args:
        workers: ``None``: three, or as many fewer as leave a minibatch to each.
        has_valset: Nothing of ``trainset`` is kept back for the race.
        num_threads: Rollouts in flight of all new workers together; ``None``: a worker's default for each.
        limits: Of the endpoint, of new workers.

    Raises:
        ConfigurationError: no data, data twice, or two workers of one name.
    """
    if isinstance(workers, Sequence):
        return _with_shards(workers, trainset, student, shard_key, seed)
    if workers is not None and workers < 1:
        raise ConfigurationError(f"workers={workers} must be at least 1")
    trainset = list(trainset or ())
    checks.check_examples(student, trainset)
    strata = None if shard_key is not None else example_labels(student, trainset)
    least = _least(config, 0.0 if has_valset or not config.race else _race_part(config, len(trainset)))
    counts = (workers,) if workers else _possible(trainset, least, shard_key, num_threads)
    for count in counts:
        parts = checks.shards(trainset, count, key=shard_key, strata=strata, seed=seed)
        if min(map(len, parts)) >= least:
            break
    in_flight = [DEFAULT_CONCURRENCY] * count if num_threads is None else _evenly(num_threads, count)
    return [
        Worker(f"worker-{number}", [trainset[one] for one in part], max_concurrency=most, **(limits or {}))
        for number, (part, most) in enumerate(zip(parts, in_flight, strict=True), start=1)
    ]


def _with_shards(
    workers: Sequence[Worker],
    trainset: Sequence[dspy.Example] | None,
    student: dspy.Module,
    shard_key: Any,
    seed: int,
) -> list[Worker]:
    """Deal ``trainset`` out to those of the user's workers that bring no shard."""
    if not workers:
        raise ConfigurationError("workers is an empty list; give at least one Worker, or a number")
    without = [worker.name for worker in workers if worker.trainset is None]
    examples = list(trainset or ())  # a generator is never empty by its truth
    if examples and not without:
        raise ConfigurationError(
            f"trainset with {len(examples)} examples was given besides {len(workers)} workers that bring their own "
            "shards; pass workers=<number> or workers without a trainset to have it split, or leave it out"
        )
    if not without:
        return list(workers)
    if not examples:
        raise ConfigurationError(
            f"the workers {without} have no shard of their own, and compile was given no trainset to deal out to them"
        )
    checks.check_examples(student, examples)
    strata = None if shard_key is not None else example_labels(student, examples)
    parts = iter(checks.shards(examples, len(without), key=shard_key, strata=strata, seed=seed))
    return [
        worker
        if worker.trainset is not None
        else replace(worker, trainset=[examples[one] for one in next(parts)])
        for worker in workers
    ]


def _evenly(total: int, count: int) -> list[int]:
    """``total`` in ``count`` parts that differ by one at most."""
    return [total // count + (number < total % count) for number in range(count)]


def _race_part(config: AlgorithmConfig, count: int, given: int = 0) -> float:
    """The part of ``count`` examples, of all workers, that is kept back for the race beside ``given`` that are for it alone."""
    least, most = _RACE_PART
    return min(most, max(least, (config.race_examples - given) / max(1, count)))


def _least(config: AlgorithmConfig, part: float) -> int:
    """The smallest shard that leaves a minibatch when ``part`` of it is kept back for the race."""
    count = config.minibatch
    while part and count - race_count(count, part) < config.minibatch:
        count += 1
    return count


def _possible(
    trainset: Sequence[dspy.Example], least: int, shard_key: Any, num_threads: int | None
) -> list[int]:
    """Numbers of workers, best first, for which there are examples, keys and threads enough; 1 at the end."""
    most = min(len(trainset) // least, num_threads or _DEFAULT_WORKERS)
    if shard_key is not None:
        most = min(most, len({shard_key(example) for example in trainset}))
    return list(range(max(1, min(_DEFAULT_WORKERS, most)), 0, -1))


def split_shards(
    workers: Sequence[Worker],
    valset: Sequence[dspy.Example] | None,
    student: dspy.Module,
    config: AlgorithmConfig,
    *,
    needs_pool: bool,
    seed: int,
    dealt_to: Collection[str] = (),
    is_fixed: bool = True,
) -> list[Shard]:
    """Split every shard into estimate, pool and held-out examples; a common ``valset`` is dealt out to the workers.

    Args:
        dealt_to: Workers whose shards were drawn from one trainset, which none of them keeps from another.
        is_fixed: Whether each shard must have a minibatch to estimate on; else a smaller one takes all that it has.

    Raises:
        ConfigurationError: a shard is too small, or nobody is left to take ``valset``.
    """
    groups = _groups(workers, has_common_valset=bool(valset), dealt_to=dealt_to)
    shares: list[list[dspy.Example]] = [[] for _ in workers]
    if valset:
        order = np.random.default_rng([seed, 11]).permutation(len(valset))
        takers = [number for number, worker in enumerate(workers) if not worker.valset]
        if not takers:
            raise ConfigurationError(
                f"valset with {len(valset)} examples was given besides {len(workers)} workers that all bring their own; "
                "leave one of them out"
            )
        for place, number in enumerate(order):
            shares[takers[place % len(takers)]].append(valset[int(number)])
    given = [
        list(worker.valset) if worker.valset else share for worker, share in zip(workers, shares, strict=True)
    ]
    trainsets = [list(worker.shard) for worker in workers]
    splitting.tell_of_copies(trainsets)
    seeds = [seed + index for index in range(len(workers))]
    fractions = _race_parts(trainsets, given, config) if config.race else [None] * len(workers)
    rests, raced = splitting.split(trainsets, fractions, student, seeds)
    splitting.tell_of_valset_copies(given)
    raced = splitting.dealt([own or kept_back for own, kept_back in zip(given, raced, strict=True)])
    # An example must not be scored by a program that shows it, so demos and estimates part ways.
    fractions = [
        min(0.6, max(0.4, 2 * config.minibatch / len(rest)))
        if needs_pool and len(rest) >= 2 * config.minibatch
        else None
        for rest in rests
    ]
    pools, estimates = splitting.split(rests, fractions, student, [1000 + one for one in seeds])
    result = []
    for index, worker in enumerate(workers):
        pool, estimate = pools[index], estimates[index]
        if fractions[index] is None or len(estimate) < config.minibatch <= len(rests[index]):
            pool = estimate = rests[index]
        if len(estimate) < (config.minibatch if is_fixed else 1):
            raise ConfigurationError(
                f"worker {worker.name!r} has {len(estimate)} examples left to estimate on (of {len(worker.shard)} in "
                f"its shard), fewer than the minibatch of {config.minibatch}; give it more examples, use fewer workers, "
                "or lower config={'minibatch': …}"
            )
        scored_on = _mixed(estimate, student, [seed, 17, index])
        raced_on = _mixed(raced[index], student, [seed, 19, index])
        shown = scored_on if pool is estimate else tuple(pool)
        result.append(Shard(worker, scored_on, shown, raced_on, groups[index]))
    _tell_of_few(result, config.minibatch)
    return result


def _tell_of_few(shards: Sequence[Shard], minibatch: int) -> None:
    """One message, however many workers have less than a minibatch."""
    small = {one.worker.name: len(one.estimate) for one in shards if len(one.estimate) < minibatch}
    if not small:
        return
    least, most = min(small.values()), max(small.values())
    if len(small) == 1:
        logger.warning(_FEW, next(iter(small)), most, most, minibatch)
        return
    names = ", ".join([*map(repr, list(small)[:_NAMED]), *(["…"] if len(small) > _NAMED else [])])
    count = str(most) if least == most else f"{least} to {most}"
    logger.warning(_FEW_OF_MANY, len(small), len(shards), count, minibatch, names)


def _race_parts(
    trainsets: Sequence[Sequence[dspy.Example]],
    given: Sequence[Sequence[dspy.Example]],
    config: AlgorithmConfig,
) -> list[float | None]:
    """Per worker the part of its examples that it keeps back; ``None`` where it was ``given`` others to race on.

    Never more than leaves a minibatch, but for the quarter that is always kept.
    """
    own = [examples for examples, valset in zip(trainsets, given, strict=True) if not valset]
    count = len({checks.inputs_text(one) for examples in own for one in examples})
    part, (least, _) = _race_part(config, count, sum(map(len, given))), _RACE_PART
    return [
        None if valset else max(least, min(part, 1.0 - config.minibatch / len(examples)))
        for examples, valset in zip(trainsets, given, strict=True)
    ]


def _groups(workers: Sequence[Worker], *, has_common_valset: bool, dealt_to: Collection[str]) -> list[str]:
    """Per worker the group of those that hold its race examples too, "" where nobody else does."""
    found: list[str] = []
    for worker in workers:
        if worker.valset:
            found.append("")  # its own, and it is there to be raced on by this worker
        elif has_common_valset:
            found.append("valset")
        elif worker.name in dealt_to:
            found.append("trainset")
        else:
            lengths = [len(one.shard) for one in workers if not one.valset]
            is_alone = lengths.count(len(worker.shard)) < 2
            found.append("" if is_alone else data_identity(worker.shard))
    return [group if found.count(group) > 1 else "" for group in found]


def race_examples(shards: Sequence[Shard]) -> Mapping[str, Sequence[dspy.Example]]:
    """Per worker its race examples, followed by those of the others of its group (numbered as ``core.handover`` does)."""
    whole: dict[str, list[dspy.Example]] = {}
    for shard in shards:
        whole.setdefault(shard.group, []).extend(shard.held_out if shard.group else ())
    found: dict[str, Sequence[dspy.Example]] = {}
    first = dict.fromkeys(whole, 0)
    for shard in shards:
        name, own = shard.worker.name, shard.held_out
        found[name] = OwnFirst(own, whole[shard.group], first[shard.group]) if shard.group else own
        first[shard.group] += len(own)
    return found


class OwnFirst(Sequence[dspy.Example]):
    """A worker's own examples and then the others of its group: views, as a thousand workers would hold a million copies.

    Args:
        own: Its examples.
        whole: Those of the whole group, its own included.
        first: Place of its first one in ``whole``.
    """

    def __init__(self, own: Sequence[dspy.Example], whole: Sequence[dspy.Example], first: int) -> None:
        self._own = own
        self._whole = whole
        self._first = first

    def __len__(self) -> int:
        return len(self._whole)

    @overload
    def __getitem__(self, number: int) -> dspy.Example: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[dspy.Example]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if number < len(self._own):
            return self._own[number]
        place = number - len(self._own)
        return self._whole[place if place < self._first else number]


def _mixed(
    examples: Sequence[dspy.Example], student: dspy.Module, key: Sequence[int]
) -> tuple[dspy.Example, ...]:
    """The examples in a random order of which every beginning has the classes in proportion.

    Candidates are told apart by the first few examples they meet, and one that favours a class would be judged by which
    classes those happen to be of.
    """
    rng = np.random.default_rng(key)
    strata: dict[str | None, list[int]] = {}
    for number, label in enumerate(example_labels(student, examples)):
        strata.setdefault(label, []).append(number)
    places: list[tuple[float, int]] = []
    for members in strata.values():
        offset = float(rng.random())
        for rank, place in enumerate(rng.permutation(len(members))):
            places.append(((rank + offset) / len(members), members[int(place)]))
    return tuple(examples[number] for _, number in sorted(places))
