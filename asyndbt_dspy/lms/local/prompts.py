"""From a request to the token ids of its prompt.

The text is what the tokenizer's chat template makes of the messages; base models get a plain "Input / Output" layout.
Everything before the last turn is the same for all requests of one candidate, so its tokens are remembered.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from dspy.lm15 import DataPart, Request, TextPart, ThinkingPart, UnsupportedFeatureError

REMEMBERED_TEXTS = 1024
# Stands for a content in a template: comes out as it went in only where the template neither trims nor escapes.
_MARK = "\n \ue000&'\"{{ }}\ue001 \n"


@dataclass(frozen=True)
class _Frame:
    """What a template puts around the content of the last message.

    A template may look at a content for tags (`<think>`, `<tool_response>`): one that holds a "<" is rendered whole.

    Attributes:
        before: Text of the messages before the last.
        opening, closing: What comes before and after the content; ``opening`` is None where the template does not
            take contents as they are.
    """

    before: str
    opening: str | None
    closing: str


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt.

    Attributes:
        ids: Token ids.
        last_turn: Index of the first token of the last turn; what is before is likely shared with other requests.
        indented: Whether the latest assistant message is a JSON object with one field a line.
    """

    ids: list[int]
    last_turn: int
    indented: bool


class PromptEncoder:
    """Renders and tokenizes prompts; safe to call from several threads.

    Args:
        tokenizer: A fast tokenizer of transformers.
        plain: Use the plain layout even where the tokenizer has a chat template.
    """

    # Where a base model that was shown "Input / Output" turns would go on to invent the next input.
    PLAIN_STOPS = ("\n\nInput:", "\nInput:")

    def __init__(self, tokenizer: Any, *, plain: bool) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self.plain = plain or not tokenizer.chat_template
        self._beginning: list[int] = (
            list(tokenizer("", add_special_tokens=True).input_ids) if self.plain else []
        )
        self._special = tuple(
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        self._remembered: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._frames: OrderedDict[tuple[str, ...], _Frame] = OrderedDict()
        self._lock = Lock()

    def encode(self, request: Request) -> Prompt:
        """The prompt of a request.

        Raises:
            UnsupportedFeatureError: A message holds something other than text.
        """
        messages = request_messages(request)
        indented = _last_answer_is_indented(messages)
        if self.plain:
            before = [*self._beginning]
            turns = _plain_turns(messages)
            for turn in turns[:-1]:
                before += self._ids(turn)
            return Prompt(before + self._encode(turns[-1]), len(before), indented)
        frame = self._frame(messages)
        content = messages[-1]["content"]
        if frame.opening is not None and "<" not in content:
            last, closing = frame.opening + content, frame.closing
        else:
            text = self._render(messages, True)
            if not text.startswith(frame.before):
                return Prompt(self._encode(text), 0, indented)
            last, closing = text[len(frame.before) :], ""
        # Tokenizing in two parts equals tokenizing the whole only where a special token starts the second.
        if not closing.startswith(self._special):
            last, closing = last + closing, ""
        if not last.startswith(self._special):
            return Prompt(self._encode(frame.before + last + closing), 0, indented)
        beginning = self._ids(frame.before)
        return Prompt([*beginning, *self._encode(last), *self._ids(closing)], len(beginning), indented)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text without special tokens at its ends."""
        return self._encode(text)

    def encode_with_ends(self, text: str) -> list[tuple[int, int]]:
        """(token id, index of its first character) of a text."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return [(token, start) for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)]

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _ids(self, text: str) -> tuple[int, ...]:
        with self._lock:
            known = self._remembered.get(text)
            if known is not None:
                self._remembered.move_to_end(text)
                return known
        ids = tuple(self._encode(text))
        with self._lock:
            self._remembered[text] = ids
            while len(self._remembered) > REMEMBERED_TEXTS:
                self._remembered.popitem(last=False)
        return ids

    def _frame(self, messages: Sequence[dict[str, str]]) -> _Frame:
        """What the template makes of everything but the last message's content; rendered once per beginning."""
        key = tuple(message[part] for message in messages[:-1] for part in ("role", "content"))
        key = (*key, messages[-1]["role"])
        with self._lock:
            known = self._frames.get(key)
            if known is not None:
                self._frames.move_to_end(key)
                return known
        before = self._render_beginning(messages[:-1])
        marked = self._render([*messages[:-1], {**messages[-1], "content": _MARK}], True)
        opening, found, closing = marked.partition(_MARK)
        if found and opening.startswith(before) and _MARK not in closing:
            frame = _Frame(before, opening[len(before) :], closing)
        else:
            frame = _Frame(before, None, "")
        with self._lock:
            self._frames[key] = frame
            while len(self._frames) > REMEMBERED_TEXTS:
                self._frames.popitem(last=False)
        return frame

    def _render_beginning(self, messages: Sequence[dict[str, str]]) -> str:
        if not messages:
            return ""
        if len(messages) == 1 and messages[0]["role"] == "system":
            # Some templates refuse a system message, or one without a turn after it.
            try:
                return self._render(messages, False)
            except Exception as error:
                if type(error).__name__ != "TemplateError":
                    raise
                return ""
        return self._render(messages, False)

    def _render(self, messages: Sequence[dict[str, str]], generation: bool) -> str:
        template: Callable[..., Any] = self._tokenizer.apply_chat_template
        try:
            text: str = template(list(messages), tokenize=False, add_generation_prompt=generation)
        except Exception as error:
            merged = _system_merged(messages)
            if merged is None or type(error).__name__ != "TemplateError":
                raise
            # Some templates refuse a system message; what it says then opens the first user turn.
            text = template(merged, tokenize=False, add_generation_prompt=generation)
        return text


def request_messages(request: Request) -> list[dict[str, str]]:
    """The messages of a request as role and text."""
    messages: list[dict[str, str]] = []
    if request.system is not None:
        system = request.system if isinstance(request.system, str) else _text_of(request.system)
        messages.append({"role": "system", "content": system})
    for message in request.messages:
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": _text_of(message.parts)})
    return messages


def _text_of(parts: Sequence[Any]) -> str:
    texts: list[str] = []
    for part in parts:
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, DataPart):
            texts.append(json.dumps(part.value, ensure_ascii=False))
        elif not isinstance(part, ThinkingPart):
            raise UnsupportedFeatureError(
                f"the local engine reads text only, the request holds a part of type {part.type!r}",
                feature=f"messages.{part.type}",
            )
    return "".join(texts)


def _plain_turns(messages: Sequence[dict[str, str]]) -> list[str]:
    turns: list[str] = []
    for message in messages:
        if message["role"] == "system" or message["role"] == "assistant":
            turns.append(message["content"] + "\n\n")
        else:
            turns.append(f"Input:\n{message['content']}\nOutput:\n")
    return turns


def _system_merged(messages: Sequence[dict[str, str]]) -> list[dict[str, str]] | None:
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
    return [first, *messages[2:]]


def _last_answer_is_indented(messages: Sequence[dict[str, str]]) -> bool:
    for message in reversed(messages):
        if message["role"] == "assistant":
            return message["content"].startswith("{\n")
    return False
