"""Grammars for free parts of an answer, with llguidance."""

from __future__ import annotations

import json
from threading import Lock
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
from dspy.lm15 import InvalidRequestError

from asyndbt_dspy.lms.local.answers import Free

# One layout for all white space in an answer, the one of json.dumps.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarFactory:
    """Makes matchers for one tokenizer; the tokenizer's trie is built on first use, since it takes a moment.

    Args:
        tokenizer: A fast tokenizer of transformers.
        vocabulary: Number of logits of the model.
        ends: Token ids that end a turn.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._ends = ends
        self._ll_tokenizer: Any = None
        self._lock = Lock()

    @property
    def ll_tokenizer(self) -> Any:
        """llguidance's view of the tokenizer."""
        with self._lock:
            if self._ll_tokenizer is None:
                size = max(self._vocabulary, len(self._tokenizer))
                self._ll_tokenizer = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=size, eos_token=self._ends
                )
            return self._ll_tokenizer

    def compile(self, part: Free) -> Any:
        """A matcher at the beginning of `part`, to be copied for each answer.

        Raises:
            InvalidRequestError: The schema cannot be compiled.
        """
        grammar = lark_grammar(part)
        matcher = llguidance.LLMatcher(self.ll_tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequestError(
                f"the response schema cannot be turned into a grammar: {matcher.get_error()}; "
                f"schema: {part.schema[:500]}"
            )
        return matcher

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for."""
        raw: bytes = self.ll_tokenizer.decode_bytes([token])
        return raw


def lark_grammar(part: Free) -> str:
    """The grammar `before value after` in llguidance's Lark dialect."""
    schema = json.loads(part.schema)
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": _LAYOUT}
    pieces = [json.dumps(part.before)] if part.before else []
    pieces.append("value")
    if part.after:
        pieces.append(json.dumps(part.after))
    return f"start: {' '.join(pieces)}\nvalue: %json {json.dumps(schema)}\n"


def allowed_tokens(matcher: Any, vocabulary: int) -> np.ndarray:
    """[vocabulary] booleans: which tokens may come next.

    Raises:
        InvalidRequestError: The matcher failed (a schema whose grammar grows beyond llguidance's limits).
    """
    words = -(-vocabulary // 32)
    mask = llguidance.numpy.allocate_token_bitmask(1, words * 32)
    llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
    if matcher.is_error():
        raise InvalidRequestError(f"the response schema's grammar failed: {matcher.get_error()}")
    bits = np.unpackbits(mask.view(np.uint8).reshape(-1), bitorder="little")
    return bits[:vocabulary].astype(bool)
