"""How many tokens a request can take at most, known before it is sent and without the model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dspy.lm15 import Request, Response

MEDIA_TOKENS = 65_536
"""Taken for an image, a sound or a document: more than any provider bills for one today."""
UNKNOWN_COMPLETION_TOKENS = 16_384
"""Taken for the answer of an LM without ``max_tokens``. No bound: caps on tokens and dollars refuse such an LM."""
_MESSAGE_TOKENS = 16
_REQUEST_TOKENS = 128
"""Marks of the chat template, and the system prompt that some templates add of their own."""
_BYTES_PER_TOKEN = 4
_GUESSED_MESSAGE_TOKENS = 4
_GUESSED_MEDIA_TOKENS = MEDIA_TOKENS // 64


def worst_prompt_tokens(request: Request) -> int:
    """An upper bound: no tokenizer in use makes more tokens than the text has UTF-8 bytes."""
    texts, media, messages = _parts_of(request)
    return (
        sum(len(text.encode()) for text in texts)
        + MEDIA_TOKENS * media
        + _MESSAGE_TOKENS * messages
        + _REQUEST_TOKENS
    )


def worst_completion_tokens(request: Request) -> int:
    """``max_tokens`` of the request."""
    return request.config.max_tokens or UNKNOWN_COMPLETION_TOKENS


def likely_tokens(request: Request) -> int:
    """What a provider counts against a limit per minute when the request comes in: a guess, made good afterwards."""
    texts, media, messages = _parts_of(request)
    return _guessed_prompt(texts, media, messages) + min(request.config.max_tokens or 256, 4096)


def guessed_tokens(request: Request, response: Response) -> tuple[int, int]:
    """Prompt and completion of an answer whose provider does not say what it took: four bytes a token. No bound: thinking
    that is not shown is not in it."""
    prompt = _guessed_prompt(*_parts_of(request))
    answer, _ = _read(response.message.parts)
    completion = min(max(1, _guess(answer)), worst_completion_tokens(request))
    return min(prompt, worst_prompt_tokens(request)), completion


def _guessed_prompt(texts: Iterable[str], media: int, messages: int) -> int:
    return _guess(texts) + _GUESSED_MEDIA_TOKENS * media + _GUESSED_MESSAGE_TOKENS * messages


def _guess(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts) // _BYTES_PER_TOKEN


def _parts_of(request: Request) -> tuple[list[str], int, int]:
    """(texts, parts that are no text, messages)."""
    texts: list[str] = []
    media = 0
    for parts in (request.system, *(message.parts for message in request.messages)):
        found, others = _read(parts)
        texts += found
        media += others
    texts += [repr(tool) for tool in request.tools]
    if request.config.response_format is not None:
        texts.append(repr(request.config.response_format))
    return texts, media, len(request.messages) + 1


def _read(parts: str | Iterable[Any] | None) -> tuple[list[str], int]:
    if parts is None:
        return [], 0
    if isinstance(parts, str):
        return [parts], 0
    texts, media = [], 0
    for part in parts:
        text = getattr(part, "text", None)
        if isinstance(text, str):
            texts.append(text)
        elif getattr(part, "type", "") in ("image", "audio", "video", "document", "binary"):
            media += 1
        else:
            texts.append(repr(part))  # tool calls and their results
    return texts, media
