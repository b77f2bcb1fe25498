"""What the scheduler handles: jobs, the model's protocol, and the budget of a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from asyndbt_dspy.lms.local.attention import KeyValueShape, PackedAttention
from asyndbt_dspy.lms.local.decoding import AnswerDecoder, Ask
from asyndbt_dspy.lms.local.layout import PassLayout
from asyndbt_dspy.lms.local.prefix_cache import Node
from asyndbt_dspy.lms.local.slots import whole_steps

# A last turn longer than this is cut: what is before goes into the prefix cache like any shared beginning.
LONGEST_TAIL = 256


class Decoder(Protocol):
    """A model that runs packed passes."""

    shape: KeyValueShape
    windows: tuple[int | None, ...]
    context_tokens: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device

    def run(self, layout: PassLayout, attention: PackedAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [wanted rows, vocabulary] and the logarithm of their exponentials' sum [wanted rows], float32."""
        ...


@dataclass(eq=False)
class Job:
    """A request on its way through the scheduler.

    Attributes:
        prompt: Token ids.
        last_turn: Index where the part that is likely not shared begins.
        answer: The decoder of its answer.
        caller: On whose behalf; callers take turns.
        notify: Called once, from the scheduler's thread, when `done` or `error` is set.
        cached_tokens: Prompt tokens that were in the prefix cache.
        row_tokens: The most that its row of the slots can come to; 0 where one pass decides the answer.
    """

    prompt: list[int]
    last_turn: int
    answer: AnswerDecoder
    caller: str
    notify: Callable[[Job], None]
    cached_tokens: int = 0
    cancelled: bool = False
    finished: bool = False
    error: BaseException | None = None
    node: Node | None = None
    tail_start: int = 0
    row: int | None = None
    row_length: int = 0
    prefilled: bool = False
    ask: Ask | None = field(default=None, repr=False)
    row_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.row_tokens = 0
        if not self.answer.answer.single_pass:
            compiled = self.answer.answer
            answer = max(self.answer.max_tokens, compiled.least_tokens) + compiled.tree_tokens
            self.row_tokens = whole_steps(min(len(self.prompt), LONGEST_TAIL) + answer)


@dataclass
class PromptBudget:
    """Tokens of a pass that are left for prompts. What cannot be cut runs alone even if it is larger."""

    left: int
    untouched: bool = True

    def fits(self, tokens: int) -> bool:
        """Whether a piece of this size may join the pass."""
        return tokens <= self.left or self.untouched

    def spend(self, tokens: int) -> None:
        """Take tokens off."""
        self.left -= tokens
        self.untouched = False


def guarded(job: Job, action: Callable[[], None]) -> None:
    """Run a step of one answer; what goes wrong in it is that request's error alone."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - handed to the caller that waits
        job.error = error


def finish(job: Job, error: BaseException | None) -> None:
    """Settle a job, once."""
    if job.finished:
        return
    job.error = error
    job.finished = True
    job.notify(job)
