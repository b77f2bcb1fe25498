"""An async iterator, read by plain code."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import copy_context
from typing import Any


def from_own_loop(make: Callable[[], AsyncIterator[Any]]) -> Iterator[Any]:
    """Items of an async iterator that runs on an event loop in a thread of its own, in a copy of this context."""
    items: queue.Queue[tuple[str, Any]] = queue.Queue()

    async def drain() -> None:
        async for item in make():
            items.put(("item", item))

    def run() -> None:
        try:
            asyncio.run(drain())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            items.put(("error", error))
        else:
            items.put(("end", None))

    threading.Thread(target=copy_context().run, args=(run,), daemon=True).start()
    return _items(items)


def _items(items: queue.Queue[tuple[str, Any]]) -> Iterator[Any]:
    while True:
        kind, item = items.get()
        if kind == "end":
            return
        if kind == "error":
            raise item
        yield item
