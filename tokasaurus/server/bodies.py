"""Reads the bodies of HTTP requests."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from tokasaurus.errors import RequestError
from tokasaurus.server.http_errors import BodyTooLarge, ClientGone, WrongMediaType

__all__ = ["MAX_BODY_BYTES", "read_json"]

MAX_BODY_BYTES = 256 << 20


async def read_json(request: Request) -> Any:
    """Reads and decodes a request's body.

    Only what is declared to be JSON is read: a browser sends anything else to any address without
    asking first.

    Raises:
        RequestError: it is no JSON, or too large.
        ClientGone: as it says.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise WrongMediaType(
            f"the body must be sent with Content-Type: application/json, not {media_type or 'nothing'!r}"
        )
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > MAX_BODY_BYTES:
                raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect:
        raise ClientGone("the client disconnected") from None
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is no valid JSON: {error}") from None
