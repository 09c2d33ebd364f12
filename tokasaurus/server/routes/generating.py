"""The routes: those of the operations, and what the engine says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from tokasaurus.config.slices import ServerConfig
from tokasaurus.server.errors import UnknownModel
from tokasaurus.server.http.access import share_of
from tokasaurus.server.http.answers import json_answer
from tokasaurus.server.http.bodies import read_json
from tokasaurus.server.http.direct import Handler
from tokasaurus.server.operations.calls import EventStream
from tokasaurus.server.operations.execution import Answers
from tokasaurus.server.operations.operation import Operation
from tokasaurus.server.operations.schemas import body_reference
from tokasaurus.server.operations.writer import StreamWriter
from tokasaurus.server.protocols.table import OPERATIONS
from tokasaurus.server.state import EngineState
from tokasaurus.version import __version__

__all__ = ["Endpoints"]


class Endpoints:
    """The handlers of one application.

    Args:
        config: the server's slice.
        state: of the engine.
        answers: carries out what generates.

    Attributes:
        operations: what generates, by path.
    """

    def __init__(self, config: ServerConfig, state: EngineState, answers: Answers) -> None:
        self._config = config
        self._state = state
        self._answers = answers
        self._created = int(time.time())
        self.operations: Mapping[str, Handler] = {
            path: self._generating(operation) for path, operation in OPERATIONS.items()
        }

    def router(self) -> APIRouter:
        router = APIRouter()
        get: list[tuple[str, Callable[..., Any]]] = [
            ("/ping", self.ping),
            ("/health", self.health),
            ("/version", self.version),
            ("/metrics", self.metrics),
            ("/v1/models", self.models),
            ("/v1/models/{model_id:path}", self.model),
        ]
        for path, handler in get:
            router.add_api_route(path, handler, methods=["GET"], response_model=None)
        for path, handler in self.operations.items():
            operation = OPERATIONS[path]
            router.add_api_route(
                path,
                handler,
                methods=["POST"],
                name=path.removeprefix("/"),
                description=operation.summary,
                response_model=None,
                openapi_extra={"requestBody": body_reference(*operation.schemas)},
            )
        return router

    # --- generating --------------------------------------------------------------------------------

    def _generating(self, operation: Operation) -> Handler:
        """The handler of an operation."""
        answers = self._answers

        async def handler(request: Request) -> Response:
            asked = answers.read(operation, await read_json(request))
            client = share_of(request.scope, asked.user)
            answers.check_room(client)  # a flood of refusals is not to cost what tokenizing does
            task = await answers.prepare(operation, asked)
            answers.check_room(client)  # others may have come in the meantime
            call = answers.start(task, client)
            if task.body.streams:
                assert isinstance(task.writer, StreamWriter)
                return EventStream(call, task.body, task.writer)
            async with call.watched(request.receive):
                content = await answers.finish(task, call)
            return Response(content, media_type="application/json")

        return handler

    # --- about the engine --------------------------------------------------------------------------

    async def ping(self) -> Response:
        """The server process lives; says nothing of the model."""
        return json_answer({"message": "pong"})

    async def health(self) -> Response:
        """200 when requests are served."""
        status = self._state.status
        body = {"status": status, "running": self._state.num_running}
        return json_answer(body, 200 if status == "ok" else 503)

    async def version(self) -> Response:
        return json_answer({"version": __version__})

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self._state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        """The one model."""
        self._state.check()
        return json_answer({"object": "list", "data": [self._model()]})

    async def model(self, model_id: str) -> Response:
        self._state.check()
        if model_id != self._config.model_name:
            raise UnknownModel(model_id)
        return json_answer(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._config.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "tokasaurus",
            "root": self._config.model_root,
            "max_model_len": self._config.max_request_tokens,
        }
