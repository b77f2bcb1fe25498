"""The prompt format of a chain's predictor: the chain's own template, its own parser, literal demos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import dspy
from dspy.utils.exceptions import AdapterParseError
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.messages.tool import tool_call

from langchain_asyndbt.answers import answer_messages, as_shown, parse
from langchain_asyndbt.messages import to_openai
from langchain_asyndbt.templates import PromptSlots, same_instructions
from langchain_asyndbt.worker_lm import ChainCall, chain_call

whole_answers: ContextVar[list[Any] | None] = ContextVar("langchain_asyndbt_whole_answers", default=None)
"""Where set, takes what the parser gave: the steps behind it get whole messages, of which the predictor's field holds less."""


class TemplateAdapter(dspy.Adapter):
    """Renders a chain's prompt for one predictor and reads the answer with the chain's parser.

    Args:
        slots: The prompt.
        parser: What reads the answers of the model that is asked.
        variables: Name of each input field -> template variable.
        output: Name of the output field.
        written: The predictor's instructions as DSPy was given them; other ones replace the prompt's text.
    """

    def __init__(
        self, slots: PromptSlots, parser: Any, variables: Mapping[str, str], output: str, written: str
    ) -> None:
        super().__init__(use_native_function_calling=True)
        self.slots = slots
        self._parser = parser
        self._variables = dict(variables)
        self._output = output
        self._written = written

    @property
    def variables(self) -> list[str]:
        """The template's variables that callers give."""
        return list(self._variables.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> TemplateAdapter:
        return self

    def prompt(self, instructions: str, demos: Sequence[Mapping[str, Any]]) -> Any:
        """The chain's prompt with a predictor's instructions and demos.

        Raises:
            ExportError: a demo cannot be written.
        """
        shown = [demo for demo in demos if self._output in demo and self._complete(demo)]
        return self.slots.filled(
            self._new_text(instructions), [(self.by_variable(demo), demo[self._output]) for demo in shown]
        )

    def lacking(self, instructions: str) -> list[str]:
        """The template's variables that instructions leave out."""
        text = self._new_text(instructions)
        return [] if text is None else self.slots.lacking(text)

    def by_variable(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Values of input fields under the names of the template's variables."""
        return {variable: fields[name] for name, variable in self._variables.items() if name in fields}

    def format(self, signature: Any, demos: list[Any], inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """OpenAI-style messages of the chain's prompt."""
        messages = self._rendered(signature.instructions, demos, inputs)
        call = chain_call.get()
        if call is not None:
            call.messages = messages
        return to_openai(messages)

    def format_demos(self, signature: Any, demos: list[Any]) -> list[dict[str, Any]]:
        """OpenAI-style messages of the demos alone."""
        found: list[BaseMessage] = []
        for demo in demos:
            if self._output in demo and self._complete(demo):
                found += answer_messages(self.slots.parser, demo[self._output])
        return [
            {"inputs": [self.by_variable(demo) for demo in demos]},
            *(to_openai(found) if found else []),
        ]

    def __call__(
        self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any
    ) -> list[dict[str, Any]]:
        token = chain_call.set(ChainCall([]))
        try:
            return super().__call__(lm, lm_kwargs, signature, demos, inputs)
        finally:
            chain_call.reset(token)

    async def acall(
        self, lm: Any, lm_kwargs: Any, signature: Any, demos: Any, inputs: Any
    ) -> list[dict[str, Any]]:
        token = chain_call.set(ChainCall([]))
        try:
            return await super().acall(lm, lm_kwargs, signature, demos, inputs)
        finally:
            chain_call.reset(token)

    # DSPy hands text alone to `parse`; the chain's parser needs the whole message, tool calls included.
    # test_chain_program.py fails if DSPy moves this hook.
    def _call_postprocess(
        self, processed_signature: Any, original_signature: Any, outputs: list[Any], lm: Any, lm_kwargs: Any
    ) -> list[dict[str, Any]]:
        call = chain_call.get()
        own = call.answer if call is not None and len(outputs) == 1 else None
        parsed = [self._parsed(own if own is not None else _message(o), o) for o in outputs]
        whole = whole_answers.get()
        if whole is not None:
            whole[:] = parsed
        return [{self._output: as_shown(value)} for value in parsed]

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        """The chain's reading of a text."""
        return {self._output: self._parsed(AIMessage(content=completion), completion)}

    def _parsed(self, message: Any, output: Any) -> Any:
        try:
            return parse(self._parser, message)
        except (OutputParserException, ValueError) as error:
            raise AdapterParseError(
                adapter_name="TemplateAdapter",
                signature=dspy.Signature(f"input -> {self._output}"),
                lm_response=str(output),
                message=f"the chain's parser refused the answer: {error}",
            ) from error

    def _rendered(
        self, instructions: str, demos: Sequence[Any], inputs: Mapping[str, Any]
    ) -> list[BaseMessage]:
        prompt = self.prompt(instructions, [dict(demo) for demo in demos])
        messages: list[BaseMessage] = prompt.invoke(self.by_variable(inputs)).to_messages()
        return messages

    def _new_text(self, instructions: str) -> str | None:
        """The text for the prompt, ``None`` where the instructions are those it was written with."""
        if same_instructions(instructions, self._written):
            return None
        written = self._written.strip()
        if not self.slots.instructions.strip() and instructions.startswith(written):
            # The prompt has no system text; what DSPy was given instead is no part of it.
            return instructions[len(written) :].strip() or None
        return instructions

    def _complete(self, demo: Mapping[str, Any]) -> bool:
        required = set(self.slots.prompt.input_variables)
        return required <= set(self.by_variable(demo))


def _message(output: Any) -> AIMessage:
    """The model's message as DSPy reports it."""
    if not isinstance(output, Mapping):
        return AIMessage(content=output or "")
    calls = []
    for call in output.get("tool_calls") or []:
        calls.append(_tool_call(call))
    return AIMessage(content=output.get("text") or "", tool_calls=calls)


def _tool_call(call: Any) -> Any:
    import json

    function = call["function"] if isinstance(call, Mapping) else call.function
    name = function["name"] if isinstance(function, Mapping) else function.name
    arguments = function["arguments"] if isinstance(function, Mapping) else function.arguments
    identity = call.get("id") if isinstance(call, Mapping) else call.id
    return tool_call(name=name, args=json.loads(arguments or "{}"), id=identity or "call_0")
