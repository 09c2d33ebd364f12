"""The process of the text core, for HTTP or for batches: its ring of messages, and its lifeline."""

from __future__ import annotations

import asyncio
from functools import partial

from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER
from tokasaurus.launch.lifeline import Assignment, Dead, Lifeline, Ready, Start, Stop
from tokasaurus.protocol.channels import AsyncReceiver, Sender, door_address
from tokasaurus.protocol.role import Role
from tokasaurus.server.state import EngineState
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["TextProcess"]


class TextProcess:
    """Loads the tokenizer, joins the ring when all are ready, and follows the lifeline.

    Args:
        assignment: of the server's role.
        lifeline: to the supervisor.
    """

    def __init__(self, assignment: Assignment, lifeline: Lifeline) -> None:
        self.config = assignment.slices.server
        self.state = EngineState()
        self.lifeline = lifeline
        address = partial(door_address, assignment.directory)
        self._door = AsyncReceiver(address(Role("server")), TO_SERVER)
        self._to_manager = Sender(address(Role("manager")), TO_MANAGER)
        self._others_ready = asyncio.Event()

    # --- for subclasses ---------------------------------------------------------------------------

    async def on_ready(self, generations: Generations) -> None:
        """Requests may come from now on."""
        raise NotImplementedError

    def on_dead(self, reason: str) -> None:
        """The engine is gone; everything in flight has had its error."""
        raise NotImplementedError

    def on_stop(self) -> None:
        """The process must end."""
        raise NotImplementedError

    # --- the ring ---------------------------------------------------------------------------------

    def watch(self) -> None:
        """Begins to listen to the lifeline."""
        asyncio.get_running_loop().add_reader(self.lifeline.fileno(), self._on_lifeline)

    def unwatch(self) -> None:
        """Stops listening to the lifeline."""
        asyncio.get_running_loop().remove_reader(self.lifeline.fileno())

    async def run_ring(self) -> None:
        """Takes the manager's messages until it is cancelled."""
        config = self.config
        tokenizer = await asyncio.to_thread(Tokenizer.load, config)
        preparer = Preparer(config, tokenizer)
        await asyncio.to_thread(preparer.prepare_grammars)
        self.lifeline.send(Ready())
        await self._others_ready.wait()
        generations = Generations(config, tokenizer, self._to_manager.send, self.state.metrics)
        self.state.ready(preparer, generations)
        await self.on_ready(generations)
        while True:
            generations.absorb(await self._door.receive())

    def _on_lifeline(self) -> None:
        notes = self.lifeline.receive()
        if notes is None:  # the supervisor is gone, and with it every other process
            self.unwatch()
            self._die("its supervisor ended")
            return
        for note in notes:
            if isinstance(note, Start):
                self._others_ready.set()
            elif isinstance(note, Dead):
                self._die(note.reason)
            elif isinstance(note, Stop):
                self.on_stop()

    def _die(self, reason: str) -> None:
        self.state.die(reason)
        self.on_dead(reason)
