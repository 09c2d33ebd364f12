"""Runs an embedded engine in a thread of its own, for one event loop.

::

    event loop   generations ──send──▶            absorb ──▶ callers
                                   │                ▲ call_soon_threadsafe
    thread                       inbox ──▶ step ──▶ deliver, then the batches

The text core belongs to the loop: it absorbs the messages of a turn while the turn's batches run.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections.abc import Callable
from typing import Any

from tokasaurus.cartridges.store import CartridgeStore
from tokasaurus.config.engine import EngineConfig
from tokasaurus.launch.assemble import assemble
from tokasaurus.launch.cartridge_store import cartridges_of
from tokasaurus.launch.embedded import EmbeddedEngine
from tokasaurus.launch.figures import Figures
from tokasaurus.protocol.messages import ToServer
from tokasaurus.server.state import EngineState

__all__ = ["EngineThread"]

log = logging.getLogger(__name__)

# A device works on one batch while the host plans the next. On the CPU nothing runs beside.
_STEPS_AHEAD = {"cpu": 1, "cuda": 2}


class EngineThread:
    """An engine that loads and runs beside an event loop.

    Args:
        config: the user's choices.
        state: follows the engine: it is ready once the model is loaded, and dies with it.
    """

    def __init__(self, config: EngineConfig, state: EngineState) -> None:
        self._config = config
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[EmbeddedEngine] = self._loop.create_future()
        self._engine: EmbeddedEngine | None = None
        self._store: CartridgeStore | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tokasaurus-engine", daemon=True)
        self._thread.start()

    async def engine(self) -> EmbeddedEngine:
        """The engine, when its model is loaded.

        Raises:
            ConfigError: the flags contradict one another, the model or the machine.
            ModelError: the model cannot be found or served.
            RuntimeError: another event loop asks.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("this engine belongs to the event loop that it was first used in")
        return await asyncio.shield(self._loaded)

    async def close(self) -> None:
        """Ends everything in flight with ``EngineDead``, and returns when the thread has ended."""
        self._closing = True
        self._state.die("it was closed")
        if self._engine is not None:
            self._engine.wake()
        await asyncio.to_thread(self._thread.join)
        if self._store is not None:
            await self._store.close()

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self._load()
        except BaseException as error:
            self._in_loop(self._failed, error)
            return
        self._engine = engine
        self._in_loop(self._ready, engine)
        try:
            self._serve(engine)
        except Exception as error:
            log.exception("the engine failed")
            # Of a message of several lines the first says what failed, for example which batch.
            summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
            self._in_loop(self._state.die, summary)
        finally:
            engine.close()

    def _load(self) -> EmbeddedEngine:
        slices = assemble(self._config)
        (replica,) = slices.replicas
        return EmbeddedEngine(
            slices,
            steps_ahead=_STEPS_AHEAD[replica.workers[0].device],
            deliver=self._deliver,
            watcher=self._state.metrics,
        )

    def _serve(self, engine: EmbeddedEngine) -> None:
        figures = Figures(engine.manager)
        while not self._closing:
            if not engine.wait(figures.wait_s):
                self._deliver([figures.at_rest()])
                continue
            engine.step()
            due = figures.after_turn()
            if due:
                self._deliver(due)

    def _deliver(self, messages: list[ToServer]) -> None:
        self._in_loop(self._absorb, messages)

    def _in_loop(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed, so nothing waits for the engine any more
            self._closing = True

    # --- in the event loop ------------------------------------------------------------------------

    def _ready(self, engine: EmbeddedEngine) -> None:
        self._store = CartridgeStore(engine.config.cartridges)
        engine.cartridges = cartridges_of(engine.config, engine.generations, self._store)
        self._state.ready(engine.preparer, engine.generations, engine.cartridges, self._store)
        if not self._loaded.done():
            self._loaded.set_result(engine)

    def _failed(self, error: BaseException) -> None:
        self._state.die(str(error))
        self._loaded.set_exception(error)

    def _absorb(self, messages: list[ToServer]) -> None:
        engine = self._loaded.result()
        for message in messages:
            engine.generations.absorb(message)
