"""Routes past FastAPI, which adds a third to the cost of a small request.

The same handlers are routes of the application too, for its OpenAPI document and for other methods.
Here a POST to one of their paths goes straight to the handler::

    POST /v1/completions ──▶ handler(request) ──▶ response
    anything else        ──▶ the application
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokasaurus.server.errors import error_status
from tokasaurus.server.http.answers import error_answer
from tokasaurus.server.http.request_ids import REQUEST_ID

__all__ = ["DirectRoutes", "Handler"]

log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


class DirectRoutes:
    """An ASGI layer.

    Args:
        app: for everything else.
        handlers: by path, for POST.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler]) -> None:
        self._app = app
        self._handlers = handlers
        # Starlette names the route in the scope, too; requests are counted by it.
        self._routes = {path: Route(path, handler) for path, handler in handlers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = None
        if scope["type"] == "http" and scope["method"] == "POST":
            handler = self._handlers.get(scope["path"])
        if handler is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = self._routes[scope["path"]]
        has_started = False

        async def sending(message: Message) -> None:
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            response = await handler(Request(scope, receive))
            await response(scope, receive, sending)
        except Exception as error:
            if has_started:  # too late for another answer, so the connection is cut
                raise
            if error_status(error) == 500:
                log.exception("%s failed, request %s", scope["path"], scope.get(REQUEST_ID))
            await error_answer(error)(scope, receive, send)
