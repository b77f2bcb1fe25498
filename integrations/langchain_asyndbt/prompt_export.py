"""``to_prompt``: a DSPy predictor as a ``ChatPromptTemplate`` that sends what DSPy's adapter would send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dspy
from dspy import lm15
from dspy.utils.exceptions import AdapterParseError
from langchain_core.exceptions import OutputParserException
from langchain_core.load import loads
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import BaseOutputParser
from langchain_core.prompts import ChatPromptTemplate, HumanMessagePromptTemplate, PromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import ConfigDict

from asyndbt_dspy.deploy import PredictorPrompt, export_prompt, find_predictor, format_inputs
from asyndbt_dspy.errors import ExportError
from langchain_asyndbt.messages import response_format as openai_response_format
from langchain_asyndbt.template_text import escaped

LITERAL: Mapping[str, type[BaseMessage]] = {
    "system": SystemMessage,
    "user": HumanMessage,
    "assistant": AIMessage,
}
PROMPT_CLASSES = (
    ChatPromptTemplate,
    HumanMessagePromptTemplate,
    PromptTemplate,
    SystemMessage,
    HumanMessage,
    AIMessage,
)
"""All that an exported prompt is made of: nothing else is read back by ``load_prompt``."""


def to_prompt(
    program: dspy.Module, predictor: str | None = None, *, adapter: dspy.Adapter | None = None
) -> ChatPromptTemplate:
    """The prompt of one predictor, with its instructions and demos: no DSPy is needed to send it.

    It is serializable (``langchain_core.load.dumps``; ``load_prompt`` reads it back). Its variables are texts:
    values of other types go through ``prompt_inputs`` first. Inputs with a default may be left out.

    Args:
        program: Not changed.
        predictor: Name in ``named_predictors()``; may be left out where there is only one.
        adapter: ``ChatAdapter``, ``JSONAdapter`` or ``XMLAdapter``; default: the one of ``dspy.settings``.

    Raises:
        ExportError: what a fixed prompt cannot express, with the reason.
    """
    prompt = export_prompt(program, predictor, adapter=adapter)
    if prompt.role != "user":
        raise ExportError(
            f"the last message is of role {prompt.role!r}; inputs can only be in a user message"
        )
    if "self" in prompt.inputs:
        raise ExportError(
            "a ChatPromptTemplate takes its variables as keyword arguments, so none can be called 'self'; rename the input"
        )
    literal = [LITERAL[role](content=content) for role, content in prompt.literal]
    last = HumanMessagePromptTemplate.from_template(_template(prompt))
    return ChatPromptTemplate([*literal, last], partial_variables=dict(prompt.defaults))


def load_prompt(text: str) -> ChatPromptTemplate:
    """A prompt from what ``langchain_core.load.dumps`` wrote of an exported one.

    Raises:
        ValueError: it holds objects of other classes than an exported prompt does.
    """
    loaded = loads(text, allowed_objects=list(PROMPT_CLASSES))
    if not isinstance(loaded, ChatPromptTemplate):
        raise ExportError(f"expected a ChatPromptTemplate, found a {type(loaded).__name__}")
    return loaded


def prompt_inputs(
    program: dspy.Module, predictor: str | None = None
) -> Runnable[dict[str, Any], dict[str, str]]:
    """Writes input values as DSPy does; goes before the prompt where values are not all texts."""
    _, predict = find_predictor(program, predictor)
    signature = predict.signature

    def write(values: dict[str, Any]) -> dict[str, str]:
        return format_inputs(signature, values)

    return RunnableLambda(write, name="write_inputs")


class DSPyOutputParser(BaseOutputParser[dict[str, Any]]):
    """Reads a model's answer with a DSPy adapter: output field -> value.

    Attributes:
        signature: Of the predictor.
        adapter: The one that the prompt was exported with.
    """

    signature: Any
    adapter: Any

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def parse(self, text: str) -> dict[str, Any]:
        """The output fields in ``text``.

        Raises:
            OutputParserException: a field is missing or of another type.
        """
        try:
            fields: dict[str, Any] = self.adapter.parse(self.signature, text)
        except AdapterParseError as error:
            raise OutputParserException(str(error), llm_output=text) from error
        return fields

    @property
    def _type(self) -> str:
        return "dspy"


def to_parser(
    program: dspy.Module, predictor: str | None = None, *, adapter: dspy.Adapter | None = None
) -> DSPyOutputParser:
    """The parser for ``to_prompt(program, predictor, adapter=adapter) | model``."""
    _, predict = find_predictor(program, predictor)
    return DSPyOutputParser(
        signature=predict.signature, adapter=adapter or dspy.settings.adapter or dspy.ChatAdapter()
    )


def response_format(
    program: dspy.Module, predictor: str | None = None, *, adapter: dspy.Adapter | None = None
) -> dict[str, Any] | None:
    """OpenAI's ``response_format`` that DSPy sends beside the messages; ``None`` where it sends none.

    It is no part of a prompt: bind it to the model, ``model.bind(response_format=…)``.

    Raises:
        ExportError: the predictor has an input (``dspy.History``) that a fixed prompt cannot express.
    """
    name, predict = find_predictor(program, predictor)
    for field, info in predict.signature.input_fields.items():
        if info.annotation is dspy.History:
            raise ExportError(
                f"predictor {name!r}: field {field!r} is a History, which a fixed prompt cannot express"
            )
    engine = _Recorder()
    lm = dspy.LM("export/recorder", engine=engine, async_engine=None, cache=False, num_retries=0)
    used = adapter or dspy.settings.adapter or dspy.ChatAdapter()
    try:
        inputs = dict.fromkeys(predict.signature.input_fields, "")
        used(lm, {}, signature=predict.signature, demos=[], inputs=inputs)
    except Exception as error:
        # An adapter may raise anything on inputs that are no real ones; what it sent counts all the same.
        if engine.request is None:
            raise ExportError(
                f"{type(used).__name__} sends nothing for this predictor: {type(error).__name__}: {error}"
            ) from error
    return openai_response_format(engine.request.config.response_format) if engine.request else None


class _Recorder:
    """An engine that takes everything and answers nothing: it shows what DSPy sends."""

    supports_response_schema = True
    supported_params = frozenset({"response_format"})

    def __init__(self) -> None:
        self.request: lm15.Request | None = None

    def complete(self, request: lm15.Request) -> lm15.Response:
        """Keep the request."""
        self.request = self.request or request
        raise lm15.InvalidRequestError("nothing is asked here")


def _template(prompt: PredictorPrompt) -> str:
    return "".join(escaped(part) if isinstance(part, str) else f"{{{part.field}}}" for part in prompt.last)
