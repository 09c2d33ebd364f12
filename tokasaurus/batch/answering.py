"""Answers the lines of one batch, many at a time, and reads them only as there is room."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Protocol

from tokasaurus.batch.capacity import Capacity
from tokasaurus.batch.lines import (
    BadLine,
    Line,
    Request,
    answer_line,
    error_line,
    usage_of,
)
from tokasaurus.batch.recorder import Recorder
from tokasaurus.batch.records import Usage, new_id
from tokasaurus.batch.store import NewAnswer
from tokasaurus.observability.request_names import serving

__all__ = ["Answer", "Answering"]

log = logging.getLogger(__name__)

_CHUNK_LINES, _CHUNK_BYTES = 64, 4 << 20  # read at once
_LARGE_BODY = 1 << 19  # bytes; larger answers are read in a thread


class Answer(Protocol):
    """Answers one request with a status code and JSON. Raises EngineError if the engine cannot."""

    async def __call__(self, path: str, body: Any, *, priority: int) -> tuple[int, bytes]: ...


class Answering:
    """Answers the lines of a batch.

    Args:
        answer: answers one request.
        capacity: what all batches share.
        write: writes a group of answers to the disk.
        batch: what the log calls the batch.
    """

    def __init__(
        self,
        answer: Answer,
        capacity: Capacity,
        write: Callable[[list[NewAnswer]], Awaitable[object]],
        batch: str,
    ) -> None:
        self._batch = batch
        self._answer = answer
        self._capacity = capacity
        self._write = write
        self._takes_more = True

    def finish(self) -> None:
        """Takes no more lines: ``run`` returns when those in flight are answered."""
        self._takes_more = False

    async def run(self, lines: Iterator[Line]) -> None:
        """Answers lines. If cancelled, answers some of them.

        Args:
            lines: taken in a thread, a few at a time, as there is room for them.

        Raises:
            EngineError: the engine is gone.
            Exception: whatever writing raised.
        """
        recorder = Recorder(self._write)
        writing = asyncio.create_task(recorder.run())
        # With what each took of the capacity: samples, bytes, priority.
        tasks: dict[asyncio.Task[None], tuple[int, int, int]] = {}
        failed: list[BaseException] = []

        def ended(task: asyncio.Task[None]) -> None:
            self._capacity.give_back(*tasks.pop(task))
            if not task.cancelled() and (error := task.exception()) is not None:
                failed.append(error)

        try:
            async for line in _as_needed(lines):
                cost = _cost(line)
                priority = await self._capacity.take(*cost)
                if not self._takes_more:
                    self._capacity.give_back(*cost, priority)
                    break
                task = asyncio.create_task(self._answer_one(line, priority, recorder))
                tasks[task] = (*cost, priority)
                task.add_done_callback(ended)
                if failed:
                    break
            while tasks and not failed:
                await asyncio.wait(tasks, return_when="FIRST_COMPLETED")
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            recorder.close()
            await writing
        if failed:
            raise failed[0]

    async def _answer_one(self, line: Line, priority: int, recorder: Recorder) -> None:
        if isinstance(line, BadLine):
            data = error_line(line.name, line.code, line.message)
            await recorder.keep(NewAnswer(line.line, data, True))
            return
        request_id = new_id("req")  # in the log and in the answer
        with serving(request_id):
            log.debug("line %d of %s, custom_id %r", line.line, self._batch, line.custom_id)
            status, body = await self._answer(line.url, line.body, priority=priority)
        make = partial(_new_answer, line, status, body, request_id)
        answer = await asyncio.to_thread(make) if len(body) > _LARGE_BODY else make()
        await recorder.keep(answer)


async def _as_needed(lines: Iterator[Line]) -> AsyncIterator[Line]:
    while chunk := await asyncio.to_thread(_take_some, lines):
        for line in chunk:
            yield line


def _cost(line: Line) -> tuple[int, int]:
    """About how many samples and bytes a line takes."""
    return (line.num_samples, line.num_bytes) if isinstance(line, Request) else (0, 0)


def _take_some(lines: Iterator[Line]) -> list[Line]:
    some: list[Line] = []
    num_bytes = 0
    for line in itertools.islice(lines, _CHUNK_LINES):
        some.append(line)
        num_bytes += _cost(line)[1]
        if num_bytes >= _CHUNK_BYTES:
            break
    return some


def _new_answer(line: Request, status: int, body: bytes, request_id: str) -> NewAnswer:
    is_error = status != 200
    usage = Usage() if is_error else usage_of(body)
    data = answer_line(line.custom_id, status, body, request_id)
    return NewAnswer(line.line, data, is_error, usage)
