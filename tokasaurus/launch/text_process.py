"""The process of the text core, for HTTP or for batches: its ring of messages, and its lifeline."""

from __future__ import annotations

import asyncio
from functools import partial

from tokasaurus.errors import ProtocolError
from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER
from tokasaurus.launch.lifeline import Assignment, Dead, Lifeline, Lost, Ready, Start, Stop
from tokasaurus.protocol.channels import AsyncReceiver, Sender, door_address
from tokasaurus.protocol.role import Role
from tokasaurus.server.state import EngineState
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.replicas import Replicas
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
        replicas = assignment.slices.replicas
        self._doors = [
            AsyncReceiver(address(Role("server", number)), TO_SERVER)
            for number in range(len(replicas))
        ]
        senders = [
            Sender(address(Role("manager", number)), TO_MANAGER).send
            for number in range(len(replicas))
        ]
        num_seats = [replica.manager.max_seqs_per_forward for replica in replicas]
        self._router = Replicas(senders, num_seats) if len(replicas) > 1 else None
        self._send = senders[0] if self._router is None else self._router.send
        self._generations: Generations | None = None
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
        generations = Generations(config, tokenizer, self._send, self.state.metrics)
        self._generations = generations
        if self._router is not None:
            generations.set_num_seats(self._router.num_seats)
        self.state.ready(preparer, generations)
        await self.on_ready(generations)
        if self._router is None:
            while True:
                generations.absorb(await self._doors[0].receive())
        takers = (
            self._take(number, self._router, generations) for number in range(len(self._doors))
        )
        await asyncio.gather(*takers)

    async def _take(self, replica: int, router: Replicas, generations: Generations) -> None:
        """Takes the messages of one of several replicas."""
        while True:
            message = await self._doors[replica].receive()
            for each in router.absorb(replica, message):
                generations.absorb(each)

    def _on_lifeline(self) -> None:
        notes = self.lifeline.receive()
        if notes is None:  # the supervisor is gone, and with it every other process
            self.unwatch()
            self._die("its supervisor ended")
            return
        for note in notes:
            if isinstance(note, Start):
                self._others_ready.set()
            elif isinstance(note, Lost):
                self._lose(note.replica)
            elif isinstance(note, Dead):
                self._die(note.reason)
            elif isinstance(note, Stop):
                self.on_stop()

    def _lose(self, replica: int) -> None:
        """Lets the requests of a replica go on elsewhere."""
        router, generations = self._router, self._generations
        if router is None:
            raise ProtocolError("an engine with one replica cannot go on without it")
        if generations is None:  # there are no requests yet
            router.lost(replica, lambda _: None)
            return
        messages = router.lost(replica, generations.find)
        generations.set_num_seats(router.num_seats)
        for each in messages:
            generations.absorb(each)

    def _die(self, reason: str) -> None:
        self.state.die(reason)
        self.on_dead(reason)
