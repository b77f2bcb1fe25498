"""A time limit that does not run while the process stands still, nor while a call waits for its turn here.

A process that was stopped (Ctrl-Z, a paused container, a machine that slept) wakes up with all its deadlines over at once.
Its calls have done nothing wrong: each gets its time once more, instead of all workers being set aside for not answering.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_STOOD_STILL_S = 1.0
_SHARE = 0.1
"""A timer that goes off later than both this many seconds and this part of its limit was not late by chance: nothing ran."""

Found = TypeVar("Found")


def was_still(late_s: float, limit_s: float) -> bool:
    """Whether a timer of ``limit_s`` that went off so many seconds too late means that the process stood still."""
    return late_s > max(_STOOD_STILL_S, _SHARE * limit_s)


async def within(
    seconds: float, call: Coroutine[Any, Any, Found], held_s: Callable[[], float] = lambda: 0.0
) -> Found:
    """What ``call`` returns.

    Args:
        seconds: > 0, of the event loop's clock while the process ran.
        held_s: Seconds so far in which ``call`` was held back; they are not among its own.

    Raises:
        asyncio.TimeoutError: it took longer; it was cancelled.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(call)
    until, known_s = loop.time() + seconds, held_s()
    try:
        while not task.done():
            await asyncio.wait((task,), timeout=until - loop.time())
            late = loop.time() - until
            if late < 0.0:
                continue
            more_s = held_s() - known_s
            if was_still(late, seconds):
                until = loop.time() + seconds
            elif more_s > 0.0:
                until += more_s
            else:
                break
            known_s += more_s
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
        if task.cancelled():
            raise asyncio.TimeoutError
    return task.result()
