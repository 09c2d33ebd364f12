"""The routes of the operations: whatever runs on the engine, one request at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from fastapi import APIRouter, Request, Response

from tokasaurus.server.http.access import max_priority_of, share_of
from tokasaurus.server.http.bodies import read_json
from tokasaurus.server.http.direct import Handler
from tokasaurus.server.http.disconnects import until_disconnect, watched
from tokasaurus.server.http.event_stream import EventStream
from tokasaurus.server.http.request_ids import REQUEST_ID
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.operations.operation import Operation
from tokasaurus.server.operations.schemas import body_reference

__all__ = ["Endpoints"]


class Endpoints:
    """The routes.

    Args:
        executor: carries out the operations.

    Attributes:
        handlers: of the operations, by path.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.handlers: Mapping[str, Handler] = {
            path: self._handler(operation) for path, operation in executor.operations.items()
        }

    def router(self) -> APIRouter:
        router = APIRouter()
        for path, operation in self._executor.operations.items():
            router.add_api_route(
                path,
                self.handlers[path],
                methods=["POST"],
                name=path.removeprefix("/"),
                description=operation.summary,
                response_model=None,
                openapi_extra={"requestBody": body_reference(*operation.schemas)},
            )
        return router

    def _handler(self, operation: Operation) -> Handler:
        executor = self._executor

        async def handler(request: Request) -> Response:
            share = partial(share_of, request.scope)
            name = request.scope.get(REQUEST_ID, "")
            body, limit = await read_json(request), max_priority_of(request.scope)
            waiting = partial(until_disconnect, request.receive)
            execution = await executor.execute(operation, body, share, limit, name, waiting)
            events = execution.events()
            if events is not None:
                return EventStream(events, execution)
            with execution, watched(request.receive, execution.interrupt):
                content = await execution.answer()
            return Response(content, media_type="application/json")

        return handler
