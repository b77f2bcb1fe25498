"""Demo arms: labelled examples of a shard, and traces of runs: of good ones as they are, of others with the example's labels."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy
import numpy as np
from dspy.adapters.types.base_type import split_message_content_for_custom_types
from dspy.adapters.utils import annotation_allows_none, serialize_for_json
from pydantic_core import PydanticUndefined

from asyndbt_dspy.errors import ExportError
from asyndbt_dspy.programs.labels import enumeration
from asyndbt_dspy.programs.program_space import Source, demo_text
from asyndbt_dspy.programs.rollout import Rollout
from asyndbt_dspy.programs.slots import DemoItem

logger = logging.getLogger(__name__)

DEFAULT_MAX_DEMO_TOKENS = 400
"""A demo is paid for in every later call, and long ones bloat prompts (the cap is per demo)."""
MEDIA_TOKENS = 1_024
"""Taken for an image, a sound or a document: what most providers bill for an image of common size."""

TokenCounter = Callable[[str], int]


def estimate_tokens(text: str) -> int:
    """Length of ``text`` in tokens without a tokenizer: the larger of 1.3 per word and 1 per 4 characters."""
    return math.ceil(max(1.3 * len(text.split()), len(text) / 4))


def demo_tokens(demo: dspy.Example, count_tokens: TokenCounter | None = None) -> int:
    """Length in tokens of a demo's field names and values, by ``count_tokens`` or ``estimate_tokens``.

    An image, a sound or a document counts ``MEDIA_TOKENS``: its file as text has nothing to do with what is billed.
    """
    fields = ((name, value) for name, value in demo.items() if name != "augmented")
    text = "\n".join(f"{name}: {serialize_for_json(value)}" for name, value in fields)
    [message] = split_message_content_for_custom_types([{"role": "user", "content": text}])
    parts = message["content"]
    if isinstance(parts, str):
        return (count_tokens or estimate_tokens)(text)
    texts = [str(part.get("text", "")) for part in parts if part.get("type") == "text"]
    return (count_tokens or estimate_tokens)("".join(texts)) + MEDIA_TOKENS * (len(parts) - len(texts))


def labelled_demos(
    student: dspy.Module,
    examples: Sequence[dspy.Example],
    *,
    worker: str,
    shared: bool = True,
    max_demo_tokens: int = DEFAULT_MAX_DEMO_TOKENS,
    count_tokens: TokenCounter | None = None,
) -> list[DemoItem]:
    """Demos made of labelled examples, for every predictor whose fields the examples hold.

    A demo needs all inputs of the predictor's signature (those with a default or allowing ``None`` may be
    absent) and all outputs but the reasoning: as in DSPy, a ``ChainOfThought`` demo may lack it. Repeats are
    dropped, and so are demos longer than ``max_demo_tokens``: one warning says how many. Where the program brings a
    prompt format of its own (``prompt_adapter(predictor)``), so are demos that it refuses with an ``ExportError``.

    Args:
        student: The program.
        examples: The worker's shard; the item's ``example_index`` is the position in it.
        worker: The worker's name, the home of the demos.
        shared: False for private workers.
        max_demo_tokens: Cap per demo.
        count_tokens: The LM's own tokenizer; without it the length is estimated.

    Returns:
        Items in the order of predictors, then of examples, keys ``"d:<worker>:<predictor>:<example index>"``.
    """
    collected = _Collected(student, worker, shared, "labelled", max_demo_tokens, count_tokens)
    for name, predictor in student.named_predictors():
        for index, example in enumerate(examples):
            demo = _labelled(predictor.signature, example)
            if demo is not None:
                collected.add(f"d:{worker}:{name}:{index}", name, predictor.signature, demo, index)
    collected.warn()
    return collected.items


def bootstrapped_demos(
    rollout: Rollout,
    example: dspy.Example,
    *,
    program: dspy.Module,
    worker: str,
    example_index: int,
    student: dspy.Module | None = None,
    shared: bool = True,
    threshold: float = 0.5,
    max_demo_tokens: int = DEFAULT_MAX_DEMO_TOKENS,
    count_tokens: TokenCounter | None = None,
    on_too_long: Callable[[int], None] | None = None,
) -> list[DemoItem]:
    """Demos made of one run's trace.

    A run that went well is shown as it was. Of one that went wrong, what led to the answer is kept and the answer replaced by
    the example's labels ("corrected"; see ``_answers``). A student that is right on one class alone would else have demos of
    this class alone wherever a predictor reads what another one wrote. Where the example holds the inputs too it is a labelled
    demo already, and no corrected one is made.

    Args:
        rollout: A run with its trace.
        example: The example that the program was run on.
        program: The very program object that ran; its predictors are found in the trace by identity.
        worker: Home of the demos.
        example_index: Index of ``example`` in the worker's shard.
        student: Whose predictors are to show the demos, by their names, where ``program`` is its teacher.
        shared: False for private workers.
        threshold: The lowest score of a run that is worth showing as it was.
        max_demo_tokens: Cap per demo.
        count_tokens: The LM's own tokenizer; without it the length is estimated.
        on_too_long: Called with the length of each demo left out for it (to warn once about many runs);
            without it, one warning per call.

    Returns:
        One item per call of a predictor that gave a complete answer (every step of a ``ReAct`` loop, and its
        extraction), without repeats; keys ``"b:<worker>:<predictor>:<example index>:<number>"``. Of a run below the threshold
        what can be corrected, keys ``"c:…"``. Empty for a run without a score, and for one that failed.
    """
    if rollout.score is None or rollout.failure is not None or not rollout.trace:
        return []
    signatures = {name: one.signature for name, one in (student or program).named_predictors()}
    names = {id(one): name for name, one in program.named_predictors() if name in signatures}
    if (
        not names and len(signatures) == len(program.named_predictors()) == 1
    ):  # whatever a teacher's is called
        names = {id(program.predictors()[0]): next(iter(signatures))}
    went_well = rollout.score >= threshold
    answers = frozenset() if went_well else _answers(rollout)
    source: Source = "bootstrapped" if went_well else "corrected"
    collected = _Collected(student or program, worker, shared, source, max_demo_tokens, count_tokens)
    for number, (predictor, inputs, prediction) in enumerate(rollout.trace):
        name = names.get(id(predictor))
        if name is None:
            continue
        signature, demo = signatures[name], None
        if went_well:
            demo = _bootstrapped(signature, inputs, prediction)
        elif number in answers:
            demo = _corrected(signature, inputs, example)
        if demo is not None:
            key = f"{source[0]}:{worker}:{name}:{example_index}:{number}"
            collected.add(key, name, signature, demo, example_index)
    if on_too_long is None:
        collected.warn()
    else:
        for tokens in collected.left_out:
            on_too_long(tokens)
    return collected.items


def _answers(rollout: Rollout) -> frozenset[int]:
    """Numbers of the calls in a trace whose answers, reasoning apart, are what the program returned under these names.

    The labels are of those, and of nothing on the way: of the calls that answer a field the last one counts, and none of a
    predictor that was called more than once (on parts of the input, to vote, to reason step by step).
    """
    returned = rollout.prediction
    if not isinstance(returned, dspy.Example | Mapping):
        return frozenset()
    times = Counter(id(predictor) for predictor, _, _ in rollout.trace or ())
    found: set[int] = set()
    answered: set[str] = set()
    for number, (predictor, _, prediction) in reversed(list(enumerate(rollout.trace or ()))):
        if predictor is None or not isinstance(prediction, dspy.Prediction):
            continue
        fields = predictor.signature.output_fields
        outputs = {name for name, one in fields.items() if not _is_reasoning(name, one.annotation)}
        # A resumed run reads what was returned as JSON.
        same = all(
            name in returned
            and name in prediction
            and serialize_for_json(returned[name]) == serialize_for_json(prediction[name])
            for name in outputs
        )
        if same and not answered & outputs and times[id(predictor)] == 1:
            found.add(number)
        answered |= outputs
    return frozenset(found)


@dataclass
class _Collected:
    """Demos of one worker, without repeats, those that are too long, and those that the program's format cannot write."""

    program: dspy.Module
    worker: str
    shared: bool
    source: Source
    max_demo_tokens: int
    count_tokens: TokenCounter | None
    items: list[DemoItem] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)

    def add(
        self, key: str, predictor: str, signature: type[dspy.Signature], demo: dspy.Example, index: int
    ) -> None:
        content = (predictor, demo_text(demo))
        if content in self.seen:
            return
        self.seen.add(content)
        tokens = demo_tokens(demo, self.count_tokens)
        if tokens > self.max_demo_tokens:
            self.left_out.append(tokens)
            return
        if not _can_be_written(self.program, predictor, signature, demo):
            return
        item = DemoItem(
            key=key,
            home=self.worker,
            shared=self.shared,
            predictor=predictor,
            demo=demo,
            stratum=_stratum(signature, demo),
            tokens=tokens,
            source=self.source,
            example_index=index,
        )
        self.items.append(item)

    def warn(self) -> None:
        if self.left_out:
            logger.warning(
                "Worker %r: %d %s demos are longer than max_demo_tokens=%d (the longest: about %d tokens) "
                "and were left out; raise max_demo_tokens to use them.",
                self.worker,
                len(self.left_out),
                self.source,
                self.max_demo_tokens,
                max(self.left_out),
            )


def _labelled(signature: type[dspy.Signature], example: dspy.Example) -> dspy.Example | None:
    held = {
        name: _plain(example[name])
        for name, declared in signature.fields.items()
        if name in example and (example[name] is not None or annotation_allows_none(declared.annotation))
    }
    for name, declared in signature.input_fields.items():
        may_lack = declared.default is not PydanticUndefined or annotation_allows_none(declared.annotation)
        if name not in held and not may_lack:
            return None
    for name, declared in signature.output_fields.items():
        if name in held or _is_reasoning(name, declared.annotation):
            continue
        return None
    return dspy.Example(held) if any(name in held for name in signature.output_fields) else None


def _bootstrapped(
    signature: type[dspy.Signature], inputs: Mapping[str, Any], prediction: Any
) -> dspy.Example | None:
    """The demo, or ``None`` where the answer lacks an output (a partly parsed one, or a teacher's with other fields)."""
    if not isinstance(prediction, dspy.Prediction):
        return None
    if any(
        name not in prediction and not _is_reasoning(name, one.annotation)
        for name, one in signature.output_fields.items()
    ):
        return None
    shown = {name: inputs[name] for name in signature.input_fields if name in inputs}
    shown.update({name: prediction[name] for name in signature.output_fields if name in prediction})
    return dspy.Example({"augmented": True, **{name: _plain(value) for name, value in shown.items()}})


def _plain(value: Any) -> Any:
    """``value`` without NumPy's types, which a saved program could not hold: lists and numbers in their place."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if type(value) in (list, tuple):
        return type(value)(_plain(one) for one in value)
    return {key: _plain(one) for key, one in value.items()} if type(value) is dict else value


def _corrected(
    signature: type[dspy.Signature], inputs: Mapping[str, Any], example: dspy.Example
) -> dspy.Example | None:
    """The inputs that the program made, answered with the labels; ``None`` where labels lack or the example says it all."""
    if _labelled(signature, example) is not None:
        return None
    labels = {name: example[name] for name in signature.output_fields if name in example}
    made = {name: inputs[name] for name in signature.input_fields if name in inputs}
    demo = _labelled(signature, dspy.Example({**made, **labels}))
    return None if demo is None else dspy.Example({"augmented": True, **demo})


def _can_be_written(
    program: dspy.Module, predictor: str, signature: type[dspy.Signature], demo: dspy.Example
) -> bool:
    """Whether the prompt format that a program brings for a predictor (a chain's, say) takes the demo."""
    own_format = getattr(program, "prompt_adapter", None)
    if not callable(own_format):
        return True
    try:
        own_format(predictor).format_demos(signature, [dict(demo)])
    except ExportError:
        return False
    return True


def _is_reasoning(name: str, annotation: Any) -> bool:
    return name == "reasoning" or annotation is dspy.Reasoning


def _stratum(signature: type[dspy.Signature], demo: dspy.Example) -> str | None:
    classes = enumeration(signature)
    return None if classes is None else classes.label_of(demo.get(classes.field))
