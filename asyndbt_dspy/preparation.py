"""From what the user gave to what the core needs: shards, demos, instruction arms, the space of programs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import dspy
import numpy as np
from dspy.clients.model_metadata import model_info

from asyndbt_dspy.core.config import AlgorithmConfig
from asyndbt_dspy.core.server import Member
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.failures import FailureKind
from asyndbt_dspy.programs import demos, proposals, slots
from asyndbt_dspy.programs.endings import demo_endings
from asyndbt_dspy.programs.evaluator import WorkerPart
from asyndbt_dspy.programs.labels import example_labels
from asyndbt_dspy.programs.program_space import Source
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.programs.slots import DemoItem, ProgramSpace
from asyndbt_dspy.setup_rollouts import Asked, SetupRollouts
from asyndbt_dspy.sharding import Shard, race_examples

logger = logging.getLogger(__name__)

Mode = Literal["both", "instructions", "demos"]

_PREFERRED: tuple[Source, ...] = ("bootstrapped", "corrected", "labelled")


@dataclass(frozen=True)
class SearchSpaceOptions:
    """What kinds of arms there are.

    Attributes:
        mode: ``both``, ``instructions`` (prompt-only) or ``demos`` (demo-only).
        instructions: Texts of the user per predictor.
        proposer: LM that writes instructions; ``None``: the shipped guidance sentences.
        tips: Hints for the proposer.
        instruction_candidates: Instruction arms per predictor besides the student's own.
        later_instructions: Instruction arms per predictor that the proposer writes during the search (see
            ``later_instructions``).
        demos_per_class: Demo slots per class of an enumerated output; ``None``: about ``demo_slots`` in all.
        demo_slots: Demo slots of a predictor without classes.
        demo_candidates: Demos per worker and class (or per worker and free slot).
        demo_order: Search the order of the demo slots as well.
        demo_ending: Try demos that end like the turn that is to be answered (see ``programs.endings``).
        max_demo_tokens: Longer demos are left out.
        bootstrap: Record traces of the teacher or student as demos: ``None`` where labelled examples do not fill every
            output of a predictor, or a teacher is given.
        fragments: Word slots of the ``paper`` preset (75 in the paper); 0 for none.
        fragment_words: Vocabulary of a word slot (100 in the paper).
    """

    mode: Mode = "both"
    instructions: Mapping[str, Sequence[str]] | None = None
    proposer: Any = None
    tips: Sequence[str] = ()
    instruction_candidates: int = 5
    later_instructions: int = 0
    demos_per_class: int | None = None
    demo_slots: int = 4
    demo_candidates: int = 12
    demo_order: bool = True
    demo_ending: bool = True
    max_demo_tokens: int = demos.DEFAULT_MAX_DEMO_TOKENS
    bootstrap: bool | None = None
    fragments: int = 0
    fragment_words: int = 100


class TextBook(Protocol):
    """Remembers what a proposer wrote."""

    def texts(self, predictor: str) -> list[str] | None: ...

    def keep_texts(self, predictor: str, texts: Sequence[str]) -> None: ...


def context_tokens(lm: Any) -> int | None:
    """The context of ``lm`` in tokens: as it or its engine says, else from DSPy's table of models; ``None`` if unknown."""
    for holder in (lm, getattr(lm, "engine", None)):
        found = getattr(holder, "context_tokens", None)
        if isinstance(found, int):
            return found
    provider, _, model = str(getattr(lm, "model", "")).partition("/")
    listed = model_info(provider, model).get("max_input_tokens") if model else None
    return listed if isinstance(listed, int) else None


def labelled_items(
    student: dspy.Module, shards: Sequence[Shard], options: SearchSpaceOptions
) -> list[DemoItem]:
    """Labelled demos of every shard's pool."""
    found: list[DemoItem] = []
    for shard in shards:
        found += demos.labelled_demos(
            student,
            shard.pool,
            worker=shard.worker.name,
            shared=shard.worker.share_demos,
            max_demo_tokens=options.max_demo_tokens,
        )
    return found


def wants_bootstrap(
    student: dspy.Module,
    teacher: dspy.Module | None,
    options: SearchSpaceOptions,
    labelled: Sequence[DemoItem],
) -> bool:
    """Whether traces are worth their calls: a teacher is given, or labelled examples leave outputs open."""
    if options.mode == "instructions":
        return False
    if options.bootstrap is not None:
        return options.bootstrap
    if teacher is not None:
        return True
    complete = {name: False for name, _ in student.named_predictors()}
    for item in labelled:
        fields = dict(student.named_predictors())[item.predictor].signature.output_fields
        complete[item.predictor] |= all(name in item.demo for name in fields)
    return not all(complete.values())


async def bootstrap_items(
    setup: SetupRollouts,
    program: dspy.Module,
    student: dspy.Module,
    shards: Sequence[Shard],
    options: SearchSpaceOptions,
    calls: int,
    threshold: float,
    may_begin: Callable[[], bool] = lambda: True,
) -> tuple[list[DemoItem], list[tuple[str, dspy.Example, Rollout]]]:
    """Run ``program`` on pool examples, ``calls`` in all, evenly over the classes; their traces become demos.

    Args:
        program: The student as it is built here, or a teacher.
        student: Whose predictors show the demos, and whose output says the class of an example.
        may_begin: Asked before each run.

    Returns:
        The demos, and all runs as (worker, example, rollout): the proposer reads failures from those that may be shared.
    """
    each, more = divmod(calls, len(shards))
    places: list[tuple[Shard, int]] = []
    for place, shard in enumerate(shards):
        count, before = each + (place < more), place * each + min(place, more)
        places += [(shard, number) for number in _by_class(student, shard.pool, before)[:count]]
    asked = [Asked(shard.worker.name, program, shard.pool[number], trace=True) for shard, number in places]
    items: list[DemoItem] = []
    too_long: list[int] = []
    rollouts: list[tuple[str, dspy.Example, Rollout]] = []
    for (shard, number), rollout in zip(places, await setup.run("traces", asked, may_begin), strict=True):
        if rollout is None:
            continue
        rollouts.append((shard.worker.name, shard.pool[number], rollout))
        items += demos.bootstrapped_demos(
            rollout,
            shard.pool[number],
            program=program,
            student=student,
            worker=shard.worker.name,
            example_index=number,
            shared=shard.worker.share_demos,
            threshold=threshold,
            max_demo_tokens=options.max_demo_tokens,
            on_too_long=too_long.append,
        )
    if too_long:
        logger.warning(
            "%d traces are longer than max_demo_tokens=%d (the longest: about %d tokens) and were left out",
            len(too_long),
            options.max_demo_tokens,
            max(too_long),
        )
    return items, rollouts


def _by_class(student: dspy.Module, pool: Sequence[dspy.Example], first: int) -> list[int]:
    """Places in ``pool``, class by class in turn: a class that no trace is of has no demo.

    Args:
        first: Whose turn it is first, by number: workers with few traces each begin with different classes.
    """
    by_label: dict[str, list[int]] = {}
    for number, label in enumerate(example_labels(student, pool)):
        by_label.setdefault(label or "", []).append(number)
    labels = sorted(by_label)
    start = first % max(1, len(labels))
    turns = itertools.zip_longest(*(by_label[label] for label in labels[start:] + labels[:start]))
    return [number for turn in turns for number in turn if number is not None]


_NO_LM = "No LM is loaded"
"""How DSPy's ``ValueError`` begins where a predictor has no LM."""


def check_lm(
    student: dspy.Module, shards: Sequence[Shard], probes: Sequence[Rollout | None], max_errors: int | None
) -> None:
    """Say that there is no LM, where that is why every first rollout failed, and tell of it where another error is."""
    nowhere = dspy.settings.lm is None and all(shard.worker.first_lm is None for shard in shards)
    unset = [name for name, predictor in student.named_predictors() if predictor.lm is None]
    failed = all(one is not None and one.failure is FailureKind.PROGRAM for one in probes)
    if not failed:
        return
    if nowhere and unset and all(_NO_LM in (one.error or "") for one in probes if one is not None):
        raise ConfigurationError(
            f"no LM for the predictors {unset}: none is set by dspy.configure or dspy.context, on a worker or on the "
            "program; give one, for instance Worker(…, lm=dspy.LM(…))"
        )
    kinds = sorted({(one.error or "").partition(":")[0] for one in probes if one is not None})
    logger.warning(
        "The student failed on the first example of every worker (%s). Where answers cannot be read, demos may mend it; where "
        "program or metric raise whatever the answer is, nothing can be found, and %s.",
        ", ".join(kinds),
        "the budget is spent all the same"
        if max_errors is None
        else f"the compile ends at {max_errors} errors",
    )


def rollout_watch(shards: Sequence[Shard]) -> Callable[[str, Rollout], None]:
    """Tells once each of what a user would change who saw the rollouts."""
    watches = (scale_watch(), limit_watch(shards))

    def note(worker: str, rollout: Rollout) -> None:
        for watch in watches:
            watch(worker, rollout)

    return note


def limit_watch(shards: Sequence[Shard]) -> Callable[[str, Rollout], None]:
    """Tells once that an endpoint refuses calls for their number, where nothing holds them back."""
    unlimited = {one.worker.name for one in shards if one.worker.requests_per_minute is None}

    def note(worker: str, rollout: Rollout) -> None:
        kind = (rollout.error or "").partition(":")[0]
        if rollout.score is not None or "RateLimit" not in kind or worker not in unlimited:
            return
        unlimited.clear()
        logger.warning(
            "The endpoint of worker %r refused calls because of a rate limit, also when they were tried again; such rollouts are "
            "missing. With requests_per_minute=… (or tokens_per_minute=…) calls wait for their turn; num_threads=… or "
            "Worker(max_concurrency=…) makes fewer at a time. This is said once.",
            worker,
        )

    return note


def scale_watch() -> Callable[[str, Rollout], None]:
    """Tells once of a score outside of [0, 1]: which runs are good ones and which are failures is said on that scale."""
    told = False

    def note(_: str, rollout: Rollout) -> None:
        nonlocal told
        if told or rollout.score is None or rollout.failure is not None or 0 <= rollout.score <= 1:
            return
        told = True
        logger.warning(
            "The metric gave %g, but scores are taken to lie in [0, 1]: runs of 0.5 and more are shown as demos as they are, and a "
            "proposer hears of those below 1 as failures. Divide the metric by the most that it gives. This is said once.",
            rollout.score,
        )

    return note


def choose_demos(items: Sequence[DemoItem], options: SearchSpaceOptions, seed: int) -> list[DemoItem]:
    """At most ``demo_candidates`` demos per worker, predictor and class, drawn at random.

    Good traces come before corrected ones, and those before labelled examples.
    """
    groups: dict[tuple[str, str, str | None], list[DemoItem]] = {}
    for item in items:
        groups.setdefault((item.home, item.predictor, item.stratum), []).append(item)
    chosen: list[DemoItem] = []
    for number, members in enumerate(groups.values()):
        members = _unequal(members)
        order = np.random.default_rng([seed, 13, number]).permutation(len(members))
        limit = options.demo_candidates * (
            1 if members[0].stratum is not None else max(1, options.demo_slots)
        )
        ranked = sorted((members[int(one)] for one in order), key=lambda item: _PREFERRED.index(item.source))
        chosen += ranked[:limit]
    return chosen


def _unequal(items: Sequence[DemoItem]) -> list[DemoItem]:
    """The items without repeats: a predictor that reads few different values has many equal traces."""
    found: dict[str, DemoItem] = {}
    for item in sorted(items, key=lambda item: _PREFERRED.index(item.source)):
        found.setdefault(item.text, item)
    kept = {id(item) for item in found.values()}
    return [item for item in items if id(item) in kept]


def report_distributions(probes: Iterable[Rollout]) -> bool:
    """Whether the LMs report distributions over the labels, by rollouts of which a failed one says nothing."""
    known = [one.cross_entropy is not None for one in probes if one.score is not None and one.failure is None]
    return bool(known) and all(known)


def asks_proposer(student: dspy.Module, options: SearchSpaceOptions) -> bool:
    """Whether there is a proposer, and a predictor that the user gave no instructions for."""
    if options.proposer is None or options.mode == "demos":
        return False
    given = options.instructions or {}
    return any(name not in given for name, _ in student.named_predictors())


async def instruction_arms(
    student: dspy.Module,
    shards: Sequence[Shard],
    options: SearchSpaceOptions,
    rollouts: Sequence[tuple[str, dspy.Example, Rollout]],
    seed: int,
    book: TextBook,
) -> dict[str, list[str]]:
    """Alternatives to each predictor's own text: the user's, the proposer's, or the shipped guidance.

    What a proposer wrote for an earlier process of the run is in ``book``, and not asked for again.
    """
    given = {name: list(texts) for name, texts in (options.instructions or {}).items()}
    if options.mode == "demos":
        return {}
    public = {shard.worker.name for shard in shards if shard.worker.share_demos}
    examples = [one for shard in shards if shard.worker.name in public for one in shard.pool]
    failures = [
        (example, rollout)
        for name, example, rollout in rollouts
        if name in public and rollout.score is not None and rollout.score < 1.0
    ]
    for name, predictor in student.named_predictors():
        if name in given:
            continue
        if options.proposer is None:
            texts = proposals.guidance_instructions(predictor.signature.instructions)
        elif (known := book.texts(name)) is not None:
            texts = known
        else:
            texts = await proposals.propose_instructions(
                student,
                name,
                lm=options.proposer,
                examples=examples,
                failures=failures,
                tips=options.tips,
                count=options.instruction_candidates,
                seed=seed,
            )
            book.keep_texts(name, texts)
        given[name] = texts[: options.instruction_candidates]
    return given


def make_space(
    student: dspy.Module,
    shards: Sequence[Shard],
    options: SearchSpaceOptions,
    instructions: Mapping[str, Sequence[str]],
    items: Sequence[DemoItem],
) -> ProgramSpace:
    """All blocks and arms of this run."""
    layout: Mapping[str, Sequence[str | None]] = {}
    if options.mode != "instructions":
        layout = slots.demo_slots(
            student, demos_per_class=options.demos_per_class, demo_slots=options.demo_slots
        )
    fragments = None
    if options.fragments and options.mode != "demos":
        public = [one for shard in shards if shard.worker.share_demos for one in shard.pool]
        words = proposals.pmi_vocabulary(public, _output_field(student), options.fragment_words)
        fragments = slots.FragmentSlots(options.fragments, words) if words else None
    shown = () if options.mode == "instructions" else items
    endings = demo_endings(student, shown) if options.demo_ending else {}
    return slots.build_space(
        student,
        instructions=instructions,
        demos=shown,
        slots=layout,
        fragments=fragments,
        search_order=options.demo_order,
        endings=endings,
        later=later_arms(student, options),
    )


def later_arms(student: dspy.Module, options: SearchSpaceOptions) -> dict[str, int]:
    """Per predictor the instruction arms that join during the run: none where the user gave the texts."""
    if options.mode == "demos" or not options.later_instructions:
        return {}
    names = (name for name, _ in student.named_predictors() if name not in (options.instructions or {}))
    return dict.fromkeys(names, options.later_instructions)


def _output_field(student: dspy.Module) -> str:
    """The last predictor's enumerated output, else its last output."""
    signature = student.named_predictors()[-1][1].signature
    found = slots.enumerated_field(signature)
    return found[0] if found is not None else list(signature.output_fields)[-1]


def model_of(lm: Any) -> str:
    """The model that an LM calls, on whatever endpoint; an LM without one is like no other."""
    return str(getattr(lm, "model", "") or id(lm))


def make_members(programs: ProgramSpace, shards: Sequence[Shard], config: AlgorithmConfig) -> list[Member]:
    """What the server may know of each worker."""
    pool: Literal["own", "all"] = "all" if config.share_demos else "own"
    members = []
    for shard in shards:
        # No program with a private demo can leave its worker, so it spends its calls on shared ones.
        allowed = programs.allowed(shard.worker.name, pool)
        if not shard.worker.share_demos:
            allowed = tuple(
                _shared_only(programs, block, arms)
                for block, arms in zip(programs.space.upper, allowed, strict=True)
            )
        members.append(
            Member(
                shard.worker.name,
                allowed,
                len(shard.held_out),
                group=shard.group,
                lm=model_of(shard.worker.first_lm or dspy.settings.lm),
            )
        )
    return members


def _shared_only(programs: ProgramSpace, block: Any, arms: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(arm for arm in arms if block.arms[arm].shared)


def make_parts(shards: Sequence[Shard], lms: Mapping[str, Any]) -> dict[str, WorkerPart]:
    """What the evaluator holds of each worker; ``lms``: what each worker calls."""
    held_out = race_examples(shards)
    return {
        shard.worker.name: WorkerPart(
            shard.worker.name,
            shard.estimate,
            held_out[shard.worker.name],
            lms[shard.worker.name],
            shard.worker.max_concurrency,
            private=not shard.worker.share_demos,
            shows_estimates=shard.pool is shard.estimate,
        )
        for shard in shards
    }
