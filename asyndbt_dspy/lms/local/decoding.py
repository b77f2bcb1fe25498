"""Decoding one answer, step by step, without touching the model.

`AnswerDecoder` says which tokens come next (`ask`) and takes what the pass found for them (`take_labels`,
`take_token`). The scheduler runs many of them side by side. `compile_answer` prepares what does not depend on the
request: tokens of forced text, tries of labels, grammars.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from asyndbt_dspy.lms.local.answers import AnswerPlan, Choice, Forced, Free, Segment, Unconstrained
from asyndbt_dspy.lms.local.grammar import GrammarFactory, allowed_tokens
from asyndbt_dspy.lms.local.prompts import PromptEncoder
from asyndbt_dspy.lms.local.sampling import Sampler
from asyndbt_dspy.lms.local.token_tree import LabelTrie, build_trie, label_log_probabilities

# Tokens kept back, per free part still to come, for closing a constrained answer before max_tokens cuts it; more
# where the forced text after the part is long, which then leaves this many for the part itself.
CLOSING_TOKENS = 8
CLOSING_PART_TOKENS = 4
# What leaves a part comes before what makes it longer: a digit may always follow a digit.
CLOSING_TEXTS = ('"', '"}', "}", "]", '"]', ",", ":", '":', "0", "null", "true", ' "')


@dataclass(frozen=True)
class LabelStep:
    """A choice among labels; `tokens` and `texts` of each label include the forced text that follows it."""

    field: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    trie: LabelTrie


@dataclass(frozen=True)
class GrammarStep:
    """A free part; `matcher` stands at its beginning and is copied for each answer."""

    matcher: Any
    closing_tokens: int


@dataclass(frozen=True)
class TextStep:
    """Text until the turn ends."""


@dataclass(frozen=True)
class CompiledAnswer:
    """An answer plan for one tokenizer: forced text, then steps."""

    lead_text: str
    lead_tokens: tuple[int, ...]
    steps: tuple[LabelStep | GrammarStep | TextStep, ...]

    @property
    def single_pass(self) -> bool:
        """Whether one pass decides the whole answer."""
        return len(self.steps) == 1 and isinstance(self.steps[0], LabelStep)

    @cached_property
    def least_tokens(self) -> int:
        """Tokens for which the context must have room, forced ones included."""
        return len(self.lead_tokens) + self.closing_reserve(0)

    @cached_property
    def tree_tokens(self) -> int:
        """Tokens that the largest choice among labels needs for the time that it is scored."""
        return max((step.trie.rows - 1 for step in self.steps if isinstance(step, LabelStep)), default=0)

    def closing_reserve(self, first: int) -> int:
        """Tokens that steps `first`... need at least."""
        return sum(map(_least_tokens, self.steps[first:]))


def _least_tokens(step: LabelStep | GrammarStep | TextStep) -> int:
    if isinstance(step, LabelStep):
        return max(map(len, step.tokens))
    return step.closing_tokens if isinstance(step, GrammarStep) else 1


def compile_answer(plan: AnswerPlan, encoder: PromptEncoder, grammars: GrammarFactory) -> CompiledAnswer:
    """Prepare a plan.

    Raises:
        InvalidRequestError: A grammar cannot be compiled.
    """
    segments = list(plan.segments)
    lead = _take_forced(segments)
    steps: list[LabelStep | GrammarStep | TextStep] = []
    while segments:
        segment = segments.pop(0)
        if isinstance(segment, Choice):
            steps.append(_label_step(segment, _take_forced(segments), encoder))
        elif isinstance(segment, Free):
            after = len(encoder.encode_text(segment.after))
            closing = max(CLOSING_TOKENS, CLOSING_PART_TOKENS + after)
            steps.append(GrammarStep(grammars.compile(segment), closing))
        elif isinstance(segment, Unconstrained):
            steps.append(TextStep())
    return CompiledAnswer(lead, tuple(encoder.encode_text(lead)) if lead else (), tuple(steps))


def _take_forced(segments: list[Segment]) -> str:
    """Remove forced text from the front and return it."""
    if segments and isinstance(segments[0], Forced):
        text = segments[0].text
        del segments[0]
        return text
    return ""


def _label_step(choice: Choice, after: str, encoder: PromptEncoder) -> LabelStep:
    full_tokens: list[tuple[int, ...]] = []
    scored: list[tuple[int, ...]] = []
    for text in choice.texts:
        encoded = encoder.encode_with_ends(text + after)
        # The closing quotation mark is not part of the label: which comma or bracket it shares a token with is
        # layout, not an answer.
        end = len(text) - (1 if text.endswith('"') else 0)
        full_tokens.append(tuple(token for token, _ in encoded))
        scored.append(tuple(token for token, start in encoded if start < end))
    for index, tokens in enumerate(scored):
        longer = [other for other in scored if other != tokens and other[: len(tokens)] == tokens]
        if longer or scored.count(tokens) > 1:
            # A label that begins another one is told apart from it by the token that ends it.
            scored[index] = full_tokens[index][: len(tokens) + 1]
    texts = tuple(text + after for text in choice.texts)
    return LabelStep(choice.field, choice.labels, texts, tuple(full_tokens), build_trie(scored))


@dataclass(frozen=True)
class Ask:
    """What the next pass computes for an answer: tokens to append, then a trie to score or one token to choose."""

    append: tuple[int, ...]
    trie: LabelTrie | None


@dataclass(frozen=True)
class TokenScore:
    """Log-probability of a chosen token (or label) and of the likeliest alternatives."""

    text: str
    log_probability: float
    top: tuple[tuple[str, float], ...]


@dataclass
class AnswerDecoder:
    """The state of one answer.

    Args:
        answer: What to decode.
        grammars: For bytes of tokens.
        sampler: Temperature and random stream of this request.
        max_tokens: Bound on the tokens of the answer, >= 1.
        ends: Token ids that end a turn.
        stops: Texts that end unconstrained text, and are not part of it.
        top: How many alternatives to report per token; None reports nothing.
        encode: Tokenizes a text (for closing an answer early).
    """

    answer: CompiledAnswer
    grammars: GrammarFactory
    sampler: Sampler
    max_tokens: int
    ends: frozenset[int]
    stops: tuple[str, ...]
    top: int | None
    encode: Callable[[str], list[int]]
    vocabulary: int
    text: str = ""
    output_tokens: int = 0
    finish_reason: str = "stop"
    done: bool = False
    distributions: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: list[TokenScore] = field(default_factory=list)
    _step: int = 0
    _append: list[int] = field(default_factory=list)
    _matcher: Any = None
    _bytes: Any = None
    _closing: int = 0

    def __post_init__(self) -> None:
        self.text = self.answer.lead_text
        self._push(self.answer.lead_tokens)
        self._enter()

    def ask(self) -> Ask:
        """Tokens to append since the last pass, and what to score after them."""
        step = self.answer.steps[self._step]
        append = tuple(self._append)
        if isinstance(step, LabelStep):
            return Ask(append + step.trie.common, step.trie)
        return Ask(append, None)

    def take_labels(self, edges: np.ndarray) -> None:
        """Take the log-probabilities of the trie's edges, choose a label and go on to the next step."""
        step = self.answer.steps[self._step]
        assert isinstance(step, LabelStep)
        log_probabilities = label_log_probabilities(step.trie, edges)
        probabilities = dict(zip(step.labels, np.exp(log_probabilities).tolist(), strict=True))
        self.distributions[step.field] = probabilities
        chosen = self.sampler.choose(log_probabilities)
        if self.top is not None:
            self._report_label(step, log_probabilities, chosen)
        self.text += step.texts[chosen]
        self._append = []
        self._push(step.tokens[chosen])
        # The common beginning was part of the pass that scored the labels.
        del self._append[: len(step.trie.common)]
        self._step += 1
        self._enter()

    def take_token(self, log_probabilities: np.ndarray) -> None:
        """Take the next-token log-probabilities [vocabulary], choose a token and go on."""
        allowed = allowed_tokens(self._matcher, self.vocabulary) if self._matcher is not None else None
        masked = log_probabilities
        if allowed is not None:
            masked = np.where(allowed[: len(log_probabilities)], log_probabilities, -np.inf)
        token = self._closing_token(allowed) if allowed is not None else None
        if token is None:
            token = self.sampler.choose(masked)
        self.take_chosen(token, log_probabilities)

    def take_chosen(self, token: int, log_probabilities: np.ndarray | None = None) -> None:
        """Go on with `token`, which was chosen from `log_probabilities`."""
        self._append = []
        if self.top is not None and log_probabilities is not None and token not in self.ends:
            self._report_token(token, log_probabilities)
        if self._matcher is not None:
            self._grow_part(token)
        else:
            self._grow_text(token)

    @property
    def next_tokens(self) -> int:
        """Tokens up to the end of the next choice: what was forced since the last pass, then a token or a label."""
        if self.done:
            return len(self._append)
        step = self.answer.steps[self._step]
        return len(self._append) + (_least_tokens(step) if isinstance(step, LabelStep) else 1)

    @property
    def plain_greedy(self) -> bool:
        """Whether the next token is the likeliest one, with nothing else to look at."""
        return self._matcher is None and self.sampler.greedy and self.top is None

    def _push(self, tokens: Sequence[int]) -> None:
        self._append.extend(tokens)
        self.output_tokens += len(tokens)

    def _enter(self) -> None:
        """Begin the step at hand, or finish."""
        self._matcher = None
        if self._step >= len(self.answer.steps):
            self.done = True
            return
        step = self.answer.steps[self._step]
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        if isinstance(step, GrammarStep):
            self._matcher = step.matcher.deep_copy()
            self._fast_forward()
            if self._matcher.is_stopped():
                self._leave_part()

    def _fast_forward(self) -> None:
        """Append what the grammar forces."""
        forced = self._matcher.compute_ff_tokens()
        if forced and self._matcher.consume_tokens(forced):
            for token in forced:
                self.text += self._bytes_to_text(token)
            self._push(forced)

    def _bytes_to_text(self, token: int) -> str:
        text: str = self._bytes.decode(self.grammars.bytes_of(token))
        return text

    def _grow_part(self, token: int) -> None:
        if token in self.ends or not self._matcher.consume_token(token):
            # The grammar allows the end of the turn only where the part is complete.
            self._leave_part()
            return
        self.text += self._bytes_to_text(token)
        self._push((token,))
        self._fast_forward()
        if self._matcher.is_stopped():
            self._leave_part()
        elif self.output_tokens >= self.max_tokens and self._closing_limit_reached():
            self.done, self.finish_reason = True, "length"

    def _leave_part(self) -> None:
        self._step += 1
        self._enter()

    def _grow_text(self, token: int) -> None:
        if token in self.ends:
            self.done = True
            return
        self.text += self._bytes_to_text(token)
        self._push((token,))
        cut = min((at for at in (self.text.find(stop) for stop in self.stops) if at >= 0), default=-1)
        if cut >= 0:
            self.text, self.done = self.text[:cut], True
        elif self.output_tokens >= self.max_tokens:
            self.done, self.finish_reason = True, "length"

    def _closing_limit_reached(self) -> bool:
        return self._closing == 0 or self._closing > 4 * CLOSING_TOKENS

    def _closing_token(self, allowed: np.ndarray) -> int | None:
        """Near max_tokens: an allowed token that brings the JSON towards its end, so that it still parses."""
        reserve = self.answer.closing_reserve(self._step)
        if self.output_tokens < self.max_tokens - reserve or reserve >= self.max_tokens:
            return None
        self._closing += 1
        self.finish_reason = "length"
        for text in CLOSING_TEXTS:
            tokens = self.encode(text)
            if len(tokens) == 1 and allowed[tokens[0]]:
                return tokens[0]
        return None

    def _report_label(self, step: LabelStep, log_probabilities: np.ndarray, chosen: int) -> None:
        order = np.argsort(-log_probabilities, kind="stable")[: self.top]
        top = tuple((step.labels[i], float(log_probabilities[i])) for i in order)
        self.scores.append(TokenScore(step.labels[chosen], float(log_probabilities[chosen]), top))

    def _report_token(self, token: int, log_probabilities: np.ndarray) -> None:
        count = min(self.top or 0, len(log_probabilities))
        order = np.argpartition(-log_probabilities, count - 1)[:count] if count else np.array([], dtype=int)
        order = order[np.argsort(-log_probabilities[order], kind="stable")]
        top = tuple((self._token_text(int(i)), float(log_probabilities[i])) for i in order)
        self.scores.append(TokenScore(self._token_text(token), float(log_probabilities[token]), top))

    def _token_text(self, token: int) -> str:
        return self.grammars.bytes_of(token).decode("utf-8", "replace")
