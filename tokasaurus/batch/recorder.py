"""Writes the answers of one batch in groups: those that came while the last one was written."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from tokasaurus.batch.store import NewAnswer

__all__ = ["Recorder"]


class Recorder:
    """Collects answers and writes them.

    Args:
        write: writes a group of answers to the disk.
    """

    def __init__(self, write: Callable[[list[NewAnswer]], Awaitable[object]]) -> None:
        self._write = write
        self._waiting: list[tuple[NewAnswer, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._closed = False
        self._error: Exception | None = None

    async def keep(self, answer: NewAnswer) -> None:
        """Returns when the answer is on the disk. Raises whatever writing it raised."""
        if self._error is not None:
            raise self._error
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((answer, done))
        self._wake.set()
        await done

    async def run(self) -> None:
        """Writes until the recorder is closed and everything is written, or until writing fails."""
        while self._waiting or not self._closed:
            await self._wake.wait()
            self._wake.clear()
            group, self._waiting = self._waiting, []
            if group:
                await self._write_group(group)
            if self._error is not None:
                return

    def close(self) -> None:
        """Ends ``run`` once everything is written. No more answers may come."""
        self._closed = True
        self._wake.set()

    async def _write_group(self, group: list[tuple[NewAnswer, asyncio.Future[None]]]) -> None:
        try:
            await self._write([answer for answer, _ in group])
        except Exception as error:
            self._error = error
            group, self._waiting = group + self._waiting, []
        for _, done in group:
            if done.done():
                continue  # it was cancelled in the meantime
            if self._error is None:
                done.set_result(None)
            else:
                done.set_exception(self._error)
