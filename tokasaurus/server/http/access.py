"""Checks keys and body sizes before anything is read or parsed.

It knows keys by their digests only, and nothing of what requests are about. It is a plain ASGI
layer, which looks at the headers once, and counts a body's bytes only if they are not declared.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokasaurus.config.slices import ServerConfig
from tokasaurus.server.errors import BodyTooLarge, Unauthorized
from tokasaurus.server.http.answers import error_answer

__all__ = ["CLIENT", "OPEN_PATHS", "Access", "share_of"]

OPEN_PATHS = frozenset({"/ping", "/health"})
"""Paths that need no key: they are for load balancers, and only say whether the engine serves."""

CLIENT = "tokasaurus.client"
"""Where a scope names the client: a text for each key or, if no key is needed, for each address."""

_KEY = "key "
_BEARER = b"bearer "


def share_of(scope: Scope, user: str | None) -> str:
    """The client whose share of the engine a request takes.

    That is its key; without keys, the user that it names; without a user, its address. With keys,
    the user does not count, since a client could name another one each time.
    """
    client: str = scope.get(CLIENT, "")
    return client if user is None or client.startswith(_KEY) else f"user {user}"


class Access:
    """Refuses requests without a key, and bodies that are too large.

    Args:
        app: the layer inside.
        config: the server's slice.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._digests: Sequence[bytes] = [bytes.fromhex(each) for each in config.api_key_digests]
        self._max_body_bytes = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        authorization, num_bytes, is_chunked = b"", 0, False
        for name, value in scope["headers"]:
            if name == b"authorization":
                authorization = value
            elif name == b"content-length":
                num_bytes = int(value)
            elif name == b"transfer-encoding":
                is_chunked = True
        try:
            scope[CLIENT] = self._client(scope, authorization)
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
        except (Unauthorized, BodyTooLarge) as error:
            await error_answer(error)(scope, receive, send)
            return
        if is_chunked:
            receive = self._counted(receive)
        await self._app(scope, receive, send)

    def _client(self, scope: Scope, authorization: bytes) -> str:
        """The name of the client. Raises Unauthorized."""
        if not self._digests or scope["path"] in OPEN_PATHS:
            address = scope.get("client")
            return f"address {address[0]}" if address else ""
        if authorization[: len(_BEARER)].lower() != _BEARER:
            raise Unauthorized("an API key is needed here: send Authorization: Bearer KEY")
        digest = hashlib.sha256(authorization[len(_BEARER) :].strip()).digest()
        known = None
        for each in self._digests:  # all of them, so that the time says nothing of which one fits
            if hmac.compare_digest(each, digest):
                known = each
        if known is None:
            raise Unauthorized("the API key is wrong")
        return f"{_KEY}{known.hex()}"

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than max_body_bytes={self._max_body_bytes}")

    def _counted(self, receive: Receive) -> Receive:
        """Receives a body in chunks. Raises BodyTooLarge where the body is read."""
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted
