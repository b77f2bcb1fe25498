"""An event loop whose clock jumps to the next timer: minutes of waiting take milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


_TICK_S = 1e-7


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        if not found and timeout is None:
            raise RuntimeError("every task waits for something that no timer will bring")
        # A real clock moves all the time. Without the tick, a timer that rounding has put a hair too early comes forever.
        self.now_s += _TICK_S if found else (timeout or 0.0) + _TICK_S
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """``time()`` starts at 0 and moves only when every task waits."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def stand_still(self, at_s: float, for_s: float) -> None:
        """From ``at_s`` seconds from now on, nothing runs for so long."""

        def stand() -> None:
            self._jumping.now_s += for_s

        self.call_later(at_s, stand)


def standing_still(at_s: float, for_s: float) -> None:
    """See ``VirtualLoop.stand_still``, of the running loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.stand_still(at_s, for_s)


def run_virtually(coroutine: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """(result, virtual seconds)."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(coroutine), loop.time()
    finally:
        loop.close()
