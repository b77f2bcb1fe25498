"""A LangChain prompt as instructions, demos and the rest; and the prompt with other instructions and demos.

The instructions are the text of the first system message. What comes back is a prompt of the same class with the
same variables; demos are literal messages, because LangChain's few-shot templates cannot be serialized.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    convert_to_messages,
)
from langchain_core.prompts import (
    AIMessagePromptTemplate,
    BasePromptTemplate,
    ChatPromptTemplate,
    FewShotChatMessagePromptTemplate,
    MessagesPlaceholder,
    PromptTemplate,
    SystemMessagePromptTemplate,
)
from langchain_core.runnables import Runnable

from asyndbt_dspy.errors import ExportError
from langchain_asyndbt.answers import answer_messages, as_message
from langchain_asyndbt.messages import text_of
from langchain_asyndbt.template_text import SEPARATOR, escaped, lacking_variables, with_text


@dataclass(frozen=True)
class Place:
    """Where the instructions are.

    Attributes:
        message: Index of the message, ``None`` where the prompt has no system message.
        block: Index of the text block inside it, ``None`` where its content is one text.
        literal: Whether the text is literal, without variables.
    """

    message: int | None = None
    block: int | None = None
    literal: bool = True


def check_supported(prompt: BasePromptTemplate[Any]) -> None:
    """Refuse prompts that cannot take instructions and demos.

    Raises:
        ExportError: names the class.
    """
    if not isinstance(prompt, ChatPromptTemplate | PromptTemplate):
        raise ExportError(
            f"a {type(prompt).__name__} cannot take demos; write it as a ChatPromptTemplate or PromptTemplate"
        )


def instructions_of(prompt: BasePromptTemplate[Any]) -> tuple[str, Place]:
    """The raw text of the instructions and their place; empty where the prompt has no system message."""
    if not isinstance(prompt, ChatPromptTemplate):
        return "", Place()
    for index, message in enumerate(prompt.messages):
        if isinstance(message, SystemMessage):
            return text_of(message), Place(index)
        if isinstance(message, SystemMessagePromptTemplate):
            inner = message.prompt
            if isinstance(inner, PromptTemplate):
                return inner.template, Place(index, literal=False)
            blocks = inner if isinstance(inner, list) else []
            for number, block in enumerate(blocks):
                if isinstance(block, PromptTemplate):
                    return block.template, Place(index, number, literal=False)
    return "", Place()


def variables_of(prompt: BasePromptTemplate[Any]) -> tuple[list[str], list[str]]:
    """(required, optional) variables of the caller; those that the prompt itself fills in are not among them."""
    required = [name for name in prompt.input_variables if name not in prompt.partial_variables]
    return required, list(prompt.optional_variables)


@dataclass(frozen=True)
class PromptSlots:
    """A prompt with places for instructions and demos.

    Attributes:
        prompt: The chain's own prompt, never changed.
        parser: The chain's parser after the model, for writing demos.
        instructions: Raw text of its instructions.
        place: Where they are.
    """

    prompt: BasePromptTemplate[Any]
    parser: Runnable[Any, Any] | None
    instructions: str
    place: Place

    @classmethod
    def of(cls, prompt: BasePromptTemplate[Any], parser: Runnable[Any, Any] | None) -> PromptSlots:
        """The slots of a chain's prompt.

        Raises:
            ExportError: the prompt is of a class that cannot take demos.
        """
        check_supported(prompt)
        text, place = instructions_of(prompt)
        return cls(prompt, parser, text, place)

    def filled(
        self, instructions: str | None, demos: Sequence[tuple[Mapping[str, Any], Any]]
    ) -> BasePromptTemplate[Any]:
        """The prompt with other instructions and with demos.

        Args:
            instructions: ``None`` leaves them as they are. Braces in them that hold none of the text's variables
                are literal; variables that they lack are named after them.
            demos: (inputs by variable, output) each.

        Raises:
            ExportError: a demo cannot be written.
        """
        prompt = self.prompt
        if isinstance(prompt, PromptTemplate):
            return self._filled_text(prompt, instructions, demos)
        assert isinstance(prompt, ChatPromptTemplate)
        messages = list(prompt.messages)
        start = turn_start(prompt)
        turn = messages[start:]
        if instructions is not None:
            messages = self._with_instructions(messages, instructions)
            start += len(messages) - len(prompt.messages)
        messages[start:start] = [
            m for inputs, output in demos for m in self._demo(prompt, turn, inputs, output)
        ]
        return prompt.model_copy(update={"messages": messages})

    def lacking(self, instructions: str) -> list[str]:
        """Variables of the prompt's own instructions that ``instructions`` would lose."""
        template = self._template
        return [] if template is None else lacking_variables(template, instructions)

    @property
    def _template(self) -> PromptTemplate | None:
        """The template of the instructions, ``None`` where they are literal."""
        if self.place.literal:
            return None
        assert isinstance(self.prompt, ChatPromptTemplate)
        template = self.prompt.messages[self.place.message].prompt
        return template if self.place.block is None else template[self.place.block]

    def _with_instructions(self, messages: list[Any], text: str) -> list[Any]:
        place = self.place
        if place.message is None:
            return [SystemMessage(content=text), *messages]
        message = messages[place.message]
        if place.literal:
            messages[place.message] = message.model_copy(update={"content": text})
            return messages
        if place.block is None:
            prompt: Any = with_text(message.prompt, text)
        else:
            prompt = list(message.prompt)
            prompt[place.block] = with_text(prompt[place.block], text)
        messages[place.message] = message.model_copy(update={"prompt": prompt})
        return messages

    def _demo(
        self, prompt: ChatPromptTemplate, turn: Sequence[Any], inputs: Mapping[str, Any], output: Any
    ) -> list[BaseMessage]:
        answers = answer_messages(self.parser, output)
        if not any(_has_variables(message) for message in turn):
            # All variables are in the system text, which is not repeated: the demo names their values.
            lines = (f"{name}: {value}" for name, value in inputs.items())
            return [HumanMessage(content="\n".join(lines)), *answers]
        shown = [
            message
            for message in turn
            if not isinstance(message, SystemMessage | SystemMessagePromptTemplate)
        ]
        rendered = prompt.model_copy(update={"messages": shown}).format_messages(**readable(inputs))
        if isinstance(rendered[-1], AIMessage) and isinstance(answers[0], AIMessage):
            # The prompt begins the answer, and the model goes on: the demo shows both as one message.
            begun = rendered.pop()
            whole = text_of(begun) + text_of(answers[0])
            answers[0] = answers[0].model_copy(update={"content": whole})
        return [*rendered, *answers]

    def _filled_text(
        self,
        prompt: PromptTemplate,
        instructions: str | None,
        demos: Sequence[tuple[Mapping[str, Any], Any]],
    ) -> PromptTemplate:
        if prompt.template_format != "f-string":
            raise ExportError(f"a text prompt must be an f-string template, not {prompt.template_format}")
        parts = [] if instructions is None else [escaped(instructions)]
        for inputs, output in demos:
            asked = prompt.format(**readable(inputs))
            answer = text_of(answer_messages(self.parser, output)[0])
            gap = "" if asked[-1:].isspace() else " "
            parts.append(escaped(f"{asked}{gap}{answer}"))
        return prompt.model_copy(update={"template": SEPARATOR.join([*parts, prompt.template])})


def turn_start(prompt: ChatPromptTemplate) -> int:
    """Where the caller's turn begins: at the first message with variables that is no system text and no example."""
    for index, message in enumerate(prompt.messages):
        is_example = isinstance(message, FewShotChatMessagePromptTemplate)
        is_system = isinstance(message, SystemMessagePromptTemplate | SystemMessage)
        if _has_variables(message) and not is_example and not is_system:
            return index
    after = 0
    for index, message in enumerate(prompt.messages):
        if isinstance(
            message, SystemMessagePromptTemplate | SystemMessage | AIMessage | AIMessagePromptTemplate
        ):
            after = index + 1
    return after


def readable(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a demo in which messages may have been written as JSON."""
    found = {}
    for name, value in inputs.items():
        if isinstance(value, list):
            items = [as_message(item) for item in value]
            found[name] = (
                convert_to_messages(items) if any(isinstance(i, BaseMessage) for i in items) else items
            )
        else:
            found[name] = as_message(value)
    return found


def same_instructions(text: str, other: str) -> bool:
    """Whether DSPy would take both for one text: its signatures remove common indentation and outer blank lines."""
    return inspect.cleandoc(text) == inspect.cleandoc(other)


def _has_variables(message: Any) -> bool:
    return isinstance(message, MessagesPlaceholder) or bool(getattr(message, "input_variables", None))
