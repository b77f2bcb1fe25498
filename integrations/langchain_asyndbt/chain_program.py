"""A LangChain chain as a ``dspy.Module``: each prompt is a predictor, everything else runs as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import dspy
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnablePassthrough
from langchain_core.runnables.base import RunnableBindingBase
from langchain_core.utils.function_calling import convert_to_openai_tool

from asyndbt_dspy.errors import ConfigurationError, ExportError
from langchain_asyndbt.chain_adapter import TemplateAdapter, whole_answers
from langchain_asyndbt.chain_walk import ModelSite, PromptSite, replace
from langchain_asyndbt.fields import OUTPUT, field_name, output_field
from langchain_asyndbt.messages import openai_tool_choice
from langchain_asyndbt.templates import PromptSlots, instructions_of, variables_of
from langchain_asyndbt.tracing import child_config
from langchain_asyndbt.worker_lm import base_model, langchain_lm

PORTABLE = ("stop", "temperature", "max_tokens", "top_p", "seed", "tools", "tool_choice", "response_format")
"""Bound settings of a chain's model that another LM is given too."""

AMBIENT_SETTING = "langchain_ambient_lm"
"""Key in ``dspy.settings``: the LM that was configured around an optimization, which is not for its chain."""
METER_SETTING = "asyndbt_meter"
"""Key in ``dspy.settings``: AsynDBT's ``lm -> lm``, by which the calls of a chain's own models count against its budget."""

AFTER_THE_LAST = "a step after it may change them (a function, a parser that is one, include_raw=True)"

current_program: ContextVar[ChainProgram | None] = ContextVar("langchain_asyndbt_program", default=None)


@dataclass(frozen=True)
class PromptPredictor:
    """What a predictor stands for in its chain.

    Attributes:
        name: Attribute of the program.
        signature: Its fields are the prompt's variables.
        adapters: Render the prompt and read the answer, one per model; they render alike.
        models: The models that it is sent to, with their parsers.
        lms: DSPy LMs that ask these models.
    """

    name: str
    signature: type[dspy.Signature]
    adapters: tuple[TemplateAdapter, ...]
    models: tuple[ModelSite, ...]
    lms: tuple[dspy.LM, ...]

    @property
    def adapter(self) -> TemplateAdapter:
        """The first of ``adapters``."""
        return self.adapters[0]


@dataclass
class ChainPlan:
    """The chain, its predictors, and the chain with calls of predictors in place of prompts and models.

    One plan is shared by all copies of a program: nothing in it changes after it was made.

    ``output_keys`` says where the chain's output holds what its last prompts give: ``None`` where it is the output itself, keys
    where it is a dictionary, nothing where steps follow that may change it.
    """

    chain: Runnable[Any, Any]
    predictors: dict[str, PromptPredictor] = field(default_factory=dict)
    runnable: Runnable[Any, Any] = field(default_factory=RunnablePassthrough)
    input_key: str | None = None
    output_keys: tuple[str | None, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> ChainPlan:
        return self


class ChainProgram(dspy.Module):
    """A chain that DSPy's optimizers can optimize. Made by ``to_program``.

    Its predictors are attributes, one per prompt of the chain. Without an LM of their own (and none in
    ``dspy.settings``) they ask the chain's own models.
    """

    def __init__(self, plan: ChainPlan) -> None:
        super().__init__()
        self.plan = plan
        for name, predictor in plan.predictors.items():
            setattr(self, name, dspy.Predict(predictor.signature))

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Run the chain on one example's inputs; the chain's output is the field ``output``."""
        token = current_program.set(self)
        try:
            return self._prediction(self.plan.runnable.invoke(self._chain_input(inputs), child_config()))
        finally:
            current_program.reset(token)

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """``forward`` on the event loop."""
        token = current_program.set(self)
        try:
            output = await self.plan.runnable.ainvoke(self._chain_input(inputs), child_config())
            return self._prediction(output)
        finally:
            current_program.reset(token)

    def asyndbt_own_models(self) -> list[dspy.LM]:
        """The chain's own models that are asked where no other LM answers: AsynDBT looks at them before it asks any."""
        return [
            lm
            for name, predictor in self.plan.predictors.items()
            if getattr(self, name).lm is None
            for lm in predictor.lms
        ]

    def to_chain(self) -> Runnable[Any, Any]:
        """The chain with this program's instructions and demos in its prompts.

        Raises:
            ExportError: a demo that cannot be written.
        """
        names = iter(self.plan.predictors)

        def visit(site: PromptSite) -> tuple[Runnable[Any, Any], Sequence[Sequence[Runnable[Any, Any]]]]:
            predictor = getattr(self, next(names))
            adapter = self.prompt_adapter_of(predictor)
            prompt = adapter.prompt(
                predictor.signature.instructions, [dict(demo) for demo in predictor.demos]
            )
            calls = [[c.model, c.parser] if c.parser is not None else [c.model] for c in site.calls]
            return prompt, calls

        return replace(self.plan.chain, visit)

    def prompt_adapter(self, predictor: str) -> TemplateAdapter:
        """The prompt format of a predictor, which the artifact's checks use."""
        return self.plan.predictors[predictor].adapter

    def prompt_adapter_of(self, predictor: dspy.Predict) -> TemplateAdapter:
        """``prompt_adapter`` by the predictor itself."""
        name = next(name for name, known in self.named_predictors() if known is predictor)
        return self.prompt_adapter(name)

    def _prediction(self, output: Any) -> dspy.Prediction:
        fields = {str(name): value for name, value in output.items()} if isinstance(output, Mapping) else {}
        answers = {output_field(key): fields[key] for key in self.plan.output_keys if key in fields}
        return dspy.Prediction({**fields, **answers, OUTPUT: output})

    def _chain_input(self, inputs: Mapping[str, Any]) -> Any:
        if self.plan.input_key is not None:
            return inputs[field_name(self.plan.input_key)]
        original = {field_name(v): v for p in self.plan.predictors.values() for v in _all_variables(p)}
        return {original.get(name, name): value for name, value in inputs.items()}


class PredictorCall(Runnable[Any, Any]):
    """In a program's chain: asks the current program's predictor instead of prompt, model and parser."""

    def __init__(self, predictor: PromptPredictor, number: int) -> None:
        self.name = predictor.name
        self._predictor = predictor
        self._number = number

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Ask the predictor."""
        return self._call_with_config(self._run, input, config)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """Ask the predictor on the event loop."""
        return await self._acall_with_config(self._arun, input, config)

    def _run(self, value: Any) -> Any:
        predict, fields, settings = self._prepared(value)
        with dspy.context(**settings), _whole_answer() as whole:
            return self._given(predict(**fields), whole)

    async def _arun(self, value: Any) -> Any:
        predict, fields, settings = self._prepared(value)
        with dspy.context(**settings), _whole_answer() as whole:
            return self._given(await predict.acall(**fields), whole)

    def _given(self, prediction: dspy.Prediction, whole: Sequence[Any]) -> Any:
        """What the next step gets: the message as the model gave it, else what the predictor says."""
        if whole and isinstance(whole[0], BaseMessage):
            return whole[0]
        return prediction[next(iter(self._predictor.signature.output_fields))]

    def _prepared(self, value: Any) -> tuple[dspy.Predict, dict[str, Any], dict[str, Any]]:
        program = current_program.get()
        if program is None:
            raise ConfigurationError(
                f"predictor {self.name!r} runs in a thread that does not know its program; threads must copy their "
                "caller's context (contextvars.copy_context), as LangChain's own do"
            )
        predict = getattr(program, self._predictor.name)
        fields = self._fields(value)
        meter = dspy.settings.get(METER_SETTING, None)  # an optimizer counts the chain's own calls too
        own = self._predictor.lms[self._number]
        ambient = dspy.settings.get(AMBIENT_SETTING, None)
        lm = predict.lm or (dspy.settings.lm if dspy.settings.lm is not ambient else None)
        lm = lm or (own if meter is None else meter(own))
        if lm.model != own.model:
            fields["config"] = bound_settings(self._predictor.models[self._number].model)
        return predict, fields, {"adapter": self._predictor.adapters[self._number], "lm": lm}

    def _fields(self, value: Any) -> dict[str, Any]:
        """Input fields of what the chain gives its prompt: a dictionary, or the value of the only variable."""
        variables = _all_variables(self._predictor)
        if not isinstance(value, Mapping):
            required = self._predictor.adapter.slots.prompt.input_variables
            if len(required) != 1:
                raise ConfigurationError(f"the prompt needs {sorted(required)}, got a {type(value).__name__}")
            value = {required[0]: value}
        return {field_name(name): value[name] for name in variables if name in value}


def to_program(
    chain: Runnable[Any, Any],
    *,
    labels: Sequence[str] | None = None,
    input_key: str | None = None,
) -> ChainProgram:
    """The chain as a DSPy program with one predictor per prompt.

    Args:
        chain: Composed of LangChain's runnables. Not changed.
        labels: The answers of the last prompt where they are an enumeration: demos are then chosen per label.
            They change neither prompt nor parsing. The chain's output must be this prompt's answer, or a dictionary with it.
        input_key: Where the chain's input is no dictionary: the example's field that is passed to it.

    Raises:
        ExportError: no prompt that is followed by a model, or one of a kind that cannot take demos.
        ConfigurationError: labels of no one prompt's answers.
    """
    keys = _output_keys(chain)
    if labels and len(keys) != 1:
        raise ConfigurationError(
            "labels are the answers of the chain's last prompt, but "
            + (f"the chain gives several prompts' answers, {list(keys)}" if keys else AFTER_THE_LAST)
            + "; leave labels out"
        )
    plan = ChainPlan(chain, input_key=input_key, output_keys=keys)

    def visit(site: PromptSite) -> tuple[Runnable[Any, Any], Sequence[Sequence[Runnable[Any, Any]]]]:
        name = "prompt" if not plan.predictors else f"prompt_{len(plan.predictors) + 1}"
        predictor = _predictor(name, site, labels if site.is_last else None)
        plan.predictors[name] = predictor
        return RunnablePassthrough(), [[PredictorCall(predictor, n)] for n in range(len(site.calls))]

    plan.runnable = replace(chain, visit)
    if not plan.predictors:
        raise ExportError(
            f"the chain ({type(chain).__name__}) has no prompt followed by a model; prompts inside functions "
            "(RunnableLambda) cannot be seen: compose them with |"
        )
    return ChainProgram(plan)


def _output_keys(chain: Runnable[Any, Any]) -> tuple[str | None, ...]:
    found: list[str | None] = []

    def visit(site: PromptSite) -> tuple[Runnable[Any, Any], Sequence[Sequence[Runnable[Any, Any]]]]:
        if site.is_last:
            found.append(site.key)
        return site.prompt, [[c.model, c.parser] if c.parser is not None else [c.model] for c in site.calls]

    replace(chain, visit)
    return tuple(dict.fromkeys(found))


def bound_settings(model: Any) -> dict[str, Any]:
    """Settings that a chain bound to its model, for another LM in its place.

    Raises:
        ExportError: tools in a form of one provider's own.
    """
    found: dict[str, Any] = {}
    while isinstance(model, RunnableBindingBase):
        for name, value in model.kwargs.items():
            if name in PORTABLE and value is not None:
                found.setdefault(name, value)
        model = model.bound
    if "tools" in found:
        try:
            found["tools"] = [convert_to_openai_tool(tool) for tool in found["tools"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ExportError(
                f"the chain's tools have no OpenAI form, so other LMs cannot take them: {error}"
            ) from error
    if "tool_choice" in found:
        found["tool_choice"] = openai_tool_choice(found["tool_choice"])
    return found


def _predictor(name: str, site: PromptSite, labels: Sequence[str] | None) -> PromptPredictor:
    slots = PromptSlots.of(site.prompt, site.calls[0].parser)
    required, optional = variables_of(site.prompt)
    variables = {field_name(variable): variable for variable in (*required, *optional)}
    output = output_field(site.key) if site.is_last else f"{name}_{OUTPUT}"
    annotation: Any = Literal[tuple(labels)] if labels else Any
    # A field that may be None may be left out, as an optional variable may.
    fields: dict[str, tuple[Any, Any]] = {
        item: (Any if variable in required else Any | None, dspy.InputField())
        for item, variable in variables.items()
    }
    fields[output] = (annotation, dspy.OutputField())
    text, _ = instructions_of(site.prompt)
    signature = dspy.Signature(fields, text) if text.strip() else dspy.Signature(fields)
    adapters = tuple(
        TemplateAdapter(slots, call.parser, variables, output, signature.instructions) for call in site.calls
    )
    lms = tuple(_own_lm(name, number, call.model) for number, call in enumerate(site.calls))
    return PromptPredictor(name, signature, adapters, site.calls, lms)


@contextmanager
def _whole_answer() -> Iterator[list[Any]]:
    whole: list[Any] = []
    token = whole_answers.set(whole)
    try:
        yield whole
    finally:
        whole_answers.reset(token)


def _own_lm(name: str, number: int, model: Any) -> dspy.LM:
    inner = base_model(model)
    # The string tells this LM from those that replace it; it is not a cache key, since the LM is not cached.
    return langchain_lm(model, model=f"langchain/{type(inner).__name__}:{name}:{number}")


def _all_variables(predictor: PromptPredictor) -> list[str]:
    required, optional = variables_of(predictor.adapter.slots.prompt)
    return [*required, *optional]
