"""The web server of a process: uvicorn as the engine configures it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from tokasaurus.config.slices import ServerConfig
from tokasaurus.launch.http_protocol import connections
from tokasaurus.server.http.access_log import ACCESS_LOGGER, AccessLog
from tokasaurus.server.http.request_ids import RequestIds

__all__ = ["web_server"]

_KEEP_ALIVE_S = 75  # seconds that a connection without a request stays open
_FLUSH_S = 2  # seconds for answers and errors to reach their clients before connections are cut
_ACCEPTED_AT_ONCE = 2048  # connections, if one process accepts them


class _HTTPServer(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def web_server(
    config: ServerConfig,
    app: FastAPI,
    *,
    is_inner: bool = False,
    num_accepted: int = _ACCEPTED_AT_ONCE,
) -> uvicorn.Server:
    """The web server for an application.

    Args:
        config: the server's slice.
        app: the application.
        is_inner: its clients are HTTP processes of this engine.
        num_accepted: connections that it accepts at once; others may be accepted elsewhere.
    """
    level = config.uvicorn_log_level.upper()
    for logger in ("uvicorn", ACCESS_LOGGER):
        logging.getLogger(logger).setLevel(level)
    layers = RequestIds(app if is_inner else AccessLog(app))
    return _HTTPServer(
        uvicorn.Config(
            layers,
            http=connections(config.request_read_timeout_s),
            ws="none",
            log_config=None,  # logs go through the engine's own handler
            log_level=config.uvicorn_log_level,
            access_log=False,  # AccessLog knows more
            timeout_graceful_shutdown=_FLUSH_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
            lifespan="off",
            server_header=False,
            ssl_certfile=None if is_inner else config.ssl_certfile,
            ssl_keyfile=None if is_inner else config.ssl_keyfile,
            backlog=num_accepted,
        )
    )
