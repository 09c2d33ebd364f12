"""Counts answers by route and status."""

from __future__ import annotations

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CountRequests"]

_OTHER_PATHS = "other"


class CountRequests:
    """A plain ASGI layer.

    Args:
        app: the layer inside.
        counter: with the labels path and status.
    """

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self._app = app
        self._counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # if nothing is answered here, the layer outside answers this

        def noting(message: Message) -> object:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self._app(scope, receive, noting)  # type: ignore[arg-type]
        finally:
            # The route, not the path: clients can invent any number of paths.
            path = getattr(scope.get("route"), "path", _OTHER_PATHS)
            self._counter.labels(path, str(status)).inc()
