"""The web server of a process: uvicorn as the engine configures it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from tokasaurus.config.slices import ServerConfig
from tokasaurus.launch.http_protocol import Connection, Retirement, connections
from tokasaurus.launch.moving_connections import Heirs
from tokasaurus.server.http.access_log import ACCESS_LOGGER, AccessLog
from tokasaurus.server.http.request_ids import RequestIds

__all__ = ["WebServer", "web_server"]

_KEEP_ALIVE_S = 75  # seconds that a connection without a request stays open
_FLUSH_S = 2  # seconds for answers and errors to reach their clients before connections are cut
_ACCEPTED_AT_ONCE = 2048  # connections, if one process accepts them


_POLL_S = 0.02
# A connection that was accepted is known after its handshake, which takes a while with HTTPS.
_QUIET_S = 1.0


class WebServer(uvicorn.Server):
    """uvicorn without its signal handlers, since the supervisor handles signals; and it can retire.

    Args:
        config: uvicorn's.
        retirement: that of its connections.
    """

    def __init__(self, config: uvicorn.Config, retirement: Retirement) -> None:
        super().__init__(config)
        self._retirement = retirement
        self._adopting: set[asyncio.Task[None]] = set()

    async def wait_started(self) -> None:
        """Returns when connections are accepted."""
        while not self.started:
            await asyncio.sleep(_POLL_S)

    def adopt(self, moved: socket.socket, unread: bytes) -> None:
        """Serves a connection that another process had accepted. The server has started.

        Args:
            moved: its socket.
            unread: what that process has received and not read.
        """
        task = asyncio.get_running_loop().create_task(self._adopt(moved, unread))
        self._adopting.add(task)
        task.add_done_callback(self._adopting.discard)

    async def _adopt(self, moved: socket.socket, unread: bytes) -> None:
        loop, make = asyncio.get_running_loop(), self.config.http_protocol_class
        assert issubclass(make, Connection)
        _, connection = await loop.connect_accepted_socket(
            lambda: make(
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            ),
            moved,
        )
        connection.resume(unread)  # before it receives anything itself

    async def retire(self, heirs: Heirs | None = None) -> None:
        """Accepts no more connections, and returns when none is left.

        The listening socket stays open elsewhere, so a connection in its queue is not lost. With
        ``heirs``, a connection without TLS goes to one of them as soon as no request is in it. Any
        other connection gets one more answer, with ``Connection: close``; without a request it
        closes when it has been idle for as long as at any other time.
        """
        if not self.started:
            return
        loop = asyncio.get_running_loop()
        for server in self.servers:
            for each in server.sockets:
                loop.remove_reader(each.fileno())
        # asyncio has accepted some in this turn of the loop, and attaches them in the next one.
        await asyncio.sleep(_POLL_S)
        for server in self.servers:
            server.close()
        self._retirement.heirs, self._retirement.has_begun = heirs, True
        num_quiet = 0  # looks in a row
        while num_quiet * _POLL_S < _QUIET_S:
            num_quiet = 0 if self.server_state.connections else num_quiet + 1
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.retire()
            await asyncio.sleep(_POLL_S)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def web_server(
    config: ServerConfig,
    app: FastAPI,
    *,
    is_inner: bool = False,
    num_accepted: int = _ACCEPTED_AT_ONCE,
) -> WebServer:
    """The web server for an application.

    Args:
        config: the server's slice.
        app: the application.
        is_inner: its clients are HTTP processes of this engine.
        num_accepted: connections that it accepts at once; others may be accepted elsewhere.
    """
    level = config.uvicorn_log_level
    logging.getLogger(ACCESS_LOGGER).setLevel(level.upper())
    # Its lines at INFO are about its own start and end. A process may have several web servers.
    level = "warning" if level == "info" else level
    layers = RequestIds(app if is_inner else AccessLog(app))
    retirement = Retirement()
    return WebServer(
        uvicorn.Config(
            layers,
            http=connections(config.request_read_timeout_s, retirement),
            ws="none",
            log_config=None,  # logs go through the engine's own handler
            log_level=level,
            access_log=False,  # AccessLog knows more
            timeout_graceful_shutdown=_FLUSH_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
            lifespan="off",
            server_header=False,
            ssl_certfile=None if is_inner else config.ssl_certfile,
            ssl_keyfile=None if is_inner else config.ssl_keyfile,
            backlog=num_accepted,
        ),
        retirement,
    )
