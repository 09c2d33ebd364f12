"""The process of the text core, for HTTP or for batches: its ring of messages, and its lifeline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import partial

from tokasaurus.errors import ProtocolError
from tokasaurus.launch.doors import TO_MANAGER, TO_SERVER
from tokasaurus.launch.lifeline import Assignment, Dead, Lifeline, Lost, Ready, Start, Stop
from tokasaurus.launch.stalls import ManagerWatch, check_interval_s
from tokasaurus.protocol.channels import AsyncReceiver, Sender
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.messages import Ping, WorkerStall
from tokasaurus.protocol.role import Role
from tokasaurus.server.state import EngineState
from tokasaurus.text.generations import Generations
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.receipts import Receipts
from tokasaurus.text.replicas import Replicas
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["TextProcess"]

log = logging.getLogger(__name__)


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
        replicas = assignment.slices.replicas
        self._doors = [
            AsyncReceiver(assignment.door(Role("server", number)), TO_SERVER)
            for number in range(len(replicas))
        ]
        senders = [
            Sender(assignment.door(Role("manager", number)), TO_MANAGER).send
            for number in range(len(replicas))
        ]
        num_seats = [replica.manager.max_seqs_per_forward for replica in replicas]
        self._router = Replicas(senders, num_seats) if len(replicas) > 1 else None
        self._send = senders[0] if self._router is None else self._router.send
        self._generations: Generations | None = None
        self._others_ready = asyncio.Event()
        self._workers: Sequence[WorkerIdentity] = ()
        self._check_every_s = check_interval_s(assignment.slices.stall_timeout_s)
        self._watches = {  # by replica
            number: ManagerWatch(
                assignment.slices.stall_timeout_s, self._check_every_s, partial(send, Ping())
            )
            for number, send in enumerate(senders)
        }
        self._stalled: set[Role] = set()

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
        receipts = Receipts(config, tokenizer)
        preparer = Preparer(config, tokenizer, receipts)
        await asyncio.to_thread(preparer.prepare_grammars)
        self.lifeline.send(Ready())
        await self._others_ready.wait()
        receipts.adopt(self._workers)
        generations = Generations(config, tokenizer, self._send, self.state.metrics, receipts)
        self._generations = generations
        if self._router is not None:
            generations.set_num_seats(self._router.num_seats)
        self.state.ready(preparer, generations)
        await self.on_ready(generations)
        takers = (self._take(number, generations) for number in range(len(self._doors)))
        await asyncio.gather(self._watch_managers(generations), *takers)

    async def _take(self, replica: int, generations: Generations) -> None:
        """Takes the messages of one replica."""
        door, watch, router = self._doors[replica], self._watches[replica], self._router
        while True:
            message = await door.receive()
            watch.num_heard += 1
            if isinstance(message, WorkerStall):
                self._note_stall(Role("worker", replica), message.seconds, generations)
            elif router is None:
                generations.absorb(message)
            else:
                for each in router.absorb(replica, message):
                    generations.absorb(each)

    # --- processes that hang ----------------------------------------------------------------------

    async def _watch_managers(self, generations: Generations) -> None:
        router = self._router
        while True:
            await asyncio.sleep(self._check_every_s)
            now = time.monotonic()
            for number, watch in self._watches.items():
                has_work = (
                    generations.await_manager if router is None else router.is_awaited(number)
                )
                stalled_s = watch.check(has_work, now)
                self._note_stall(Role("manager", number), stalled_s, generations)

    def _note_stall(self, role: Role, stalled_s: float, generations: Generations) -> None:
        """Notes for how long a process has made no progress; 0 if it makes progress."""
        if (stalled_s > 0) == (role in self._stalled) or role.replica not in self._watches:
            return
        if stalled_s:
            self._stalled.add(role)
            log.error("the %s has work and has made no progress for %.3g s", role, stalled_s)
        else:
            self._stalled.remove(role)
            log.warning("the %s makes progress again", role)
        self._tell_stalls(generations)

    def _tell_stalls(self, generations: Generations) -> None:
        replicas = {role.replica for role in self._stalled}
        generations.stalled = tuple(map(str, sorted(self._stalled)))
        generations.is_stuck = replicas >= set(self._watches)
        if self._router is not None:
            self._router.set_stalled(replicas)
            generations.set_num_seats(self._router.num_seats, self._router.num_stuck)

    def _on_lifeline(self) -> None:
        notes = self.lifeline.receive()
        if notes is None:  # the supervisor is gone, and with it every other process
            self.unwatch()
            self._die("its supervisor ended")
            return
        for note in notes:
            if isinstance(note, Start):
                self._workers = note.workers
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
        del self._watches[replica]
        if generations is None:  # there are no requests yet
            router.lost(replica, lambda _: None)
            return
        self._stalled = {role for role in self._stalled if role.replica != replica}
        messages = router.lost(replica, generations.find)
        self._tell_stalls(generations)
        for each in messages:
            generations.absorb(each)

    def _die(self, reason: str) -> None:
        self.state.die(reason)
        self.on_dead(reason)
