"""One call for all that want the same at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["JoinedCalls"]

T = TypeVar("T")


@dataclass
class _Call(Generic[T]):
    task: asyncio.Task[T]
    num_waiting: int = 0


class JoinedCalls(Generic[T]):
    """Calls by key. A call is cancelled when all that wait for it are.

    Args:
        fresh: whether a call must begin after it was asked for, as one that looks at something that
            changes. It is then joined until it begins, and the next one begins after its end, so
            that at most one runs. Otherwise it is joined until it ends.
    """

    def __init__(self, *, fresh: bool) -> None:
        self._fresh = fresh
        self._joinable: dict[Hashable, _Call[T]] = {}
        self._latest: dict[Hashable, asyncio.Task[T]] = {}  # of each key, if fresh
        self._tasks: set[asyncio.Task[T]] = set()

    async def run(self, key: Hashable, call: Callable[[], Awaitable[T]]) -> T:
        """The result of a call with this key: of the one that can be joined, or of a new one."""
        joined = self._joinable.get(key)
        if joined is None:
            former = self._latest.get(key)
            task = asyncio.create_task(self._run(key, call, former))
            joined = self._joinable[key] = _Call(task)
            self._tasks.add(task)
            task.add_done_callback(lambda task: self._forget(key, task, former))
            if self._fresh:
                self._latest[key] = task
        joined.num_waiting += 1
        try:
            return await asyncio.shield(joined.task)
        finally:
            joined.num_waiting -= 1
            if not joined.num_waiting and not joined.task.done():
                self._leave(key, joined.task)
                joined.task.cancel()

    async def close(self) -> None:
        """Cancels all calls, and waits until they have ended."""
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(
        self, key: Hashable, call: Callable[[], Awaitable[T]], former: asyncio.Task[Any] | None
    ) -> T:
        if self._fresh:
            if former is not None:
                await asyncio.wait([former])
            self._joinable.pop(key, None)
        return await call()

    def _leave(self, key: Hashable, task: asyncio.Task[T]) -> None:
        joined = self._joinable.get(key)
        if joined is not None and joined.task is task:
            del self._joinable[key]

    def _forget(self, key: Hashable, task: asyncio.Task[T], former: asyncio.Task[T] | None) -> None:
        self._tasks.discard(task)
        self._leave(key, task)
        if self._latest.get(key) is task:
            del self._latest[key]
            if former is not None and not former.done():
                self._latest[key] = former  # cancelled before its turn
        if not task.cancelled():
            task.exception()  # all that waited may have gone
