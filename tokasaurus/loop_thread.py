"""An event loop in a thread of its own, for programs without one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tokasaurus.errors import EngineError

__all__ = ["LoopThread"]

T = TypeVar("T")


class LoopThread:
    """Runs coroutines of any thread. It begins with the first one, and ends with the program."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work returns. Ctrl-C in the caller cancels the work.

        Raises:
            EngineError: another thread has closed it.
        """
        future = self.begin(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise EngineError("it was closed during this call") from None
        except BaseException:
            future.cancel()
            raise

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Runs work, and does not wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._begun())

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Calls a function in the loop, soon. Nothing is called if no coroutine has run."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(function, *arguments)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs a last coroutine, if others have run, cancels the rest, and ends the thread."""
        if self._loop is None or self._thread is None:
            last.close()
            return
        loop, thread = self._loop, self._thread
        try:
            self.run(last)
        finally:
            self._loop = self._thread = None
            loop.call_soon_threadsafe(loop.stop)
            thread.join()

    def _begun(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_run_until_stopped,
                    args=(self._loop,),
                    name="tokasaurus-loop",
                    daemon=True,
                )
                self._thread.start()
            return self._loop


def _run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
