"""The server's connections to its HTTP processes: their door, and a Unix socket for HTTP.

::

    HTTP process ── prompts ──────▶ http.sock     ─┐
                 ◀─ updates ─────── http-1.sock   ─┤ server
                 ── other requests ▶ inner.sock   ─┘
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tokasaurus.launch.doors import FROM_HTTP, TO_HTTP
from tokasaurus.launch.lifeline import Joined, Left
from tokasaurus.launch.text_core import TextCore
from tokasaurus.protocol.channels import AsyncReceiver, Sender, door_address
from tokasaurus.protocol.relaying import FromHTTP, ToHTTP
from tokasaurus.protocol.role import Role
from tokasaurus.server.metrics import Metrics
from tokasaurus.text.cartridges import PrefixSource
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.relay import Relay

__all__ = ["INNER_SOCKET", "HTTPRelay"]

log = logging.getLogger(__name__)

INNER_SOCKET = "inner.sock"
"""In the engine's directory: the listening socket of the server for its HTTP processes."""

_BACKLOG = 2048
_NEWS_EVERY_S = 0.05
_POLL_S = 0.01
_GREETING_S = 30.0  # for the HTTP processes to take the first news
_LEAVE_S = 4.0  # for the HTTP processes to end when the engine does


class HTTPRelay:
    """Passes messages between HTTP processes and the text core.

    Args:
        directory: private to the engine.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._door: AsyncReceiver[FromHTTP] = AsyncReceiver(
            door_address(directory, Role("http")), FROM_HTTP
        )
        self._senders: dict[int, Sender[ToHTTP]] = {}  # by number of the process
        self._relay: Relay | None = None
        self._begun = asyncio.Event()

    def listen(self) -> socket.socket:
        """Opens the socket for the requests that HTTP processes pass on."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._directory / INNER_SOCKET))
        listener.listen(_BACKLOG)
        return listener

    def note(self, note: Joined | Left) -> None:
        """Takes a note of the supervisor."""
        number = note.number
        if isinstance(note, Joined):
            address = door_address(self._directory, Role("http", number))
            sender = self._senders[number] = Sender(address, TO_HTTP)
            if self._relay is not None:
                self._relay.open(number, sender.send)
            return
        sender = self._senders.pop(number)
        num_left = 0 if self._relay is None else self._relay.close(number)
        sender.close()
        if num_left:
            log.warning("HTTP process %d ended with %d prompts in flight", number, num_left)

    async def begin(
        self,
        core: TextCore,
        preparer: Preparer,
        generations: Generations,
        metrics: Metrics,
        prefixes: PrefixSource,
    ) -> None:
        """Lets HTTP processes start prompts, and waits until they can."""

        def count(path: str, status: str, number: int) -> None:
            metrics.requests.labels(path, status).inc(number)

        relay = Relay(generations, preparer.tokenizer, core.pass_to_managers, count, prefixes)
        relay.adopt_workers(core.workers)
        for number, sender in self._senders.items():
            relay.open(number, sender.send)
        self._relay = generations.relay = relay
        self._begun.set()
        if not await _until(lambda: relay.all_can_serve, _GREETING_S):
            log.warning("an HTTP process has not answered within %g s", _GREETING_S)

    async def run(self) -> None:
        """Takes the messages of HTTP processes until it is cancelled."""
        await self._begun.wait()
        relay = self._relay
        assert relay is not None
        await asyncio.gather(self._receive(relay), self._tell(relay))

    async def all_left(self, timeout_s: float | None = _LEAVE_S) -> None:
        """Returns when all HTTP processes have ended, or take too long."""
        await _until(lambda: not self._senders, timeout_s)

    async def _receive(self, relay: Relay) -> None:
        while True:
            for message in await self._door.receive_all():
                relay.absorb(message)

    async def _tell(self, relay: Relay) -> None:
        while True:
            await asyncio.sleep(_NEWS_EVERY_S)
            relay.tell()


async def _until(condition: Callable[[], bool], timeout_s: float | None) -> bool:
    """Waits for a condition; returns whether it holds."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while not condition():
        if deadline is not None and time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True
