"""Instruction arms: shipped guidance, or proposals of an LM that sees program, data and failures."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import dspy
from dspy.adapters.utils import serialize_for_json

from asyndbt_dspy.errors import ConfigurationError
from asyndbt_dspy.lms.call_watch import budget_error
from asyndbt_dspy.programs.labels import enumeration
from asyndbt_dspy.programs.rollout import Rollout, lms_without_async
from asyndbt_dspy.programs.vocabulary import pmi_vocabulary

__all__ = ["GUIDANCE", "TIPS", "guidance_instructions", "pmi_vocabulary", "propose_instructions"]

logger = logging.getLogger(__name__)

GUIDANCE: tuple[str, ...] = (
    "Give only the requested output, in exactly the requested format, and nothing else.",
    "Compare the input with the examples before you answer, and answer as the most similar one does.",
    "Consider every possible answer in turn, then choose the one that fits best.",
    "Judge by what the input as a whole is about, not by single words.",
    "Look for the one detail that decides between the two most likely answers.",
    "Do not favour an answer because it comes first or is the most usual one.",
    "If the input is unclear, choose the most likely answer; never refuse and never invent another one.",
    "Use only what the input says. Do not add facts of your own.",
    "Read the input to its end before you decide: the last sentence often matters most.",
    "Before you answer, check that the answer would satisfy a careful expert in this field.",
)
"""Sentences that suit any task, each appended to the student's own text as one arm. Written for small LMs."""

TIPS: tuple[str, ...] = (
    "Keep it short and plain.",
    "Say how to tell apart the answers that are most easily confused.",
    "Describe the steps by which to reach the answer.",
    "Name the mistakes to avoid, judging by the observed failures.",
    "Begin with the role of an expert for this kind of input.",
    "State precisely what each output must look like.",
)
"""What to aim at, one per proposal, so that the proposals differ."""

MAX_INSTRUCTION_CHARACTERS = 4000
SHOWN_EXAMPLES = 3
SHOWN_FAILURES = 4
SHOWN_CHARACTERS = 400
_NOTHING = frozenset({"none", "null", "n/a"})
"""How an LM says that it has no text; DSPy too reads a JSON ``null`` as ``None``, and the text of that."""


class WriteInstructions(dspy.Signature):
    """Write better instructions for one step of a program that calls a language model.

    The instructions are all that the model is told about the task besides the fields, so they must be
    complete. They must hold for any input, not only for those shown. Keep every fact of the current
    instructions that the model needs, above all the meaning of each possible answer. Write the instructions
    themselves, without a heading and without comments.
    """

    program: str = dspy.InputField(desc="What the program does, and which step this is")
    step_fields: str = dspy.InputField(desc="Inputs and outputs of this step")
    examples: str = dspy.InputField(desc="A summary of the data, with a few examples")
    failures: str = dspy.InputField(desc="Answers that were judged wrong or poor, and why")
    current_instructions: str = dspy.InputField()
    aim: str = dspy.InputField(desc="What to aim at this time")
    new_instructions: str = dspy.OutputField()


def guidance_instructions(student_text: str) -> list[str]:
    """The student's text with one sentence of ``GUIDANCE`` appended on a new line, for each of them."""
    return [f"{student_text}\n{sentence}" if student_text else sentence for sentence in GUIDANCE]


async def propose_instructions(
    student: dspy.Module,
    predictor: str,
    *,
    lm: dspy.BaseLM,
    examples: Sequence[dspy.Example] = (),
    failures: Sequence[tuple[dspy.Example, Rollout]] = (),
    tips: Sequence[str] = TIPS,
    count: int = 4,
    seed: int = 0,
    known: Sequence[str] | None = None,
) -> list[str]:
    """Ask a proposer LM for instructions of one predictor, ``count`` times with different aims and examples.

    Proposals that are empty, too long, repeated, or that lose a field name which the student's text marks (as
    ```name``` or ``{name}``) are dropped. Where tools are chosen, the student's text lists them, so that a
    proposal is appended to it. Whatever is missing in the end, for instance because the LM cannot be reached,
    is filled up from ``GUIDANCE``, with one warning.

    Args:
        student: The program; not changed.
        predictor: Name in ``named_predictors()``.
        lm: The proposer.
        examples: Only those whose text may be shown to the proposer: none of private workers.
        failures: Examples and the runs on them that went badly, under the same rule.
        tips: Aims; the proposals take turns. The shipped ones where empty.
        count: Number of calls, and of texts returned, at most.
        seed: Chooses the examples and failures that are shown.
        known: Texts that are tried already: repeats of them are dropped as well, and nothing is filled up.

    Returns:
        At most ``count`` texts, all different, none of them the student's own.

    Raises:
        ConfigurationError: no such predictor, or a negative ``count``.
        BudgetExceededError: a call was refused because a cap is reached.
    """
    predictors = dict(student.named_predictors())
    if predictor not in predictors:
        raise ConfigurationError(
            f"no predictor {predictor!r}; the student's predictors are {list(predictors)}"
        )
    if count < 0:
        raise ConfigurationError(f"count must be 0 or more, got {count}")
    signature, aims = predictors[predictor].signature, tips or TIPS
    requests = [
        {
            "program": _describe_program(student, predictor),
            "step_fields": _describe_fields(signature),
            "examples": _summarize(signature, examples, random.Random(f"{seed}/{number}/examples")),
            "failures": _describe_failures(failures, random.Random(f"{seed}/{number}/failures")),
            "current_instructions": signature.instructions,
            "aim": aims[number % len(aims)],
        }
        for number in range(count)
    ]
    with dspy.context(lm=lm, trace=[]):
        calls = (_ask(request, seed * count + number) for number, request in enumerate(requests))
        answers = await asyncio.gather(*calls)
    return _chosen(answers, predictor, signature, count, known)


async def _ask(request: dict[str, str], rollout_id: int) -> str | Exception:
    """One proposal, or why there is none."""
    # The rollout_id makes DSPy's cache tell proposals apart; it asks for a temperature above 0.
    writer = dspy.Predict(WriteInstructions, temperature=1.0, rollout_id=rollout_id)
    try:
        if lms_without_async(writer):
            return str((await asyncio.to_thread(writer, **request)).new_instructions or "")
        return str((await writer.acall(**request)).new_instructions or "")
    except Exception as error:  # a proposer is a help: without it there is the shipped guidance
        refused = budget_error(error)
        if refused is not None:
            raise refused from error
        return error


def _chosen(
    answers: Sequence[str | Exception],
    predictor: str,
    signature: type[dspy.Signature],
    count: int,
    known: Sequence[str] | None,
) -> list[str]:
    student_text = signature.instructions
    chosen: list[str] = []
    taken = {*map(_normalized, [student_text, *(known or ())])}
    reasons: Counter[str] = Counter()
    for answer in answers:
        if isinstance(answer, Exception):
            reasons[_first_line(answer)] += 1
            continue
        text = _cleaned(answer)
        if "next_tool_name" in signature.output_fields and text:
            text = f"{student_text}\n{text}"
        reason = _objection(text, student_text, signature, taken)
        if reason:
            reasons[reason] += 1
            continue
        taken.add(_normalized(text))
        chosen.append(text)
    if reasons:
        logger.warning(
            "Predictor %r: %d of %d proposed instructions cannot be used (%s)%s.",
            predictor,
            count - len(chosen),
            count,
            "; ".join(f"{number} x {reason}" for reason, number in reasons.items()),
            "; shipped guidance takes their place" if known is None else "",
        )
    filling = guidance_instructions(student_text) if known is None else []
    return [*chosen, *filling][:count]


def _objection(text: str, student_text: str, signature: type[dspy.Signature], taken: set[str]) -> str:
    """Why ``text`` cannot be an arm; empty if it can."""
    limit = max(MAX_INSTRUCTION_CHARACTERS, 2 * len(student_text))
    if not text:
        return "empty"
    if len(text) > limit:
        return f"longer than {limit} characters"
    if _normalized(text) in taken:
        return "a repeat"
    lost = sorted(
        name for name in _marked(student_text, signature.fields) if not re.search(rf"\b{name}\b", text)
    )
    return f"does not mention {lost}" if lost else ""


def _marked(text: str, names: Iterable[str]) -> set[str]:
    """The field names that ``text`` refers to as such: in backticks or braces."""
    return {name for name in names if f"`{name}`" in text or f"{{{name}}}" in text}


def _cleaned(text: str) -> str:
    """Without the code fence or the quotation marks that LMs like to put around a text; empty where it is none."""
    text = text.strip()
    fenced = re.fullmatch(r"```[a-z]*\n(.*)\n```", text, flags=re.DOTALL)
    if fenced:
        text = fenced.group(1).strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return "" if text.casefold().rstrip(".") in _NOTHING else text


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:SHOWN_CHARACTERS]


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


def _describe_program(student: dspy.Module, predictor: str) -> str:
    lines = [f"Program: {type(student).__name__}"]
    # DSPy's own classes explain themselves to programmers; that says nothing about the task.
    if not type(student).__module__.startswith("dspy."):
        lines += [inspect.getdoc(type(student)) or ""] if type(student).__doc__ else []
    for name, module in student.named_predictors():
        mark = "  <- this step" if name == predictor else ""
        lines.append(f"Step {name}: {module.signature.signature}{mark}")
    return "\n".join(line for line in lines if line)


def _describe_fields(signature: type[dspy.Signature]) -> str:
    lines = []
    for kind, fields in (("input", signature.input_fields), ("output", signature.output_fields)):
        for name, field in fields.items():
            description = (field.json_schema_extra or {}).get("desc", "")
            shown = "" if description == f"${{{name}}}" else f": {description}"
            annotation = getattr(field.annotation, "__name__", None) or str(field.annotation)
            lines.append(f"{kind} {name} ({annotation}){shown}")
    classes = enumeration(signature)
    if classes is not None:
        lines.append(f"{classes.field} is one of: {', '.join(classes.labels)}")
    return "\n".join(lines)


def _summarize(signature: type[dspy.Signature], examples: Sequence[dspy.Example], rng: random.Random) -> str:
    if not examples:
        return "(none)"
    lines = [f"{len(examples)} examples."]
    classes = enumeration(signature)
    if classes is not None:
        found = Counter(classes.label_of(example.get(classes.field)) for example in examples)
        counts = [f"{label}: {found[label]}" for label in classes.labels if found[label]]
        lines += [f"{classes.field}: {', '.join(counts)}"] if counts else []
    for example in rng.sample(list(examples), min(SHOWN_EXAMPLES, len(examples))):
        lines.append(_short(example.toDict()))
    return "\n".join(lines)


def _describe_failures(failures: Sequence[tuple[dspy.Example, Rollout]], rng: random.Random) -> str:
    lines = []
    for example, rollout in rng.sample(list(failures), min(SHOWN_FAILURES, len(failures))):
        answer = rollout.prediction
        shown = answer.toDict() if isinstance(answer, dspy.Example) else answer
        line = f"For {_short(example.toDict())} the program answered {_short(shown)}"
        line += f", score {rollout.score:g}" if rollout.score is not None else ""
        line += f". Feedback: {rollout.feedback}" if rollout.feedback else ""
        line += f". Error: {rollout.error[:SHOWN_CHARACTERS]}" if rollout.error else ""
        lines.append(line)
    return "\n".join(lines) or "(none)"


def _short(value: Any) -> str:
    text = json.dumps(serialize_for_json(value), ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
