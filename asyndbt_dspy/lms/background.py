"""An event loop in a thread of its own, for what calls from several loops and threads have in common."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines for callers of any thread or loop; the thread starts at the first call.

    A rate limiter belongs to one loop, but its endpoint is called from all of them, and a plain program in a thread has
    no loop at all. Waiting here cannot deadlock with the caller's loop, also where a plain metric calls an LM on it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finalizer: Any = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop of the thread."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=(self._loop,), name=self._name, daemon=True).start()
                # The thread holds the loop, not this object: it ends with its owner.
                self._finalizer = weakref.finalize(self, _stop, self._loop)
            return self._loop

    def submit(self, make: Callable[[], Awaitable[T]]) -> concurrent.futures.Future[T]:
        """Run ``await make()`` in the thread, in a copy of the caller's context. Cancelling the future cancels it."""
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        loop = self.loop

        def start() -> None:
            if outcome.cancelled():
                return
            task = asyncio.ensure_future(_awaited(make))
            task.add_done_callback(lambda done: _hand_over(done, outcome))
            outcome.add_done_callback(lambda done: _cancel_if(done, task, loop))

        loop.call_soon_threadsafe(start, context=contextvars.copy_context())
        return outcome

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Run a plain function in the thread, soon; nothing where the thread has ended."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)

    def close(self) -> None:
        """End the thread; what waits in it is cancelled. A later call starts a new one."""
        with self._lock:
            if self._finalizer is not None:
                self._finalizer()
            self._loop = self._finalizer = None


async def _awaited(make: Callable[[], Awaitable[T]]) -> T:
    return await make()


def _hand_over(task: asyncio.Task[T], outcome: concurrent.futures.Future[T]) -> None:
    if outcome.cancelled() or not outcome.set_running_or_notify_cancel():
        return
    if task.cancelled():
        outcome.set_exception(concurrent.futures.CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


def _cancel_if(
    outcome: concurrent.futures.Future[Any], task: asyncio.Task[Any], loop: asyncio.AbstractEventLoop
) -> None:
    if outcome.cancelled() and not loop.is_closed():
        loop.call_soon_threadsafe(task.cancel)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    waiting = asyncio.all_tasks(loop)
    for task in waiting:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*waiting, return_exceptions=True))
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)
