"""Streams of server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokasaurus.errors import TokasaurusError
from tokasaurus.server.errors import ClientGone
from tokasaurus.server.http.disconnects import watched

__all__ = ["EventStream", "Work"]


class Work(Protocol):
    """The work behind a stream; it ends with a ``with`` block, or by an interruption."""

    def __enter__(self) -> object: ...

    def __exit__(self, *raised: object) -> None: ...

    def interrupt(self, error: TokasaurusError) -> None:
        """Makes the events end with this error."""


class EventStream(Response):
    """A stream of server-sent events.

    The status line waits for the first event, so that a request that fails before it gets an
    ordinary error. There are no comments and no multi-line data: some clients take every line for
    JSON.

    Args:
        events: as they are sent. An error before the first event is raised; a later error is an
            event itself, except ClientGone.
        work: brings the events. It ends with the stream, and when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], work: Work) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store"})
        self._events = events
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        with self._work, watched(receive, self._work.interrupt):
            try:
                async for data in self._events:
                    if not started:
                        await self._start(send)
                        started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except ClientGone:
                if not started:
                    raise  # so that the request is counted; nothing reads the answer
                return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
