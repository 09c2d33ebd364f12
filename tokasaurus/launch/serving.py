"""The server's process: uvicorn, the manager's messages and the lifeline, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from tokasaurus.batch.runner import BatchRunner
from tokasaurus.config.slices import ServerConfig
from tokasaurus.launch.http_protocol import connections
from tokasaurus.launch.lifeline import Assignment, Lifeline
from tokasaurus.launch.text_process import TextProcess
from tokasaurus.server.app import create_app
from tokasaurus.server.http.request_ids import RequestIds
from tokasaurus.server.reports import report
from tokasaurus.server.routes.batches import batch_runner
from tokasaurus.server.state import EngineState
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer

__all__ = ["http_server", "serve"]

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75  # seconds that a connection without a request stays open
_FLUSH_S = 2  # seconds for answers and errors to reach their clients before connections are cut


class _HTTPServer(uvicorn.Server):
    """uvicorn without its signal handlers: the supervisor handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(assignment: Assignment, lifeline: Lifeline) -> None:
    """Serves until the lifeline says stop, says that another process died, or ends."""
    # Each connection is a file, and the usual limit is a thousand of them.
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names a limit that it refuses
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    asyncio.run(_Serving(assignment, lifeline).run())


class _Serving(TextProcess):
    def __init__(self, assignment: Assignment, lifeline: Lifeline) -> None:
        super().__init__(assignment, lifeline)
        assert assignment.listener_fd is not None
        # Made from the descriptor alone, the socket knows that it is TCP; otherwise asyncio would
        # not set TCP_NODELAY on its connections.
        self._listener = socket.socket(fileno=os.dup(assignment.listener_fd))
        self._batches = batch_runner(self.config, self.state)
        directory = Path(assignment.directory)
        self._http = http_server(self.config, self.state, self._batches, directory)
        self._reports: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self.watch()
        # It listens from the start, so that clients get a 503 while the model loads, not a refusal.
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        work = asyncio.create_task(self.run_ring())
        ended, _ = await asyncio.wait({http, work}, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        if self._reports is not None:
            self._reports.cancel()
        try:
            for task in ended:
                task.result()  # raises what ended it
            await asyncio.gather(http, work, return_exceptions=True)
        finally:
            await self._batches.close()
        self.unwatch()

    async def on_ready(self, preparer: Preparer, generations: Generations) -> None:
        config = self.config
        await self._batches.start()
        scheme = "http" if config.ssl_certfile is None else "https"
        log.info("ready: %s at %s://%s:%d/v1", config.model_name, scheme, config.host, config.port)
        self._reports = asyncio.create_task(report(config, generations))

    def on_dead(self, reason: str) -> None:
        self._http.should_exit = True

    def on_stop(self) -> None:
        self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        self.state.drain()
        await self._batches.stop()  # they go on at the next start
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.state.drained(), self.config.shutdown_timeout_s)
        if self.state.num_running:
            self._cut_short()
        self._http.should_exit = True

    def _cut_short(self) -> None:
        """Ends the requests that a drain has left."""
        if self.state.holds_everything:
            why, reason = (
                ", since the engine is paused or asleep",
                "it was shut down while it was paused",
            )
        else:
            why, reason = " in time", "it was shut down before this request had finished"
        log.warning("%d prompts did not finish%s", self.state.num_running, why)
        self.state.die(reason)


def http_server(
    config: ServerConfig,
    state: EngineState,
    batches: BatchRunner | None = None,
    directory: Path | None = None,
) -> uvicorn.Server:
    """The web server of an engine."""
    logging.getLogger("uvicorn").setLevel(config.uvicorn_log_level.upper())
    return _HTTPServer(
        uvicorn.Config(
            RequestIds(create_app(config, state, batches, directory)),
            http=connections(config.request_read_timeout_s),
            ws="none",
            log_config=None,  # logs go through the engine's own handler
            log_level=config.uvicorn_log_level,
            access_log=config.uvicorn_log_level in ("trace", "debug", "info"),
            timeout_graceful_shutdown=_FLUSH_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
            lifespan="off",
            server_header=False,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
    )
