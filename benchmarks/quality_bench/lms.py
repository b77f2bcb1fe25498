"""The LMs of the benchmark: one engine, two ``dspy.LM`` over it, so that calls are counted by role."""

from __future__ import annotations

from dataclasses import dataclass

import dspy

from asyndbt_dspy import local_lm
from quality_bench.counting import AsyncCountingEngine, CallBook, CountingEngine

LMS = ("smollm2-135m", "gemma3-270m")


@dataclass(frozen=True)
class Lms:
    """The LM that answers and the LM that proposes.

    Attributes:
        book: Counts the calls of both.
        precision: Of the arithmetic, as ``local_lm`` takes it.
    """

    name: str
    task: dspy.LM
    proposer: dspy.LM
    book: CallBook
    precision: str = "auto"


def counted_lms(name: str, lm: dspy.LM, precision: str = "auto") -> Lms:
    """Both roles over the engines of one ``dspy.LM``. Proposals are sampled at temperature 1."""
    engine, async_engine, book = lm._engine_spec, lm._async_engine_spec, CallBook()

    def role(role: str, **options: float) -> dspy.LM:
        return dspy.LM(
            f"{role}/{name}",
            engine=CountingEngine(engine, role, book),
            async_engine=AsyncCountingEngine(async_engine, role, book),
            cache=False,
            num_retries=0,
            **options,
        )

    return Lms(name, role("task"), role("proposer", temperature=1.0), book, precision)


def load(name: str, precision: str = "auto") -> Lms:
    """A local LM; ``precision`` ``auto`` is bfloat16 where the processor computes it, ``float32`` is exact enough that
    answers do not depend on what else is in the batch."""
    return counted_lms(name, local_lm(name, dtype=precision), precision)
