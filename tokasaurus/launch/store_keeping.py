"""The store of files and batches of one engine, from its predecessor and to its successor.

The directory's lock says who has it. A new engine takes the store as soon as the lock is free, and
the old one gives it up when the lines in flight have been answered. If the old one is killed, the
lock is free as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path

from tokasaurus.batch.runner import BatchRunner
from tokasaurus.batch.store import DirectoryInUse
from tokasaurus.config.slices import ServerConfig
from tokasaurus.errors import ConfigError
from tokasaurus.launch.lifeline import Succession
from tokasaurus.launch.web_server import WebServer, web_server
from tokasaurus.server.app import create_store_app
from tokasaurus.server.http.store_place import StorePlace
from tokasaurus.server.routes.batches import batch_runner, open_store
from tokasaurus.server.state import EngineState

__all__ = ["StoreKeeping"]

log = logging.getLogger(__name__)

_POLL_S = 0.05
_RETRY_S = 10.0
_BACKLOG = 512


class StoreKeeping:
    """Has the store, or waits for it.

    Args:
        config: the server's slice.
        state: of the engine.
        succession: None if no other engine can take over.

    Raises:
        ConfigError: the directory cannot be used, or another engine than the predecessor has it.
    """

    def __init__(
        self, config: ServerConfig, state: EngineState, succession: Succession | None
    ) -> None:
        self._config = config
        self._state = state
        self._succession = succession
        before = None
        if succession is not None and succession.follows:
            before = succession.store_socket(succession.number - 1)
        store = open_store(config) if before is None else None
        self.runner: BatchRunner = batch_runner(config, state, store)
        self.place = StorePlace(before)
        self._has_store = store is not None
        self._taking: asyncio.Task[None] | None = None
        self._http: WebServer | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Runs batches from now on, or as soon as the store is here. The engine is ready."""
        if self._has_store:
            await self.runner.start()
        else:
            self._listen()
            self._taking = asyncio.create_task(self._take())

    async def _take(self) -> None:
        """Waits for the store, and runs its batches."""
        while not self._has_store:
            try:
                self.runner.adopt(await asyncio.to_thread(open_store, self._config))
                self._has_store = True
            except DirectoryInUse:
                await asyncio.sleep(_POLL_S)
            except ConfigError as error:
                log.error("files and batches: %s; trying again in %g s", error, _RETRY_S)
                await asyncio.sleep(_RETRY_S)
        await self.runner.start()
        self.place.arrived()
        assert self._succession is not None
        log.info("engine %d has the files and batches now", self._succession.number)

    async def stop(self) -> None:
        """Stops batches at once. They go on at the next start."""
        if self._taking is not None:
            self._taking.cancel()
            await asyncio.wait({self._taking})
        await self.runner.stop()

    async def hand_over(self, successor: int, timeout_s: float) -> None:
        """Lets the lines in flight end, and leaves the store to the next engine.

        Args:
            successor: the number of the next engine.
            timeout_s: for the lines. Those that take longer begin again in the next engine.
        """
        self._listen()
        if self._taking is not None:
            await self._taking
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.runner.leave(), timeout_s)
        await self.runner.stop()
        await self.place.leave()
        await self.runner.give_up_store()
        assert self._succession is not None
        self.place.left(self._succession.store_socket(successor))
        log.info(
            "engine %d leaves files and batches to engine %d", self._succession.number, successor
        )

    async def passed_on_ended(self) -> None:
        """Returns when no request of another engine is answered here any more."""
        if self._http is not None:
            await self._http.retire()

    async def close(self) -> None:
        """Closes the store, if it is here."""
        await self.stop()
        await self.runner.close()
        if self._http is not None and self._serving is not None:
            self._http.should_exit = True
            await self._serving
            Path(self._own_socket).unlink(missing_ok=True)

    @property
    def _own_socket(self) -> str:
        assert self._succession is not None
        return self._succession.store_socket(self._succession.number)

    def _listen(self) -> None:
        """Opens the socket for what another engine passes on."""
        if self._http is not None or self._succession is None:
            return
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._own_socket)
        listener.listen(_BACKLOG)
        app = create_store_app(self._state, self.runner, self.place)
        self._http = web_server(self._config, app, is_inner=True)
        self._serving = asyncio.create_task(self._http.serve(sockets=[listener]))
