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

_LEAST = 0.01
"""Part of a limit: being held for less buys no more time. Each extension is as long as the last stretch, down to nothing."""
_JAMMED = 10
"""Limits in which nothing ended: then those that never end hold all that the others wait for (threads, places)."""

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
            elif more_s > _LEAST * seconds:
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


class Patience:
    """The time limits of many calls, and how long the time that they wait for their turn is left out of it.

    Not once the run is to stop, for what is in flight ends first; nor where none of the calls has ended for long.

    Args:
        is_stopping: Whether the run is to stop.
    """

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping
        self._ended_s: float | None = None

    async def within(
        self, seconds: float, call: Coroutine[Any, Any, Found], held_s: Callable[[], float]
    ) -> Found:
        """``within`` the limit of one call."""
        clock = asyncio.get_running_loop().time
        begun_s = clock()

        def left_out() -> float:
            ended_s = begun_s if self._ended_s is None else self._ended_s
            is_jammed = clock() - ended_s > _JAMMED * seconds
            return 0.0 if is_jammed or self._is_stopping() else held_s()

        found = await within(seconds, call, left_out)
        self._ended_s = clock()
        return found
