"""One request while it runs: its generations, and its client, who may go away at any moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokasaurus.errors import TokasaurusError
from tokasaurus.server.errors import ClientGone, TimeIsUp
from tokasaurus.server.operations.schemas import RequestBody
from tokasaurus.server.operations.writer import StreamWriter
from tokasaurus.text.generation import Generation
from tokasaurus.text.generations import Generations
from tokasaurus.text.params import renamed
from tokasaurus.text.preparation import PreparedRequest
from tokasaurus.text.samples import SampleOutput

__all__ = ["Call", "EventStream", "in_thread_if", "until_disconnect"]

T = TypeVar("T")


class Call:
    """The generations of one request; starts them. After a ``with`` block on it, nothing runs any more.

    Args:
        table: where to start them.
        requests: one for each prompt.
        stream: there will be news before the end.
        client: whose they are.
        timeout_s: after which all of them end; None is never.
    """

    def __init__(
        self,
        table: Generations,
        requests: Sequence[PreparedRequest],
        *,
        stream: bool,
        client: str = "",
        timeout_s: float | None = None,
    ) -> None:
        self._table = table
        self._wake = asyncio.Event()
        self._changed: dict[int, None] = {}  # positions of generations with news, in order
        self._interruption: TokasaurusError | None = None
        self.generations: list[Generation] = []
        for position, request in enumerate(requests):
            note = partial(self._note, position)
            self.generations.append(
                table.start(request, stream=stream, on_change=note, client=client)
            )
        self._unfinished = set(range(len(requests)))
        self._timer: asyncio.TimerHandle | None = None
        if timeout_s is not None:
            error, loop = TimeIsUp(timeout_s), asyncio.get_running_loop()
            self._timer = loop.call_later(timeout_s, self._interrupt, error)

    @contextlib.asynccontextmanager
    async def watched(self, receive: Receive) -> AsyncIterator[None]:
        """Within it, a disconnect ends the generations at once; after it, nothing runs any more."""
        watcher = asyncio.ensure_future(self._watch(receive))
        with self:
            try:
                yield
            finally:
                watcher.cancel()

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._abort()

    async def news(self) -> AsyncIterator[list[tuple[int, SampleOutput]]]:
        """For streams: (prompt's position, output), whenever there are some, until all is there.

        Raises:
            RequestError: the manager refuses a prompt.
            EngineDead: the engine died.
            ClientGone, TimeIsUp: as they say.
        """
        while self._unfinished:
            changed = await self._next_changes()
            outputs = [
                (position, output)
                for position in changed
                for output in self.generations[position].take_news()
            ]
            if outputs:
                yield outputs

    async def finish(self) -> None:
        """Returns when every generation has finished. Raises what ``news`` raises."""
        while self._unfinished:
            await self._next_changes()

    async def _next_changes(self) -> list[int]:
        await self._wake.wait()
        self._wake.clear()
        if self._interruption is not None:
            raise self._interruption
        changed, self._changed = list(self._changed), {}
        for position in changed:
            generation = self.generations[position]
            if generation.error is not None:
                raise generation.error
            if generation.finished:
                self._unfinished.discard(position)
        return changed

    def _note(self, position: int) -> None:
        self._changed[position] = None
        self._wake.set()

    async def _watch(self, receive: Receive) -> None:
        await _disconnect(receive)
        self._interrupt(ClientGone("the client disconnected"))

    def _interrupt(self, error: TokasaurusError) -> None:
        self._interruption = error
        self._abort()
        self._wake.set()

    def _abort(self) -> None:
        for generation in self.generations:
            if not generation.finished:
                self._table.abort(generation)


class EventStream(Response):
    """A stream of server-sent events.

    The status line waits for the first event: a request that fails before it gets an ordinary error.
    Later errors are events themselves. No comments, no multi-line data: some clients take every line
    for JSON.
    """

    media_type = "text/event-stream"

    def __init__(self, call: Call, request: RequestBody, writer: StreamWriter) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store"})
        self._call = call
        self._request = request
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        async with self._call.watched(receive):
            try:
                async for data in self._events():
                    if not started:
                        await self._start(send)
                        started = True
                    await self._send(send, data)
            except ClientGone:
                if not started:
                    raise  # nobody reads the answer, but it is counted
                return
            except TokasaurusError as error:
                told = renamed(error, self._request.field_names())
                if not started:
                    raise told from None
                await self._send(send, self._writer.failure(told))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        call, writer = self._call, self._writer
        async for outputs in call.news():
            chunks = (writer.chunk(call.generations, *output) for output in outputs)
            yield b"".join(chunks)
        yield writer.end(call.generations)

    async def _start(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})

    async def _send(self, send: Send, data: bytes) -> None:
        await send({"type": "http.response.body", "body": data, "more_body": True})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. It is cancelled when the client goes away. Raises ClientGone."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("the client disconnected")
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.wait({task})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def in_thread_if(heavy: bool, function: Callable[[], T]) -> T:
    """Calls a function, away from the event loop if it would hold it up for long."""
    return await asyncio.to_thread(function) if heavy else function()
