"""The routes of the operations: whatever runs on the engine, one request at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from tokasaurus.server.http.access import max_priority_of, share_of
from tokasaurus.server.http.bodies import read_json
from tokasaurus.server.http.direct import Handler
from tokasaurus.server.http.disconnects import until_disconnect, watched
from tokasaurus.server.http.event_stream import EventStream
from tokasaurus.server.http.request_ids import REQUEST_ID
from tokasaurus.server.http.trace_context import trace_headers
from tokasaurus.server.operations.executor import Executor
from tokasaurus.server.operations.operation import Operation
from tokasaurus.server.operations.schemas import body_reference
from tokasaurus.server.protocols.table import BATCH_OR_CHAT
from tokasaurus.server.routes.synchronous_batch import BATCH_SCHEMA, SynchronousBatch, is_batch

__all__ = ["Endpoints"]


class Endpoints:
    """The routes.

    Args:
        executor: carries out the operations.
        batch: answers many chats on the route that takes one or many.

    Attributes:
        handlers: of the operations, by path.
    """

    def __init__(self, executor: Executor, batch: SynchronousBatch) -> None:
        self._executor = executor
        self._batch = batch
        self.handlers: Mapping[str, Handler] = {
            path: self._handler(operation) for path, operation in executor.operations.items()
        }
        chat = executor.operations.get(BATCH_OR_CHAT)
        if chat is not None:
            self.handlers = {**self.handlers, BATCH_OR_CHAT: self._batch_or_chat(chat)}

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
                openapi_extra={"requestBody": _body_of(operation)},
            )
        return router

    def _handler(self, operation: Operation) -> Handler:
        async def handler(request: Request) -> Response:
            return await self._answer(operation, request, await read_json(request))

        return handler

    def _batch_or_chat(self, chat: Operation) -> Handler:
        async def handler(request: Request) -> Response:
            body = await read_json(request)
            if is_batch(body):
                return await self._batch.answer_to(request, body)
            return await self._answer(chat, request, body)

        return handler

    async def _answer(self, operation: Operation, request: Request, body: Any) -> Response:
        share, limit = partial(share_of, request.scope), max_priority_of(request.scope)
        name = request.scope.get(REQUEST_ID, "")
        waiting = partial(until_disconnect, request.receive)
        headers = trace_headers(request.scope)
        execution = await self._executor.execute(
            operation, body, share, limit, name, waiting, headers
        )
        events = execution.events()
        if events is not None:
            return EventStream(events, execution)
        with execution, watched(request.receive, execution.interrupt):
            content = await execution.answer()
        return Response(content, media_type="application/json")


def _body_of(operation: Operation) -> dict[str, Any]:
    """The part of the OpenAPI document that says what the route reads."""
    body = body_reference(*operation.schemas)
    if operation.path == BATCH_OR_CHAT:
        content = body["content"]["application/json"]
        content["schema"] = {"anyOf": [content["schema"], BATCH_SCHEMA]}
    return body
