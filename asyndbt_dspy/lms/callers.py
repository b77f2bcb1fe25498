"""On whose behalf an LM call is made, so that an engine can share itself fairly between workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_caller: ContextVar[str] = ContextVar("asyndbt_caller", default="")


@contextmanager
def calling_as(name: str) -> Iterator[None]:
    """Mark every LM call inside the block (and in contexts copied from it) as made for `name`."""
    token = _caller.set(name)
    try:
        yield
    finally:
        _caller.reset(token)


def current_caller() -> str:
    """The name set by the innermost `calling_as`, or the empty string."""
    return _caller.get()
