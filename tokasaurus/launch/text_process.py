"""The process of the text core, for HTTP or for batches: its ring of messages, and its lifeline."""

from __future__ import annotations

import asyncio

from tokasaurus.cartridges.store import CartridgeStore
from tokasaurus.launch.cartridge_store import cartridges_of
from tokasaurus.launch.doors import TO_SERVER
from tokasaurus.launch.lifeline import (
    AskRetire,
    Assignment,
    Dead,
    Joined,
    Left,
    Lifeline,
    Lost,
    MayRetire,
    Ready,
    Restored,
    Retire,
    Start,
    Stop,
)
from tokasaurus.launch.text_core import TextCore
from tokasaurus.launch.tracing import open_tracing
from tokasaurus.protocol.channels import AsyncReceiver
from tokasaurus.protocol.doors import Door
from tokasaurus.protocol.messages import ToServer, WorkerStall
from tokasaurus.server.state import EngineState
from tokasaurus.text.cartridges import Cartridges
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer

__all__ = ["TextProcess"]


class TextProcess:
    """Loads the tokenizer, joins the ring when all are ready, and follows the lifeline.

    Args:
        assignment: of the server's role.
        lifeline: to the supervisor.
        state: follows the engine.

    Attributes:
        cartridges: of the engine, from ``on_begun`` on.
    """

    cartridges: Cartridges

    def __init__(
        self, assignment: Assignment, lifeline: Lifeline, state: EngineState | None = None
    ) -> None:
        self.config = assignment.slices.server
        if state is None:
            state = EngineState(open_tracing(self.config, assignment.role))
        self.state = state
        self.lifeline = lifeline
        self._doors = _AsyncDoors()
        self.core = TextCore(assignment, lifeline, self._doors)
        self._begun = asyncio.Event()

    # --- for subclasses ---------------------------------------------------------------------------

    async def on_begun(self, preparer: Preparer, generations: Generations) -> None:
        """The engine can serve. It is ready when this returns."""

    def on_http_process(self, note: Joined | Left) -> None:
        """An HTTP process was started, or has ended."""

    async def on_ready(self, preparer: Preparer, generations: Generations) -> None:
        """Requests may come from now on."""
        raise NotImplementedError

    def on_dead(self, reason: str) -> None:
        """The engine is gone; everything in flight has had its error."""
        raise NotImplementedError

    def on_stop(self) -> None:
        """The process must end."""
        raise NotImplementedError

    def on_retire(self, note: Retire) -> None:
        """A new engine serves, and the process ends when it has finished."""
        raise NotImplementedError

    # --- the ring ---------------------------------------------------------------------------------

    def watch(self) -> None:
        """Begins to listen to the lifeline."""
        asyncio.get_running_loop().add_reader(self.lifeline.fileno(), self._on_lifeline)

    def unwatch(self) -> None:
        """Stops listening to the lifeline."""
        asyncio.get_running_loop().remove_reader(self.lifeline.fileno())

    async def run_ring(self) -> None:
        """Takes the managers' messages until it is cancelled."""
        preparer = await asyncio.to_thread(self.core.load)
        self.lifeline.send(Ready())
        await self._begun.wait()
        generations = self.core.begin(preparer, self.state.metrics)
        store = CartridgeStore(self.config.cartridges)
        cartridges = self.cartridges = cartridges_of(self.config, generations, store)
        try:
            await self.on_begun(preparer, generations)
            self.state.ready(preparer, generations, cartridges, store)
            await self.on_ready(preparer, generations)
            await asyncio.gather(self._check(), self._doors.receive(self.core))
        finally:
            await store.close()

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(self.core.check_every_s)
            self.core.check()

    def _on_lifeline(self) -> None:
        notes = self.lifeline.receive()
        if notes is None:  # the supervisor is gone, and with it every other process
            self.unwatch()
            self._die("its supervisor ended")
            return
        for note in notes:
            if isinstance(note, Start | Lost | Restored):
                self.core.note(note)
                if self.core.has_begun:
                    self._begun.set()
            elif isinstance(note, Joined | Left):
                self.on_http_process(note)
            elif isinstance(note, Dead):
                self._die(note.reason)
            elif isinstance(note, Stop):
                self.on_stop()
            elif isinstance(note, AskRetire):
                self.lifeline.send(self._may_retire())
            elif isinstance(note, Retire):
                self.on_retire(note)

    def _may_retire(self) -> MayRetire:
        refusal = None
        if self.state.holds_everything:
            refusal = "it is paused or asleep, and a new engine would not be: resume it first"
        elif self.state.num_commands:
            refusal = "it carries out a command, such as an update of weights: try again after it"
        counted = self.state.statistics
        return MayRetire(refusal, counted is not None and counted.weights_version > 0)

    def _die(self, reason: str) -> None:
        self.state.die(reason)
        self.on_dead(reason)


class _AsyncDoors:
    """A task for each door, which passes its messages on."""

    def __init__(self) -> None:
        self._open: dict[int, AsyncReceiver[ToServer | WorkerStall]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._core: TextCore | None = None
        self._failure: asyncio.Future[None] | None = None

    def open(self, replica: int, door: Door) -> None:
        self._open[replica] = AsyncReceiver(door, TO_SERVER)
        self._begin(replica)

    def close(self, replica: int) -> list[ToServer | WorkerStall]:
        task = self._tasks.pop(replica, None)
        if task is not None:
            task.cancel()
        door = self._open.pop(replica)
        left = door.receive_rest()
        door.close()
        return left

    async def receive(self, core: TextCore) -> None:
        """Passes messages on until it is cancelled. Raises what taking a message raises."""
        self._core = core
        self._failure = asyncio.get_running_loop().create_future()
        for replica in self._open:
            self._begin(replica)
        try:
            await self._failure
        finally:
            for task in self._tasks.values():
                task.cancel()

    def _begin(self, replica: int) -> None:
        if self._core is not None:
            task = asyncio.get_running_loop().create_task(self._take(replica, self._core))
            task.add_done_callback(self._on_done)
            self._tasks[replica] = task

    async def _take(self, replica: int, core: TextCore) -> None:
        door = self._open[replica]
        while True:
            core.take(replica, await door.receive())

    def _on_done(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)
