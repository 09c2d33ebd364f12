"""An HTTP process: one of several that share the engine's port.

It parses, tokenizes, decodes and writes. Its prompts go to the server's process, which looks like
one manager; requests that do not generate are passed on to it as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from tokasaurus.config.slices import ServerConfig
from tokasaurus.launch.doors import FROM_HTTP, TO_HTTP
from tokasaurus.launch.http_relay import INNER_SOCKET
from tokasaurus.launch.lifeline import Assignment, Dead, Lifeline, Ready, Retire, Stop
from tokasaurus.launch.moving_connections import Inheritance, heirs_of, inherit
from tokasaurus.launch.tracing import close_tracing, open_tracing
from tokasaurus.launch.web_server import web_server
from tokasaurus.open_files import allow_many_files
from tokasaurus.protocol.channels import AsyncReceiver, Sender, door_address
from tokasaurus.protocol.relaying import AnswerCounts, FromHTTP, ToHTTP
from tokasaurus.protocol.role import Role
from tokasaurus.server.app import create_outer_app
from tokasaurus.server.http.passing_on import PassOn
from tokasaurus.server.http.request_counts import NewCounts
from tokasaurus.server.state import EngineState
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.receipts import Receipts
from tokasaurus.text.remote import RemoteGenerations
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["serve_http"]

_BACKLOG = 2048
# With more, the process that wakes up first would take all connections of a burst.
_ACCEPTED_AT_ONCE = 1
_COUNTS_EVERY_S = 0.2
# The server ends what takes too long; this is for a server that does not.
_PATIENCE_S = 2.0


def serve_http(assignment: Assignment, lifeline: Lifeline) -> None:
    """Serves until the lifeline says stop, says that the engine ended, or ends."""
    allow_many_files()
    asyncio.run(_HTTPProcess(assignment, lifeline).run())


class _SharedListener(socket.socket):
    """A listening socket of several processes, whose queue no process makes shorter."""

    def listen(self, backlog: int = _BACKLOG, /) -> None:
        super().listen(_BACKLOG)


class _HTTPProcess:
    def __init__(self, assignment: Assignment, lifeline: Lifeline) -> None:
        assert assignment.listener_fd is not None
        self._config: ServerConfig = assignment.slices.server
        self._number = assignment.role.replica
        # One that is started again lets the others take connections until it can serve, and one
        # of a new engine lets the old one take them.
        self._succession = assignment.succession
        follows = self._succession is not None and self._succession.follows
        is_first = self._number <= assignment.slices.server_processes
        self._may_serve_at_once = is_first and not follows
        self._inheritance: Inheritance | None = None
        self._lifeline = lifeline
        self._state = EngineState(open_tracing(self._config, assignment.role))
        directory = Path(assignment.directory)
        self._door: AsyncReceiver[ToHTTP] = AsyncReceiver(
            door_address(directory, assignment.role), TO_HTTP
        )
        self._sender: Sender[FromHTTP] = Sender(door_address(directory, Role("http")), FROM_HTTP)
        # From the descriptor alone, as in ``serving``.
        self._listener = _SharedListener(fileno=os.dup(assignment.listener_fd))
        app = create_outer_app(self._config, self._state, PassOn(directory / INNER_SOCKET))
        self._http = web_server(self._config, app, num_accepted=_ACCEPTED_AT_ONCE)
        self._counts = NewCounts(self._state.metrics.requests)
        self._can_serve = asyncio.Event()

    async def run(self) -> None:
        asyncio.get_running_loop().add_reader(self._lifeline.fileno(), self._on_lifeline)
        http = asyncio.create_task(self._serve())
        work = asyncio.create_task(self._work())
        ended, _ = await asyncio.wait({http, work}, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        for task in ended:
            task.result()  # raises what ended it
        self._tell_counts()
        await close_tracing(self._state.tracing)
        self._unwatch()

    async def _serve(self) -> None:
        if not self._may_serve_at_once:
            await self._can_serve.wait()
            if self._http.should_exit:  # it must not accept what it would have to close
                return
        await self._http.serve(sockets=[self._listener])

    async def _work(self) -> None:
        """Takes the server's messages until it is cancelled. The first are news."""
        receipts, preparer = await asyncio.to_thread(self._load)
        self._lifeline.send(Ready())
        config, tokenizer = self._config, preparer.tokenizer
        generations = RemoteGenerations(
            config, tokenizer, self._sender.send, receipts, self._number
        )
        generations.take(await self._door.receive())
        self._state.ready(preparer, generations, generations.prefixes)
        self._can_serve.set()
        await self._http.wait_started()
        self._inheritance = inherit(self._succession, self._number, self._http.adopt)
        self._tell_counts(even_if_none=True)
        await asyncio.gather(self._receive(generations), self._count())

    def _load(self) -> tuple[Receipts, Preparer]:
        tokenizer = Tokenizer.load(self._config)
        receipts = Receipts(self._config, tokenizer)
        preparer = Preparer(self._config, tokenizer, receipts)
        preparer.prepare_grammars()
        return receipts, preparer

    async def _receive(self, generations: RemoteGenerations) -> None:
        while True:
            for message in await self._door.receive_all():
                generations.take(message)

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(_COUNTS_EVERY_S)
            self._tell_counts()

    def _tell_counts(self, *, even_if_none: bool = False) -> None:
        counts = self._counts.take()
        if counts or even_if_none:
            self._sender.send(AnswerCounts(self._number, counts))

    # --- the lifeline -----------------------------------------------------------------------------

    def _on_lifeline(self) -> None:
        notes = self._lifeline.receive()
        if notes is None:
            self._unwatch()
            self._die("its supervisor ended")
            return
        for note in notes:
            if isinstance(note, Dead):
                self._die(note.reason)
            elif isinstance(note, Stop):
                self._drain_task = asyncio.create_task(self._drain())
            elif isinstance(note, Retire):
                self._retire_task = asyncio.create_task(self._retire(note))

    def _unwatch(self) -> None:
        asyncio.get_running_loop().remove_reader(self._lifeline.fileno())

    def _die(self, reason: str) -> None:
        self._state.die(reason)
        self._end()

    async def _drain(self) -> None:
        """Ends when its prompts have; the server ends those that take too long."""
        self._state.drain()
        with contextlib.suppress(asyncio.TimeoutError):
            timeout_s = self._config.shutdown_timeout_s + _PATIENCE_S
            await asyncio.wait_for(self._state.drained(), timeout_s)
        if self._state.num_running:
            self._state.die("it was shut down before this request had finished")
        self._end()

    async def _retire(self, note: Retire) -> None:
        """Ends with its last connection."""
        if self._inheritance is not None:
            self._inheritance.close()
        heirs = heirs_of(self._succession, note.successor)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._http.retire(heirs), note.timeout_s)
        if self._state.num_running:
            self._state.die("the engine was restarted before this request had finished")
        self._end()

    def _end(self) -> None:
        self._http.should_exit = True
        self._can_serve.set()  # one that never could has nothing to answer
