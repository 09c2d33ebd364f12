"""Names each request, in ``X-Request-Id``: by the client's name for it, or by a new one.

Every answer carries the name, and so does what is logged meanwhile. This is the outermost layer, so
errors of the others carry it, too.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokasaurus.observability.request_names import serving

__all__ = ["REQUEST_ID", "REQUEST_ID_HEADER", "RequestIds", "new_request_id", "request_id_of"]

log = logging.getLogger(__name__)

REQUEST_ID = "tokasaurus.request_id"
"""The key under which a scope has the name, a text."""

REQUEST_ID_HEADER = b"x-request-id"
# A name goes into the log, on one line.
_SANE = re.compile(rb"[!-~]{1,128}")


def new_request_id() -> bytes:
    """A new name."""
    return b"req_" + secrets.token_hex(16).encode()


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The client's name for a request, or a new one if there is none that a log can take."""
    given = next((value for name, value in headers if name == REQUEST_ID_HEADER), b"")
    return given if _SANE.fullmatch(given) is not None else new_request_id()


class RequestIds:
    """A plain ASGI layer.

    Args:
        app: the layer inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        scope[REQUEST_ID] = request_id.decode()

        def naming(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER, request_id)]
            return send(message)

        with serving(scope[REQUEST_ID]):
            try:
                await self._app(scope, receive, naming)
            except Exception:  # the client has its answer, and the web server logs the error
                log.error("the request %s failed", scope[REQUEST_ID])
                raise
