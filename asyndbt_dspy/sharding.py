"""From the user's data to shards: who holds which examples, and what each is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import dspy
import numpy as np

from asyndbt_dspy import splitting
from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs import checks
from asyndbt_dspy.programs.labels import example_labels
from asyndbt_dspy.recording.identities import data_identity
from asyndbt_dspy.workers import Worker


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
    workers: int | Sequence[Worker],
    trainset: Sequence[dspy.Example] | None,
    student: dspy.Module,
    *,
    shard_key: Any,
    seed: int,
) -> list[Worker]:
    """The user's workers, or ``workers`` shards of ``trainset``.

    Raises:
        ConfigurationError: no data, data twice, or two workers of one name.
    """
    if not isinstance(workers, int):
        if trainset:
            raise ConfigurationError(
                f"trainset with {len(trainset)} examples was given besides {len(workers)} workers that bring their own "
                "shards; pass workers=<number> to have trainset split, or leave trainset out"
            )
        if not workers:
            raise ConfigurationError("workers is an empty list; give at least one Worker, or a number")
        return list(workers)
    if workers < 1:
        raise ConfigurationError(f"workers={workers} must be at least 1")
    trainset = list(trainset or ())
    checks.check_examples(student, trainset)
    strata = None if shard_key is not None else example_labels(student, trainset)
    parts = checks.shards(trainset, workers, key=shard_key, strata=strata, seed=seed)
    return [
        Worker(f"worker-{number}", [trainset[one] for one in part])
        for number, part in enumerate(parts, start=1)
    ]


def split_shards(
    workers: Sequence[Worker],
    valset: Sequence[dspy.Example] | None,
    student: dspy.Module,
    config: AlgorithmConfig,
    *,
    needs_pool: bool,
    seed: int,
    one_trainset: bool = False,
) -> list[Shard]:
    """Split every shard into estimate, pool and held-out examples; a common ``valset`` is dealt out to the workers.

    Args:
        one_trainset: The shards were drawn from one trainset, which no worker keeps from another.

    Raises:
        ConfigurationError: a shard is too small, or nobody is left to take ``valset``.
    """
    groups = _groups(workers, has_common_valset=bool(valset), one_trainset=one_trainset)
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
    trainsets = [list(worker.trainset) for worker in workers]
    splitting.tell_of_copies(trainsets)
    seeds = [seed + index for index in range(len(workers))]
    fractions = [0.25 if config.race and not one else None for one in given]
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
        if len(estimate) < config.minibatch:
            raise ConfigurationError(
                f"worker {worker.name!r} has {len(estimate)} examples left to estimate on (of {len(worker.trainset)} in "
                f"its shard), fewer than the minibatch of {config.minibatch}; give it more examples, use fewer workers, "
                "or lower config={'minibatch': …}"
            )
        scored_on = _mixed(estimate, student, [seed, 17, index])
        raced_on = _mixed(raced[index], student, [seed, 19, index])
        shown = scored_on if pool is estimate else tuple(pool)
        result.append(Shard(worker, scored_on, shown, raced_on, groups[index]))
    return result


def _groups(workers: Sequence[Worker], *, has_common_valset: bool, one_trainset: bool) -> list[str]:
    """Per worker the group of those that hold its race examples too, "" where nobody else does."""
    if one_trainset:
        return ["trainset"] * len(workers)
    found: list[str] = []
    for worker in workers:
        if worker.valset:
            found.append("")  # its own, and it is there to be raced on by this worker
        elif has_common_valset:
            found.append("valset")
        else:
            lengths = [len(one.trainset) for one in workers if not one.valset]
            is_alone = lengths.count(len(worker.trainset)) < 2
            found.append("" if is_alone else data_identity(worker.trainset))
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
