"""An async iterator, read by plain code."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import copy_context
from typing import Any


def from_own_loop(make: Callable[[], AsyncIterator[Any]]) -> Iterator[Any]:
    """Items of an async iterator that runs on an event loop in a thread of its own, in a copy of this context.

    Where the caller stops reading, the iterator is cancelled: nobody reads what it would still be paid for.
    """
    items: queue.Queue[tuple[str, Any]] = queue.Queue()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []
    closed = threading.Event()

    async def drain() -> None:
        task = asyncio.current_task()
        if task is not None:
            running.append((asyncio.get_running_loop(), task))
        if closed.is_set():
            return
        async for item in make():
            items.put(("item", item))

    def run() -> None:
        try:
            asyncio.run(drain())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            items.put(("error", error))
        else:
            items.put(("end", None))

    def close() -> None:
        closed.set()
        for loop, task in running:
            try:
                loop.call_soon_threadsafe(task.cancel)
            except RuntimeError:
                # The loop is closed: all was read, or it failed.
                continue

    threading.Thread(target=copy_context().run, args=(run,), daemon=True).start()
    return _items(items, close)


def _items(items: queue.Queue[tuple[str, Any]], close: Callable[[], None]) -> Iterator[Any]:
    try:
        while True:
            kind, item = items.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
    finally:
        close()
