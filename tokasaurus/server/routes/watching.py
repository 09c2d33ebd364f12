"""What the page reads: a snapshot of the engine, a stream of them, and the end of a request."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from tokasaurus.batch.runner import BatchRunner
from tokasaurus.errors import NotFound
from tokasaurus.server.errors import Forbidden
from tokasaurus.server.http.access import may_end
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.broadcast import Broadcast
from tokasaurus.server.http.event_stream import EventStream
from tokasaurus.server.overview import Overview
from tokasaurus.server.state import EngineState

__all__ = ["WatchingRoutes"]

_INTERVAL_S = 1.0
MAX_VIEWERS = 256
_OVER = ("draining", "dead")


class WatchingRoutes:
    """The routes.

    Args:
        state: of the engine.
        batches: runs batches; None where there are none.
    """

    def __init__(self, state: EngineState, batches: BatchRunner | None) -> None:
        self._state = state
        self._overview = Overview(state, batches)
        self.broadcast = Broadcast(self._first, self._next, _INTERVAL_S, MAX_VIEWERS)

    def router(self) -> APIRouter:
        router = APIRouter()
        add = router.add_api_route
        add("/v1/engine", self.snapshot, methods=["GET"], response_model=None)
        # A stream without an end is nothing that a client of the document calls.
        add("/v1/engine/events", self.events, methods=["GET"], include_in_schema=False)
        add(
            "/v1/engine/requests/{request_id}/cancel",
            self.cancel,
            methods=["POST"],
            response_model=None,
        )
        return router

    async def snapshot(self) -> Response:
        """What the engine does, what limits it, and what it forecasts, at this moment."""
        return json_answer(await self._overview.snapshot())

    async def events(self) -> EventStream:
        """The same every second: first ``history``, with the last ten minutes, then ``now``."""
        viewer = await self.broadcast.join()
        return EventStream(viewer.events(), viewer)

    async def cancel(self, request: Request, request_id: str) -> Response:
        """Ends a prompt in flight; its client gets the tokens so far, and "abort" as the reason.

        A client may end its own prompts. An admin key may end all, and so may a client on the
        machine of an engine without keys.
        """
        generations = self._state.engine().generations
        is_number = request_id.isascii() and request_id.isdigit() and len(request_id) < 20
        generation = generations.find(int(request_id)) if is_number else None
        if generation is None:
            raise NotFound(f"no request {request_id!r} is in flight", "request_id")
        if not may_end(request.scope, generation.client):
            raise Forbidden("this request is another client's: use its key, or an admin key")
        generations.cut_short(generation)
        return json_answer({"id": request_id, "cancelled": True})

    async def _first(self) -> bytes:
        snapshot = await self._overview.snapshot()
        return _event("history", self._overview.history()) + _event("now", snapshot)

    async def _next(self) -> bytes | None:
        if self._state.status in _OVER or self._state.is_retiring:
            return None
        return _event("now", await self._overview.snapshot())


def _event(name: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))
