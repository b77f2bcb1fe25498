"""Whether there is anything to search: settings that leave the student alone are refused, data that do are told of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import dspy

from asyndbt_dspy.core.roster import Member
from asyndbt_dspy.core.space import Space
from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.programs.slots import build_space

if TYPE_CHECKING:
    from asyndbt_dspy.preparation import SearchSpaceOptions

logger = logging.getLogger(__name__)


def check_instructions(student: dspy.Module, instructions: Mapping[str, Sequence[str]] | None) -> None:
    """Refuse instruction arms for what is no predictor of the student, and what is no list of texts per predictor.

    Raises:
        ConfigurationError: says which, and the form that is expected.
    """
    known = [name for name, _ in student.named_predictors()]
    if instructions is not None and not isinstance(instructions, Mapping):
        raise ConfigurationError(
            f"instructions={str(instructions)[:80]!r} must be a dictionary with a list of texts per predictor: "
            f"instructions={{{known[0]!r}: [texts]}}; the student's predictors are {known}"
        )
    for name, texts in (instructions or {}).items():
        if name not in known:
            raise ConfigurationError(
                f"instructions for {name!r}: the student has no such predictor; its predictors are {known}"
            )
        if isinstance(texts, str):
            raise ConfigurationError(
                f"instructions for {name!r} are one text; give a list of texts: {{{name!r}: [{texts[:40]!r}]}}"
            )
        if not isinstance(texts, Sequence):
            raise ConfigurationError(
                f"instructions for {name!r} are a {type(texts).__name__}; give a list of texts: {{{name!r}: [texts]}}"
            )
        for text in texts:
            if not isinstance(text, str):
                raise ConfigurationError(f"instructions for {name!r} must be texts, got {text!r}")


def check_choices(
    student: dspy.Module, options: SearchSpaceOptions, slots: Mapping[str, Sequence[str | None]]
) -> None:
    """Refuse settings with which the student is the only program, whatever the data are.

    Args:
        slots: The demo slots of each predictor.

    Raises:
        ConfigurationError: says the settings, and what to set instead.
    """
    tries_texts, tries_demos = options.mode != "demos", options.mode != "instructions"
    if (tries_texts and _has_texts(student, options)) or (tries_demos and any(map(len, slots.values()))):
        return
    said, instead = [f"mode={options.mode!r}"], []
    if tries_texts:
        name = student.named_predictors()[0][0]
        said.append(f"instruction_candidates={options.instruction_candidates}")
        said += ["instructions=… that hold no text but the student's own"] if options.instructions else []
        instead.append(f"instruction_candidates of 1 or more, or instructions={{{name!r}: [texts]}}")
    if tries_demos:
        said.append(f"demo_slots={options.demo_slots}")
        said += [] if options.demos_per_class is None else [f"demos_per_class={options.demos_per_class}"]
        instead.append("demo_slots (demos_per_class where an output has classes) of 1 or more")
    instead += [] if options.mode == "both" else ["mode='both'"]
    raise ConfigurationError(
        f"{', '.join(said)}: with these settings there is nothing to search, as the student is the only program; "
        f"set {', or '.join(instead)}"
    )


def _has_texts(student: dspy.Module, options: SearchSpaceOptions) -> bool:
    given = options.instructions or {}
    is_open = any(name not in given for name, _ in student.named_predictors())
    if options.fragments or (is_open and (options.instruction_candidates or options.later_instructions)):
        return True
    return any(size > 1 for size in build_space(student, instructions=given).space.sizes)


def tell_of_no_choice(space: Space, members: Sequence[Member], options: SearchSpaceOptions) -> None:
    """Say why nothing is searched, where the setup found nothing: the server ends such a run at its start."""
    if any(space.has_choice(member.allowed) for member in members):
        return
    reasons = [] if options.mode == "demos" else ["there are no instructions but the student's own"]
    if any(len(block.arms) > 1 for block in space.upper if block.kind == "demo"):
        reasons.append("all demos are of workers with share_demos=False, and none may leave its worker")
    elif options.mode != "instructions":
        reasons.append(
            "no demo was found (an example with its outputs makes one, a run that scored well too, within "
            f"max_demo_tokens={options.max_demo_tokens})"
        )
    logger.warning(
        "There is nothing to search after the setup: %s. The student is returned as it was, and no more is spent.",
        "; ".join(reasons),
    )
