"""The server's process: uvicorn, the door to the manager's messages, and the lifeline, on one event loop."""

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
from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER
from tokasaurus.launch.lifeline import Assignment, Dead, Lifeline, Ready, Start, Stop
from tokasaurus.protocol.channels import AsyncReceiver, Sender
from tokasaurus.server.app import create_app
from tokasaurus.server.batch_routes import batch_runner
from tokasaurus.server.generation import Generations
from tokasaurus.server.reports import report
from tokasaurus.server.state import EngineState
from tokasaurus.server.tokenizer import Tokenizer

__all__ = ["http_server", "serve"]

log = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75  # seconds that a connection without a request stays open
_FLUSH_S = 2  # seconds for answers and errors to reach their clients before connections are cut


class _HTTPServer(uvicorn.Server):
    """uvicorn, but signals are the supervisor's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(assignment: Assignment, lifeline: Lifeline) -> None:
    """Serves until the lifeline says stop, says that another process died, or ends."""
    # Each connection is a file, and the usual limit is a thousand of them.
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows fewer than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    asyncio.run(_Serving(assignment, lifeline).run())


class _Serving:
    def __init__(self, assignment: Assignment, lifeline: Lifeline) -> None:
        self._config = assignment.slices.server
        self._lifeline = lifeline
        directory = Path(assignment.directory)
        self._door = AsyncReceiver(directory, "server", TO_SERVER)
        self._to_manager = Sender(directory, "manager", TO_MANAGER)
        assert assignment.listener_fd is not None
        self._listener = socket.socket(fileno=os.dup(assignment.listener_fd))
        self._state = EngineState()
        self._others_ready = asyncio.Event()
        self._batches = batch_runner(self._config, self._state)
        self._http = http_server(self._config, self._state, self._batches)

    async def run(self) -> None:
        asyncio.get_running_loop().add_reader(self._lifeline.fileno(), self._on_lifeline)
        # Listening from the first moment: while the model loads, clients get a 503 and not a refusal.
        http = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        work = asyncio.create_task(self._work())
        ended, _ = await asyncio.wait({http, work}, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        try:
            for task in ended:
                task.result()  # raises what ended it
            await asyncio.gather(http, work, return_exceptions=True)
        finally:
            await self._batches.close()
        asyncio.get_running_loop().remove_reader(self._lifeline.fileno())

    async def _work(self) -> None:
        config = self._config
        tokenizer = await asyncio.to_thread(
            Tokenizer.load,
            config.tokenizer_path,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            trust_remote_code=config.trust_remote_code,
        )
        self._lifeline.send(Ready())
        await self._others_ready.wait()
        generations = Generations(config, tokenizer, self._to_manager.send, self._state.metrics)
        self._state.ready(generations)
        await self._batches.start()
        scheme = "http" if config.ssl_certfile is None else "https"
        log.info("ready: %s at %s://%s:%d/v1", config.model_name, scheme, config.host, config.port)
        reports = asyncio.create_task(report(config, generations))
        try:
            while True:
                generations.absorb(await self._door.receive())
        finally:
            reports.cancel()

    def _on_lifeline(self) -> None:
        notes = self._lifeline.receive()
        if notes is None:  # the supervisor is gone, and with it everybody else
            asyncio.get_running_loop().remove_reader(self._lifeline.fileno())
            self._die("its supervisor ended")
            return
        for note in notes:
            if isinstance(note, Start):
                self._others_ready.set()
            elif isinstance(note, Dead):
                self._die(note.reason)
            elif isinstance(note, Stop):
                self._drain_task = asyncio.create_task(self._drain())

    def _die(self, reason: str) -> None:
        self._state.die(reason)
        self._http.should_exit = True

    async def _drain(self) -> None:
        self._state.drain()
        await self._batches.stop()  # they go on at the next start
        try:
            await asyncio.wait_for(self._state.drained(), self._config.shutdown_timeout_s)
        except asyncio.TimeoutError:
            log.warning("%d prompts did not finish in time", self._state.num_running)
            self._state.die("it was shut down before this request had finished")
        self._http.should_exit = True


def http_server(
    config: ServerConfig, state: EngineState, batches: BatchRunner | None = None
) -> uvicorn.Server:
    """The web server of an engine, as its process runs it."""
    logging.getLogger("uvicorn").setLevel(config.uvicorn_log_level.upper())
    return _HTTPServer(
        uvicorn.Config(
            create_app(config, state, batches),
            log_config=None,  # through our own handler
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
