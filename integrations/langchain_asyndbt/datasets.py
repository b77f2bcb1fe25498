"""Examples as LangChain's users have them, dictionaries or LangSmith's, as DSPy's."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import dspy

from asyndbt_dspy.errors import ConfigurationError, ExportError
from langchain_asyndbt.answers import answer_messages
from langchain_asyndbt.chain_program import AFTER_THE_LAST, ChainPlan
from langchain_asyndbt.fields import OUTPUT, field_name, output_field

logger = logging.getLogger(__name__)

MAX_LABELS = 12
EXAMPLES_PER_LABEL = 2
"""Fewer than this, and a repeated answer is a coincidence rather than a label."""

LANGSMITH_KEYS = frozenset({"inputs", "outputs", "id", "metadata", "dataset_id", "split"})
"""With no other key than these, a dictionary is an example of LangSmith whatever the chain's inputs are called."""


class SourcedExample(dspy.Example):
    """An example that remembers the user's own inputs and outputs.

    Its fields have one namespace for both and names that DSPy can take; evaluators get what the user wrote.
    """

    def __init__(self, base: Any = None, **kwargs: Any) -> None:
        super().__init__(base, **kwargs)
        self._source: tuple[dict[str, Any], dict[str, Any]] | None = getattr(base, "_source", None)


def source_of(example: dspy.Example) -> tuple[dict[str, Any], dict[str, Any]]:
    """(inputs, outputs) as the user wrote them; the example's fields where it remembers no others."""
    source = getattr(example, "_source", None)
    if source is None:
        return dict(example.inputs().items()), dict(example.labels().items())
    return dict(source[0]), dict(source[1])


@dataclass(frozen=True)
class ExampleForm:
    """How to read a user's examples.

    Attributes:
        input_keys: Names of the inputs of plain dictionaries.
        input_key: Where the chain's input is no dictionary: the field that is passed to it.
        output_key: The output that is the chain's output; ``None`` where there is one only, or all together.
        output_keys: Of the dictionary that the chain gives, the keys that hold its prompts' answers.
        reads: Whether the chain could give an output; tells ``{"label": "a"}`` from ``"a"``.
    """

    input_keys: tuple[str, ...]
    input_key: str | None = None
    output_key: str | None = None
    output_keys: tuple[str, ...] = ()
    reads: Callable[[Any], bool] = field(default=lambda output: True, compare=False)

    def examples(self, data: Iterable[Any]) -> list[dspy.Example]:
        """DSPy examples: inputs and outputs under their names, and the chain's own output as ``output``.

        Raises:
            ConfigurationError: an example without inputs, or of a kind that is not known.
        """
        return [self._example(item, number) for number, item in enumerate(data)]

    def split(self, item: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(inputs, outputs) of one example in any of the known forms."""
        if isinstance(item, dspy.Example) and item._input_keys is not None:
            return dict(item.inputs().items()), dict(item.labels().items())
        if not isinstance(item, Mapping) and hasattr(item, "inputs") and hasattr(item, "outputs"):
            # An example object of LangSmith.
            return self._named(item.inputs), _outputs(item.outputs)
        if isinstance(item, dspy.Example):
            item = dict(item.items())
        if not isinstance(item, Mapping):
            raise ConfigurationError(
                f"an example must be a dictionary or a dspy.Example, got {type(item).__name__}"
            )
        if self._is_langsmith(item):
            return self._named(item["inputs"]), _outputs(item.get("outputs"))
        inputs = {name: value for name, value in item.items() if name in self.input_keys}
        return inputs, {name: value for name, value in item.items() if name not in self.input_keys}

    def _is_langsmith(self, item: Mapping[str, Any]) -> bool:
        """``{"inputs": …, "outputs": …}``, whatever else LangSmith exports beside them, and no plain dictionary."""
        further = set(item) - LANGSMITH_KEYS
        if not further:
            return "inputs" in item
        return {"inputs", "outputs"} <= set(item) and not ({"inputs"} | further) & set(self.input_keys)

    def _named(self, inputs: Any) -> dict[str, Any]:
        if isinstance(inputs, Mapping):
            return dict(inputs)
        return {self.input_key or "input": inputs}

    def _example(self, item: Any, number: int) -> dspy.Example:
        inputs, outputs = self.split(item)
        if not inputs:
            raise ConfigurationError(
                f"example {number} has no input: expected some of {list(self.input_keys)}, got {_names(item)}; "
                "write {'inputs': …, 'outputs': …}, or name them with input_keys=[…]"
            )
        fields = {field_name(name): value for name, value in inputs.items()}
        fields |= {name: value for name, value in outputs.items() if name not in fields}
        if OUTPUT not in fields and outputs:
            fields[OUTPUT] = self._output(outputs, number)
        fields |= self._answers(outputs)
        # As a dictionary: a field may have the name of an argument.
        example = SourcedExample(fields)
        example._source = (inputs, outputs)
        return example.with_inputs(*(field_name(name) for name in inputs))

    def _answers(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs under the fields of the chain's prompts: by the names of keys, or the only one for the only key."""
        names = {key: key for key in self.output_keys}
        single = next(iter(outputs)) if len(outputs) == 1 else self.output_key
        if len(names) == 1 and single is not None and (self.output_key or not names.keys() & outputs.keys()):
            names = dict.fromkeys(names, single)
        return {output_field(key): outputs[name] for key, name in names.items() if name in outputs}

    def _output(self, outputs: Mapping[str, Any], number: int) -> Any:
        if self.output_key is not None:
            if self.output_key not in outputs:
                raise ConfigurationError(
                    f"example {number} has no output {self.output_key!r}, only {list(outputs)}"
                )
            return outputs[self.output_key]
        if len(outputs) > 1:
            return dict(outputs)
        (single,) = outputs.values()
        return dict(outputs) if not self.reads(single) and self.reads(dict(outputs)) else single


def example_form(
    plan: ChainPlan, *, input_keys: Sequence[str] | None, input_key: str | None, output_key: str | None
) -> ExampleForm:
    """How to read the examples of a chain: its inputs are what its schema names, else its prompts' variables."""

    def reads(output: Any) -> bool:
        return _unreadable(plan, output) is None

    keys = tuple(key for key in plan.output_keys if key is not None)
    if input_keys is not None:
        return ExampleForm(tuple(input_keys), input_key, output_key, keys, reads)
    if input_key is not None:
        return ExampleForm((input_key,), input_key, output_key, keys, reads)
    named = plan.chain.get_input_jsonschema().get("properties") or {}
    variables = [name for p in plan.predictors.values() for name in p.adapter.variables]
    return ExampleForm(tuple(named or dict.fromkeys(variables)), None, output_key, keys, reads)


def infer_labels(examples: Sequence[dspy.Example], name: str = OUTPUT) -> list[str] | None:
    """The answers in a field, where they are a handful of texts that repeat; ``None`` where they are not."""
    outputs = [example.get(name) for example in examples]
    if not outputs or not all(isinstance(output, str) for output in outputs):
        return None
    counts = Counter(outputs)
    repeated = all(count >= EXAMPLES_PER_LABEL for count in counts.values())
    return sorted(counts) if 2 <= len(counts) <= MAX_LABELS and repeated else None


def warn_of_unwritable(plan: ChainPlan, examples: Sequence[dspy.Example]) -> None:
    """Say how many examples cannot become demos: the chain would not read their output back, or it is not a prompt's answer."""
    if not plan.output_keys and any(OUTPUT in example for example in examples):
        logger.warning(
            "The examples' outputs are not the answers of the chain's last prompt: %s. So demos come from runs alone, and "
            "are not chosen per label.",
            AFTER_THE_LAST,
        )
    for key in plan.output_keys:
        name = output_field(key)
        refused = [
            _unreadable(plan, example[name], name) if name in example else f"no output {key!r}"
            for example in examples
            if name in example or (key is not None and OUTPUT in example)
        ]
        reasons = [reason for reason in refused if reason is not None]
        if reasons:
            logger.warning("%d of %d examples cannot be demos: %s", len(reasons), len(examples), reasons[0])


def _unreadable(plan: ChainPlan, output: Any, name: str = OUTPUT) -> str | None:
    """Why the prompt that answers the field ``name`` could not have given ``output``; ``None`` where it could."""
    last = next((p for p in plan.predictors.values() if name in p.signature.output_fields), None)
    if last is None:
        return None
    try:
        answer_messages(last.adapter.slots.parser, output)
    except ExportError as error:
        return str(error)
    return None


def _outputs(outputs: Any) -> dict[str, Any]:
    if outputs is None:
        return {}
    return dict(outputs) if isinstance(outputs, Mapping) else {OUTPUT: outputs}


def _names(item: Any) -> list[str]:
    return list(item.keys()) if hasattr(item, "keys") else [type(item).__name__]
