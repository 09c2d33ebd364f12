"""A name for each request, ``X-Request-Id``: the client's own, or one of ours; every answer carries it.

The outermost layer: errors of the layers within it are answered with the name, too.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["REQUEST_ID", "REQUEST_ID_HEADER", "RequestIds", "new_request_id"]

log = logging.getLogger(__name__)

REQUEST_ID = "tokasaurus.request_id"
"""Where a scope has the name, a text."""

REQUEST_ID_HEADER = b"x-request-id"
_SANE = re.compile(rb"[!-~]{1,128}")  # what goes into a log goes on one line


def new_request_id() -> bytes:
    """One of ours."""
    return b"req_" + secrets.token_hex(16).encode()


class RequestIds:
    """A plain ASGI layer.

    Args:
        app: what is inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID_HEADER), b"")
        is_sane = _SANE.fullmatch(given) is not None
        request_id = given if is_sane else new_request_id()
        scope[REQUEST_ID] = request_id.decode()

        def naming(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (REQUEST_ID_HEADER, request_id)]
            return send(message)

        try:
            await self._app(scope, receive, naming)
        except Exception:  # which is answered already, and logged by the web server
            log.error("the request %s failed", scope[REQUEST_ID])
            raise
