"""One request while it runs: its generations, and the answer that they make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from tokasaurus.errors import TokasaurusError
from tokasaurus.server.errors import ClientGone, TimeIsUp
from tokasaurus.server.operations.heavy_work import in_thread_if
from tokasaurus.server.operations.operation import Task
from tokasaurus.server.operations.writer import StreamWriter
from tokasaurus.text.generation import Generation
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import renamed
from tokasaurus.text.samples import SampleOutput

__all__ = ["Execution"]


class Execution:
    """Runs one task. Use it in a ``with`` block, after which nothing of the task runs any more.

    Args:
        task: to run; its generations start at once.
        table: where to start them.
        client: whose share of the engine they take.
        name: of the request; all its generations may be ended by it.
        timeout_s: the time after which all of them end; None is no limit.
    """

    def __init__(
        self,
        task: Task,
        table: Generations,
        *,
        client: str = "",
        name: str = "",
        timeout_s: float | None = None,
    ) -> None:
        self._task = task
        self._table = table
        self._wake = asyncio.Event()
        self._changed: dict[int, None] = {}  # positions of generations with news, in order
        self._interruption: TokasaurusError | None = None
        self._generations: list[Generation] = []
        streams = task.stream is not None
        request_id = task.request.request_id
        names = (name,) if request_id is None else (name, request_id)
        if task.trace is not None:
            task.trace.send(task.prompts, streams=streams)
        for position, prompt in enumerate(task.prompts):
            self._generations.append(
                table.start(
                    prompt,
                    stream=streams,
                    on_change=partial(self._note, position),
                    client=client,
                    names=(*names, *task.names[position : position + 1]) if name else (),
                    on_stage=None if task.trace is None else task.trace.reach,
                )
            )
        self._unfinished = set(range(len(task.prompts)))
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            error, loop = TimeIsUp(timeout_s), asyncio.get_running_loop()
            self._timer = loop.call_later(timeout_s, self.interrupt, error)

    def __enter__(self) -> Execution:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._abort()
        if self._task.trace is not None:
            error = next((each for each in raised if isinstance(each, BaseException)), None)
            error = error or self._interruption
            self._task.trace.end(self._generations, self._task.writer.answer_id, error)
        self._task.release()

    @property
    def was_aborted(self) -> bool:
        """Whether a command ended some of it."""
        return any(generation.was_aborted for generation in self._generations)

    def interrupt(self, error: TokasaurusError) -> None:
        """Ends the generations at once; whatever waits for them gets this error."""
        self._interruption = error
        self._abort()
        self._wake.set()

    async def answer(self) -> bytes:
        """The whole answer, when every generation has finished.

        Raises:
            RequestError: the engine refuses a prompt; names the field.
            EngineDead: the engine died.
            ClientGone, TimeIsUp: the execution was interrupted.
        """
        while self._unfinished:
            await self._next_changes()
        writer, generations = self._task.writer, self._generations
        takes_long = writer.takes_long(generations) or self._has_receipt
        return await in_thread_if(takes_long, lambda: writer.whole(generations))

    def events(self) -> AsyncIterator[bytes] | None:
        """The events of the answer as they come; None if the client did not ask for a stream.

        An error before the first event is raised, as ``answer`` raises it. A later error is the
        last event, except ClientGone, which is always raised.
        """
        writer = self._task.stream
        return None if writer is None else self._written(writer)

    async def _written(self, writer: StreamWriter) -> AsyncIterator[bytes]:
        generations, begun = self._generations, False
        try:
            async for outputs in self._news():
                data = b"".join([writer.chunk(generations, *output) for output in outputs])
                begun = True
                yield data
            yield await in_thread_if(self._has_receipt, lambda: writer.end(generations))
        except ClientGone:
            raise
        except TokasaurusError as error:
            if not begun:
                raise
            yield writer.failure(error)

    @property
    def _has_receipt(self) -> bool:
        """Whether the answer gets a receipt, which may be large, or wait for a digest."""
        return any(each.request.receipts is not None for each in self._generations)

    async def _news(self) -> AsyncIterator[list[tuple[int, SampleOutput]]]:
        """Outputs with the positions of their prompts, whenever there are some, until the end."""
        while self._unfinished:
            changed = await self._next_changes()
            outputs = [
                (position, output)
                for position in changed
                for output in self._generations[position].take_news()
            ]
            if outputs:
                yield outputs

    async def _next_changes(self) -> list[int]:
        await self._wake.wait()
        self._wake.clear()
        if self._interruption is not None:
            raise self._interruption
        changed, self._changed = list(self._changed), {}
        for position in changed:
            generation = self._generations[position]
            if generation.error is not None:
                raise renamed(generation.error, self._task.request.field_names()) from None
            if generation.finished:
                self._unfinished.discard(position)
        return changed

    def _note(self, position: int) -> None:
        self._changed[position] = None
        self._wake.set()

    def _abort(self) -> None:
        for generation in self._generations:
            if not generation.finished:
                self._table.abort(generation)
