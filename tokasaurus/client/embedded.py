"""A transport whose other end is an engine in this process: no port is opened.

httpx has one for ASGI applications, which holds an answer back until it is complete. Streams need
theirs piece by piece, and a stream that is left must end its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx2 as httpx

if TYPE_CHECKING:
    from tokasaurus.launch.async_llm import AsyncLLM

__all__ = ["EMBEDDED_URL", "EngineTransport"]

ASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]

EMBEDDED_URL = "http://engine"  # a name that no socket sees


class EngineTransport(httpx.AsyncBaseTransport):
    """Hands requests to an engine, which the first one loads.

    Args:
        llm: the engine, which ends with the transport.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._loading = asyncio.Lock()
        self._app: ASGIApp | None = None

    async def load(self) -> ASGIApp:
        """Loads the model, unless it is.

        Raises:
            ModelError, ConfigError, EngineError: it cannot be loaded.
        """
        async with self._loading:
            if self._app is None:
                self._app = await self._llm.asgi_app()
            return self._app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        exchange = _Exchange(await self.load(), request, await request.aread())
        status, headers = await exchange.head()
        return httpx.Response(status, headers=headers, stream=exchange)

    async def aclose(self) -> None:
        await self._llm.close()


class _Exchange(httpx.AsyncByteStream):
    """One request and its answer, whose body comes as the application writes it."""

    def __init__(self, app: ASGIApp, request: httpx.Request, body: bytes) -> None:
        self._body: bytes | None = body
        self._head: asyncio.Future[tuple[int, Any]] = asyncio.get_running_loop().create_future()
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._client_gone = asyncio.Event()
        self._task = asyncio.create_task(self._run(app, _scope(request)))

    async def head(self) -> tuple[int, Any]:
        """Status and headers."""
        try:
            return await self._head
        except BaseException:
            await self.aclose()
            raise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            yield piece
        await self._task  # raises what the application raised

    async def aclose(self) -> None:
        """Tells the application that its client has gone, if it has not ended."""
        self._client_gone.set()
        await asyncio.wait([self._task])

    async def _run(self, app: ASGIApp, scope: MutableMapping[str, Any]) -> None:
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            broken = httpx.RemoteProtocolError(f"the engine has failed: {error!r}")
            if not self._head.done():
                self._head.set_exception(broken)
                return
            if not self._client_gone.is_set():
                raise broken from error
        finally:
            self._pieces.put_nowait(None)
            if not self._head.done():
                self._head.set_exception(httpx.RemoteProtocolError("the engine has not answered"))

    async def _receive(self) -> MutableMapping[str, Any]:
        if self._body is None:
            await self._client_gone.wait()
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if self._client_gone.is_set():
            raise OSError("the client has gone")  # as web servers do
        if message["type"] == "http.response.start":
            if not self._head.done():  # otherwise it was given up
                self._head.set_result((message["status"], message.get("headers", [])))
        elif message["type"] == "http.response.body":
            if message.get("body"):
                self._pieces.put_nowait(message["body"])
            if not message.get("more_body", False):
                self._pieces.put_nowait(None)


def _scope(request: httpx.Request) -> dict[str, Any]:
    url = request.url
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": url.scheme,
        "path": url.path,
        "raw_path": url.raw_path.split(b"?")[0],
        "query_string": url.query,
        "server": (url.host, url.port or 80),
        "client": ("127.0.0.1", 1),
        "root_path": "",
    }
