"""A port of its own for a replica whose engine others have, too.

veRL tells replicas apart by their addresses. Two replicas with one engine need two addresses, and
an engine behind HTTPS or a path needs one that veRL can write as host:port.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from urllib.parse import urlsplit

__all__ = ["Forwarding"]

_CHUNK_BYTES = 1 << 16


class Forwarding:
    """Passes connections on to an engine, byte by byte.

    Args:
        url: of the engine.
        host: the address to listen on. What reaches this port reaches the engine.
    """

    def __init__(self, url: str, host: str) -> None:
        parts = urlsplit(url)
        is_https = parts.scheme == "https"
        self._to = (parts.hostname or "localhost", parts.port or (443 if is_https else 80))
        self._ssl = ssl.create_default_context() if is_https else None
        self._host = host
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """Begins to listen, and returns the port."""
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Closes the port and all connections."""
        if self._server is not None:
            self._server.close()
        for task in [*self._connections]:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        with contextlib.suppress(OSError), contextlib.closing(writer):
            to_engine = await asyncio.open_connection(*self._to, ssl=self._ssl)
            with contextlib.closing(to_engine[1]):
                await asyncio.gather(_copy(reader, to_engine[1]), _copy(to_engine[0], writer))
        self._connections.discard(task)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copies to the end of what is read, and says so to the other side."""
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
    with contextlib.suppress(OSError):
        if writer.can_write_eof():
            writer.write_eof()
