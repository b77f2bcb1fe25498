"""What every end-to-end test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import dspy
import pytest


@pytest.fixture(autouse=True)
def json_prompts() -> Iterator[None]:
    """DSPy's JSON prompts, and no LM but the one that a test sets."""
    with dspy.context(adapter=dspy.JSONAdapter(), lm=None):
        yield
