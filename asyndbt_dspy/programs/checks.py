"""What cannot work is said before any LM call is paid for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dspy

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs.demos import DEFAULT_MAX_DEMO_TOKENS, TokenCounter, demo_tokens, estimate_tokens
from asyndbt_dspy.programs.labels import enumeration
from asyndbt_dspy.programs.metrics import excerpt
from asyndbt_dspy.programs.rollout import lms_without_async, runs_plainly
from asyndbt_dspy.programs.shards import held_out, shards

__all__ = [
    "ContextTokens",
    "check_context",
    "check_examples",
    "check_inputs",
    "check_lms",
    "check_overlap",
    "check_overlap_of_others",
    "check_student",
    "check_teacher",
    "held_out",
    "inputs_text",
    "shards",
]

logger = logging.getLogger(__name__)

ContextTokens = int | Callable[[], int | None] | None
"""The LM's context in tokens, or a function that finds it out; ``None`` where it is unknown."""


def check_inputs(
    student: dspy.Module,
    trainset: Sequence[dspy.Example],
    *,
    valset: Sequence[dspy.Example] | None = None,
    name: str = "trainset",
    context_tokens: ContextTokens = None,
    max_demo_tokens: int = DEFAULT_MAX_DEMO_TOKENS,
    slots: Mapping[str, Sequence[str | None]] | None = None,
    count_tokens: TokenCounter | None = None,
) -> int:
    """Every check of this module on one worker's data.

    Args:
        student: The program.
        trainset: The worker's examples.
        valset: Its validation examples, if it has any.
        name: What to call the trainset in messages, for instance ``"trainset of worker 'eu'"``.
        context_tokens: Of the worker's LM.
        max_demo_tokens: Cap per demo.
        slots: Demo slots per predictor (``demo_slots``), to see whether full ones fit the context.
        count_tokens: The LM's own tokenizer; without it lengths are estimated.

    Returns:
        The number of validation examples that are training examples too; a warning is logged if there are
        any.

    Raises:
        ConfigurationError: see the single checks.
    """
    check_student(student)
    check_examples(student, trainset, name=name)
    if valset is not None:
        check_examples(student, valset, name=name.replace("trainset", "valset"))
    check_context(
        student,
        trainset,
        context_tokens=context_tokens,
        max_demo_tokens=max_demo_tokens,
        slots=slots,
        count_tokens=count_tokens,
    )
    return check_overlap(trainset, valset or (), name=name)


def check_student(student: Any) -> None:
    """Refuse what is no program, and a program in which there is nothing to optimize."""
    if not isinstance(student, dspy.Module):
        raise ConfigurationError(f"student must be a dspy.Module, got {type(student).__name__}")
    if student.named_predictors():
        return
    frozen = [name for name, module in student.named_sub_modules() if getattr(module, "_compiled", False)]
    reason = f"; these parts are frozen, set their _compiled to False: {frozen}" if frozen else ""
    raise ConfigurationError(
        f"student {type(student).__name__} has 0 predictors, so there is nothing to optimize; it needs "
        f"at least one dspy.Predict (or ChainOfThought, ReAct, …) as an attribute{reason}"
    )


def only_teacher(teacher: Any) -> Any:
    """The one teacher of a list, as ``dspy.BetterTogether`` passes it on; what is no list as it is."""
    if not isinstance(teacher, list | tuple):
        return teacher
    if len(teacher) > 1:
        raise ConfigurationError(
            f"teacher is a list of {len(teacher)} programs, and traces are taken of one; pass the one that answers best"
        )
    return teacher[0] if teacher else None


def check_teacher(student: dspy.Module, teacher: Any) -> None:
    """Refuse a teacher whose traces could become demos of no predictor of the student."""
    if not isinstance(teacher, dspy.Module):
        raise ConfigurationError(f"teacher must be one dspy.Module, got {type(teacher).__name__}")
    own, others = ([name for name, _ in one.named_predictors()] for one in (student, teacher))
    if not set(own) & set(others) and not len(own) == len(others) == 1:
        raise ConfigurationError(
            f"the teacher's predictors {others} have none of the names of the student's, {own}: its traces could not become "
            "demos. Name them alike, or leave the teacher out"
        )


def check_lms(program: dspy.Module, lms: Mapping[str, Any]) -> None:
    """Refuse an LM that can be called plainly only, for a program that has ``aforward`` only. ``lms``: by worker."""
    if runs_plainly(program):
        return
    for worker, lm in lms.items():
        for plain in lms_without_async(program, lm):
            raise ConfigurationError(
                f"worker {worker!r}: the LM {plain.model!r} has no async side, and {type(program).__name__} has aforward "
                "only; give async_engine= to its dspy.LM or aforward to its class, or give the program a forward"
            )


def check_examples(student: dspy.Module, examples: Sequence[Any], *, name: str = "trainset") -> None:
    """Refuse an empty set, what is no ``dspy.Example``, undeclared inputs, and labels declared as inputs.

    Logs a warning about labels that are none of the answers that the program's signature allows.
    """
    if len(examples) == 0:
        raise ConfigurationError(f"{name} has 0 examples; it needs at least 1")
    predictors = student.named_predictors()
    outputs = set(predictors[-1][1].signature.output_fields) if predictors else set()
    # A field that some predictor takes as its input may well be an input of the program.
    outputs -= {field for _, predictor in predictors for field in predictor.signature.input_fields}
    for index, example in enumerate(examples):
        if not isinstance(example, dspy.Example):
            raise ConfigurationError(
                f"{name}[{index}] is a {type(example).__name__}; "
                f"make it a dspy.Example(**fields).with_inputs(…)"
            )
        declared = getattr(example, "_input_keys", None)
        if not declared:
            raise ConfigurationError(
                f"{name}[{index}] does not say which fields are inputs; "
                f"call .with_inputs(…) on it (it has {example.keys()})"
            )
        leaked = sorted(outputs & set(declared))
        if leaked:
            raise ConfigurationError(
                f"{name}[{index}] lists {leaked} in with_inputs, but the program's last predictor "
                f"is to produce that; leave labels out of with_inputs"
            )
    _warn_of_unknown_labels(predictors, examples, name)


def check_overlap(
    trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example], *, name: str = "trainset"
) -> int:
    """How many validation examples have the inputs of a training example; logs a warning if any have."""
    trained = {inputs_text(example) for example in trainset}
    return _tell_of_overlap(sum(inputs_text(example) in trained for example in valset), len(valset), name)


def check_overlap_of_others(
    trainsets: Mapping[str, Sequence[dspy.Example]], valsets: Mapping[str, Sequence[dspy.Example]]
) -> None:
    """``check_overlap`` of each worker's validation examples with what the other workers train on, each text read once."""
    owners: dict[str, set[str]] = {}
    for worker, examples in trainsets.items() if valsets else ():
        for example in examples:
            owners.setdefault(inputs_text(example), set()).add(worker)
    for worker, examples in valsets.items():
        shared = sum(bool(owners.get(inputs_text(example), set()) - {worker}) for example in examples)
        _tell_of_overlap(shared, len(examples), f"trainsets of other workers than {worker!r}")


def _tell_of_overlap(shared: int, count: int, name: str) -> int:
    if shared:
        logger.warning(
            "%d of %d examples of the valset have the inputs of an example of the %s: the final comparison "
            "would be made on examples that the candidates were chosen on or show as demos. Remove them from "
            "one of the two.",
            shared,
            count,
            name,
        )
    return shared


def check_context(
    student: dspy.Module,
    examples: Sequence[dspy.Example],
    *,
    context_tokens: ContextTokens,
    max_demo_tokens: int = DEFAULT_MAX_DEMO_TOKENS,
    slots: Mapping[str, Sequence[str | None]] | None = None,
    count_tokens: TokenCounter | None = None,
) -> None:
    """Compare the lengths of demos and examples with the LM's context, if that is known.

    Raises:
        ConfigurationError: one demo (of the student, or as long as ``max_demo_tokens`` allows) fills the
            context.
    """
    context = context_tokens() if callable(context_tokens) else context_tokens
    if context is None:
        return
    longest = max((demo_tokens(example, count_tokens) for example in examples), default=0)
    if longest >= context and max_demo_tokens >= context:
        raise ConfigurationError(
            f"a demo may have max_demo_tokens={max_demo_tokens} tokens and the longest example has about "
            f"{longest}, but the LM's context is {context} tokens; set max_demo_tokens well below {context} "
            f"or use an LM with a larger context"
        )
    if longest >= context:
        logger.warning(
            "The longest example has about %d tokens, the LM's context is %d: it cannot be answered. "
            "Shorten it, remove it, or use an LM with a larger context.",
            longest,
            context,
        )
    for name, predictor in student.named_predictors():
        text = (count_tokens or estimate_tokens)(predictor.signature.instructions)
        own = sum(demo_tokens(dspy.Example(demo), count_tokens) for demo in predictor.demos)
        if text + own >= context:
            raise ConfigurationError(
                f"predictor {name!r}: instructions and demos of the student have about {text + own} tokens, "
                f"but the LM's context is {context}; remove demos or use an LM with a larger context"
            )
        filled = len((slots or {}).get(name, ())) * min(max_demo_tokens, longest)
        if longest < context <= text + filled + longest:
            logger.warning(
                "Predictor %r: with all demo slots full a prompt may have about %d tokens, the LM's context "
                "is %d. Lower max_demo_tokens=%d or the number of demo slots.",
                name,
                text + filled + longest,
                context,
                max_demo_tokens,
            )


def _warn_of_unknown_labels(
    predictors: Sequence[tuple[str, dspy.Predict]], examples: Sequence[dspy.Example], name: str
) -> None:
    for predictor, module in predictors[-1:]:
        classes = enumeration(module.signature)
        if classes is None:
            continue
        values = [example.get(classes.field) for example in examples]
        given = [number for number, value in enumerate(values) if value is not None]
        unknown = [number for number in given if classes.label_of(values[number]) is None]
        if unknown:
            # The values stay out of the log: they may be a private worker's.
            logger.warning(
                "%d of %d examples, the first %s[%d], have a %r that predictor %r cannot answer; "
                "its answers are %s.",
                len(unknown),
                len(examples),
                name,
                unknown[0],
                classes.field,
                predictor,
                excerpt(list(classes.labels)),
            )


def inputs_text(example: dspy.Example) -> str:
    """Equal for examples with equal inputs."""
    # Field values need not be hashable.
    return repr(sorted(example.inputs().toDict().items(), key=lambda pair: str(pair[0])))
