"""The server's process: uvicorn, the manager's messages and the lifeline, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path

import uvicorn

from tokasaurus.batch.runner import BatchRunner
from tokasaurus.config.slices import ServerConfig
from tokasaurus.launch.http_relay import HTTPRelay
from tokasaurus.launch.lifeline import Assignment, Joined, Left, Lifeline, Retire, Serving
from tokasaurus.launch.moving_connections import Inheritance, heirs_of, inherit
from tokasaurus.launch.store_keeping import StoreKeeping
from tokasaurus.launch.text_process import TextProcess
from tokasaurus.launch.tracing import close_tracing
from tokasaurus.launch.web_server import web_server
from tokasaurus.open_files import allow_many_files
from tokasaurus.server.app import create_app
from tokasaurus.server.reports import report
from tokasaurus.server.state import EngineState
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer

__all__ = ["http_server", "serve"]

log = logging.getLogger(__name__)


def serve(assignment: Assignment, lifeline: Lifeline) -> None:
    """Serves until the lifeline says stop, says that another process died, or ends."""
    allow_many_files()
    asyncio.run(_Serving(assignment, lifeline).run())


class _Serving(TextProcess):
    def __init__(self, assignment: Assignment, lifeline: Lifeline) -> None:
        super().__init__(assignment, lifeline)
        self._store = StoreKeeping(self.config, self.state, assignment.succession)
        directory = Path(assignment.directory)
        self._relay: HTTPRelay | None = None
        if assignment.slices.server_processes > 1:
            self._relay = HTTPRelay(directory)
            self._listener = self._relay.listen()
        else:
            assert assignment.listener_fd is not None
            # Made from the descriptor alone, the socket knows that it is TCP; otherwise asyncio
            # would not set TCP_NODELAY on its connections.
            self._listener = socket.socket(fileno=os.dup(assignment.listener_fd))
        is_inner = self._relay is not None
        app = create_app(
            self.config,
            self.state,
            self._store.runner,
            directory,
            is_inner=is_inner,
            place=self._store.place,
        )
        self._http = web_server(self.config, app, is_inner=is_inner)
        self._succession = assignment.succession
        self._inheritance: Inheritance | None = None
        self._accepts = asyncio.Event()
        if is_inner or self._succession is None or not self._succession.follows:
            self._accepts.set()
        self._reports: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self.watch()
        http = asyncio.create_task(self._serve_http())
        work = asyncio.create_task(self.run_ring())
        tasks = {http, work}
        if self._relay is not None:
            tasks.add(asyncio.create_task(self._relay.run()))
        ended, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in others - {http}:
            task.cancel()
        if self._reports is not None:
            self._reports.cancel()
        try:
            for task in ended:
                task.result()  # raises what ended it
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self._store.close()
            await close_tracing(self.state.tracing)
        self.unwatch()

    async def _serve_http(self) -> None:
        """Listens from the start, so that clients get a 503 while the model loads, not a refusal.

        But where an engine serves already, it does so until this one is ready.
        """
        await self._accepts.wait()
        if not self._http.should_exit:
            await self._http.serve(sockets=[self._listener])

    async def on_begun(self, preparer: Preparer, generations: Generations) -> None:
        if self._relay is not None:
            relay, metrics = self._relay, self.state.metrics
            await relay.begin(self.core, preparer, generations, metrics, self.cartridges)

    def on_http_process(self, note: Joined | Left) -> None:
        if self._relay is not None:
            self._relay.note(note)

    async def on_ready(self, preparer: Preparer, generations: Generations) -> None:
        config = self.config
        await self._store.start()
        self._accepts.set()
        await self._http.wait_started()
        if self._relay is None:
            self._inheritance = inherit(self._succession, 0, self._http.adopt)
        scheme = "http" if config.ssl_certfile is None else "https"
        log.info("ready: %s at %s://%s:%d/v1", config.model_name, scheme, config.host, config.port)
        self._reports = asyncio.create_task(report(config, generations, self.state.history))
        self.lifeline.send(Serving())

    def on_dead(self, reason: str) -> None:
        self._end_task = asyncio.create_task(self._end())

    async def _end(self) -> None:
        """Ends when the HTTP processes have: until then, they ask this one."""
        if self._relay is not None:
            await self._relay.all_left()
        self._http.should_exit = True
        self._accepts.set()  # if it never could serve, nothing waits for an answer

    def on_stop(self) -> None:
        self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        self.state.drain()
        await self._store.stop()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.state.drained(), self.config.shutdown_timeout_s)
        if self.state.num_running:
            self._cut_short()
        await self._end()

    def on_retire(self, note: Retire) -> None:
        self._retire_task = asyncio.create_task(self._retire(note))

    async def _retire(self, note: Retire) -> None:
        """Ends with the last connection and the last line of a batch."""
        self.state.is_retiring = True
        handing = asyncio.create_task(self._store.hand_over(note.successor, note.timeout_s))
        with contextlib.suppress(asyncio.TimeoutError):
            if self._relay is None:
                if self._inheritance is not None:
                    self._inheritance.close()
                last = self._http.retire(heirs_of(self._succession, note.successor))
            else:
                last = self._relay.all_left(None)
            await asyncio.wait_for(last, note.timeout_s)
        await handing
        await self._store.passed_on_ended()
        if self.state.num_running:
            self._cut_short()
        await self._end()

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
    """The web server of an engine with one server process."""
    return web_server(config, create_app(config, state, batches, directory))
