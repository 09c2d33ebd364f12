"""Passes requests on to another web server of this machine, and its answers back.

The other one listens on a Unix socket that only this engine's processes can reach, so it trusts
what comes: keys, hosts and sizes of bodies are checked before. Bodies pass in pieces both ways.
Each request has a connection of its own, which ends with its client's.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import httptools
from starlette.types import ASGIApp, Receive, Scope, Send

from tokasaurus.errors import EngineNotReady
from tokasaurus.server.errors import ClientGone
from tokasaurus.server.http.access import CLIENT, MAY_END_ALL
from tokasaurus.server.http.answers import error_answer
from tokasaurus.server.http.request_ids import REQUEST_ID, REQUEST_ID_HEADER

__all__ = ["PASSED_ON", "KnownClients", "PassOn"]

PASSED_ON = "tokasaurus.passed_on"
"""Set in the scope of a request that the other server answers."""

# Who has sent the request, and whether the client may end requests of others.
_CLIENT_HEADER = b"tokasaurus-client"
_MAY_END_ALL_HEADER = b"tokasaurus-may-end-all"
_PIECE_BYTES = 1 << 16
# Of one connection, or made anew by the layers around this one.
_NOT_PASSED = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"transfer-encoding",
        b"expect",
        REQUEST_ID_HEADER,
        _CLIENT_HEADER,
        _MAY_END_ALL_HEADER,
    }
)
_NOT_PASSED_BACK = frozenset({b"connection", b"transfer-encoding", b"date", REQUEST_ID_HEADER})


class PassOn:
    """An ASGI application.

    Args:
        path: of the Unix socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not await self.pass_on(scope, receive, send):
            error = EngineNotReady("the engine is starting or has ended; try again in a moment")
            await error_answer(error)(scope, receive, send)

    async def pass_on(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Passes a request on; returns False, and has done nothing, if nothing listens there."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(self._path))
        except OSError:
            return False
        await self._relay(reader, writer, scope, receive, send)
        return True

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        scope[PASSED_ON] = True
        is_chunked = any(name == b"transfer-encoding" for name, _ in scope["headers"])
        writer.write(_head(scope, is_chunked))
        body = asyncio.create_task(_pass_body(receive, writer, is_chunked))
        answer = _Answer(send, has_body=scope["method"] != "HEAD")
        try:
            while not answer.is_whole:
                data = await reader.read(_PIECE_BYTES)
                if not data and body.done() and body.exception() is None:
                    if answer.has_begun:
                        return
                    raise ClientGone("the client disconnected")
                await answer.feed(data)
        finally:
            body.cancel()
            writer.close()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await body


class KnownClients:
    """The ASGI layer at the other end: it notes who has sent a request that was passed on.

    Args:
        app: the layer inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            scope[CLIENT] = headers.get(_CLIENT_HEADER, b"").decode("latin-1")
            scope[MAY_END_ALL] = _MAY_END_ALL_HEADER in headers
        await self._app(scope, receive, send)


def _head(scope: Scope, is_chunked: bool) -> bytes:
    target = scope.get("raw_path") or scope["path"].encode()
    if scope["query_string"]:
        target += b"?" + scope["query_string"]
    lines = [scope["method"].encode() + b" " + target + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in scope["headers"] if name not in _NOT_PASSED]
    lines.append(REQUEST_ID_HEADER + b": " + scope.get(REQUEST_ID, "").encode())
    lines.append(_CLIENT_HEADER + b": " + scope.get(CLIENT, "").encode())
    if scope.get(MAY_END_ALL):
        lines.append(_MAY_END_ALL_HEADER + b": yes")
    lines.append(b"connection: close")
    if is_chunked:
        lines.append(b"transfer-encoding: chunked")
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def _pass_body(receive: Receive, writer: asyncio.StreamWriter, is_chunked: bool) -> None:
    """Passes the body on, then waits for the client to disconnect, and returns when it has."""
    has_more = True
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            writer.close()  # which ends the answer, too
            return
        data = message.get("body", b"")
        if data:
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if is_chunked else data)
        if has_more and not message.get("more_body", False):
            has_more = False
            if is_chunked:
                writer.write(b"0\r\n\r\n")
        await writer.drain()


class _Answer:
    """Parses an answer, and sends it in pieces.

    Attributes:
        is_whole: nothing more comes.
        has_begun: its head was sent.
    """

    def __init__(self, send: Send, has_body: bool) -> None:
        self.is_whole = False
        self._send = send
        self._has_body = has_body
        self._headers: list[tuple[bytes, bytes]] = []
        self._pieces: list[bytes] = []
        self.has_begun = self._has_head = False
        self._parser = httptools.HttpResponseParser(self)

    async def feed(self, data: bytes) -> None:
        """Takes what has come; nothing at its end. Raises ConnectionError if that is too soon."""
        if data:
            self._parser.feed_data(data)
        elif not self._has_head or self._has_body:
            raise ConnectionError("the server's answer ended too soon")
        if self._has_head and not self.has_begun:
            self.has_begun = True
            status = self._parser.get_status_code()
            start = {"type": "http.response.start", "status": status, "headers": self._headers}
            await self._send(start)
            self.is_whole |= not self._has_body
        if not self.has_begun:
            return
        piece, self._pieces = b"".join(self._pieces), []
        if piece or self.is_whole:
            more = {"type": "http.response.body", "body": piece, "more_body": not self.is_whole}
            await self._send(more)

    # --- called by the parser ---------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in _NOT_PASSED_BACK:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self.is_whole = True
