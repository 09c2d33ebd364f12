"""Logs a line for each request when its answer has ended.

::

    INFO    server   10.0.0.7:51544 "POST /v1/completions HTTP/1.1" 200 in 0.412 s [request req_...]

What watches the engine asks it every few seconds, so these lines are at DEBUG.
"""

from __future__ import annotations

import logging
import time
import urllib.parse

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["ACCESS_LOGGER", "AccessLog"]

ACCESS_LOGGER = "tokasaurus.access"
"""The name of the logger; its level is ``uvicorn_log_level``."""

log = logging.getLogger(ACCESS_LOGGER)

_PROBES = frozenset({"/health", "/ping", "/metrics"})
_PROBE_STATUSES = frozenset({200, 503})  # it is well, or it says what is not


class AccessLog:
    """A plain ASGI layer, inside the one that names requests.

    Args:
        app: the layer inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500  # if nothing is answered here, the web server answers this

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            _log_line(scope, status, time.perf_counter() - started)


def _log_line(scope: Scope, status: int, seconds: float) -> None:
    is_probe = scope["path"] in _PROBES and status in _PROBE_STATUSES
    level = logging.DEBUG if is_probe else logging.INFO
    if not log.isEnabledFor(level):
        return
    client = "{}:{}".format(*scope["client"]) if scope.get("client") else "-"
    path = urllib.parse.quote(scope["path"])
    if scope["query_string"]:
        path += f"?{scope['query_string'].decode('ascii', 'backslashreplace')}"
    fields = {
        "client": client,
        "method": scope["method"],
        "path": path,
        "status": status,
        "seconds": round(seconds, 6),
    }
    log.log(
        level,
        '%s "%s %s HTTP/%s" %d in %.3f s',
        client,
        scope["method"],
        path,
        scope["http_version"],
        status,
        seconds,
        extra={"fields": fields},
    )
