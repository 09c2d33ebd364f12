"""Reads the bodies of HTTP requests."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from tokasaurus import untrusted_json
from tokasaurus.errors import RequestError
from tokasaurus.server.errors import ClientGone, WrongMediaType

__all__ = ["read_json", "read_optional_json", "refuse_compressed"]


def refuse_compressed(request: Request) -> None:
    """Raises WrongMediaType if the body is compressed.

    A small compressed body could hold any number of bytes.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise WrongMediaType(f"the body must not be compressed; it has Content-Encoding: {coding}")


async def read_json(request: Request) -> Any:
    """Reads and decodes a request's body.

    Only a body that is declared to be JSON is read: browsers send anything else to any address
    without asking first.

    Raises:
        RequestError: the body is not JSON.
        WrongMediaType: the body is compressed, or declared to be something else.
        ClientGone: the client disconnected.
    """
    refuse_compressed(request)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        sent = f"not {media_type!r}" if media_type else "and it had none"
        raise WrongMediaType(f"the body must be sent with Content-Type: application/json, {sent}")
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
    except ClientDisconnect:
        raise ClientGone("the client disconnected") from None
    try:
        return untrusted_json.decode(data)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None


async def read_optional_json(request: Request) -> Any:
    """The same, where a missing body counts as an empty object."""
    try:
        is_missing = not await request.body()
    except ClientDisconnect:
        raise ClientGone("the client disconnected") from None
    return {} if is_missing else await read_json(request)
