"""The text core's end of the rings: doors, router, watches, and what the supervisor says.

The server, ``toka-batch`` and an engine of several processes in a program stand on it. It has no
event loop: its owner receives messages and notes, and passes them on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from tokasaurus.config.slices import EngineSlices, ReplicaSlices
from tokasaurus.errors import ProtocolError
from tokasaurus.launch.doors import TO_MANAGER
from tokasaurus.launch.lifeline import (
    Assignment,
    Lifeline,
    Lost,
    Replace,
    Restored,
    Start,
)
from tokasaurus.launch.stalls import ManagerWatch, check_interval_s
from tokasaurus.protocol.channels import Sender
from tokasaurus.protocol.doors import Door
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.messages import FromServer, FromWorker, Ping, ToServer, WorkerStall
from tokasaurus.protocol.role import Role
from tokasaurus.text.generations import Generations, Watcher
from tokasaurus.text.preparation import Preparer
from tokasaurus.text.receipts import Receipts
from tokasaurus.text.replica_reports import Seats
from tokasaurus.text.replicas import Replicas
from tokasaurus.text.tokenizer import Tokenizer

__all__ = ["Doors", "TextCore"]

log = logging.getLogger(__name__)


class Doors(Protocol):
    """Receives the messages of replicas. Their owner passes each to ``TextCore.take``."""

    def open(self, replica: int, door: Door) -> None:
        """Opens the door for the messages of a replica."""

    def close(self, replica: int) -> list[ToServer | WorkerStall]:
        """Closes a door, and returns what had come through it and was not taken."""


# When all replicas hang, the machine may: they get this many time limits more.
_ALL_STALLED_FACTOR = 3


class _Notice(NamedTuple):
    """When a replica was found stalled, and what the others were like then."""

    at: float
    others: dict[int, tuple[int, int] | None]


class TextCore:
    """Joins generations to the managers of all replicas.

    Args:
        assignment: of the server's role.
        lifeline: to the supervisor.
        doors: receive what the managers send.

    Attributes:
        config: the server's slice.
        check_every_s: how often ``check`` is due.
        has_begun: the supervisor has said that the engine can serve.
        generations: the table of prompts in flight; None before ``begin``.
    """

    def __init__(self, assignment: Assignment, lifeline: Lifeline, doors: Doors) -> None:
        slices = assignment.slices
        self.config = slices.server
        self.has_begun = False
        self.generations: Generations | None = None
        self.check_every_s = check_interval_s(slices.stall_timeout_s)
        self._slices: EngineSlices = slices
        self._lifeline = lifeline
        self._doors = doors
        self._receipts: Receipts | None = None
        self._workers: dict[int, tuple[WorkerIdentity, ...]] = {}  # of replicas that live
        self._first_workers: tuple[WorkerIdentity, ...] = ()
        self._stalled: set[Role] = set()
        self._noticed: dict[int, _Notice] = {}  # by stalled replica
        self._replaced: set[int] = set()  # replicas that the supervisor was asked to end
        self._watches: dict[int, ManagerWatch] = {}  # by replica
        self._check_due_at = 0.0
        self._senders: dict[int, Sender[FromServer | FromWorker]] = {}  # by replica
        for number in range(len(slices.replicas)):
            self._open(number, assignment.door)
        senders = [sender.send for sender in self._senders.values()]
        seats = [_seats(replica) for replica in slices.replicas]
        self.router = Replicas(senders, seats) if len(seats) > 1 else None
        self._send = senders[0] if self.router is None else self.router.send

    def load(self) -> Preparer:
        """Loads the tokenizer and the grammars, which takes a while; in any thread."""
        tokenizer = Tokenizer.load(self.config)
        self._receipts = Receipts(self.config, tokenizer)
        preparer = Preparer(self.config, tokenizer, self._receipts)
        preparer.prepare_grammars()
        return preparer

    def begin(self, preparer: Preparer, watcher: Watcher | None = None) -> Generations:
        """Makes the table of prompts, once the supervisor has said that the engine can serve."""
        receipts, router = self._receipts, self.router
        assert receipts is not None
        self._adopt_workers()
        tokenizer = preparer.tokenizer
        generations = Generations(self.config, tokenizer, self._send, watcher, receipts, router)
        self.generations = generations
        if router is not None:
            router.attach(
                generations.find,
                lambda: generations.set_num_seats(router.num_seats, router.num_stuck),
            )
        return generations

    # --- messages ---------------------------------------------------------------------------------

    def take(self, replica: int, message: ToServer | WorkerStall) -> None:
        """Takes a message of a replica's manager."""
        self._watches[replica].num_heard += 1
        if isinstance(message, WorkerStall):
            self._note_stall(Role("worker", replica), message.seconds)
        elif self.router is None:
            self._absorb([message])
        else:
            self._absorb(self.router.absorb(replica, message))

    def _absorb(self, messages: list[ToServer]) -> None:
        if self.generations is not None:
            for message in messages:
                self.generations.absorb(message)

    def _open(self, number: int, door_of: Callable[[Role], Door]) -> None:
        """Opens the door of a replica, and connects to its manager's."""
        self._doors.open(number, door_of(Role("server", number)))
        sender = self._senders[number] = Sender(door_of(Role("manager", number)), TO_MANAGER)
        self._watches[number] = ManagerWatch(
            self._slices.stall_timeout_s, self.check_every_s, partial(sender.send, Ping())
        )

    # --- processes that hang ----------------------------------------------------------------------

    def check_if_due(self) -> None:
        """The same as ``check``, for a caller that comes more often than necessary."""
        now = time.monotonic()
        if now >= self._check_due_at:
            self._check_due_at = now + self.check_every_s
            self.check()

    def check(self) -> None:
        """Looks for managers that hang. Due every ``check_every_s``."""
        if self.generations is None:
            return
        now = time.monotonic()
        for number, watch in self._watches.items():
            if self.router is None:
                has_work = self.generations.await_manager
            else:
                has_work = self.router.is_awaited(number)
            self._note_stall(Role("manager", number), watch.check(has_work, now))
        self._replace_stalled()

    def _note_stall(self, role: Role, stalled_s: float) -> None:
        """Notes for how long a process has made no progress; 0 if it makes progress."""
        if (stalled_s > 0) == (role in self._stalled):
            return
        if stalled_s:
            self._stalled.add(role)
            log.error("the %s has work and has made no progress for %.3g s", role, stalled_s)
        else:
            self._stalled.remove(role)
            log.warning("the %s makes progress again", role)
        self._tell_stalls()
        self._note_others()

    def _tell_stalls(self) -> None:
        replicas = {role.replica for role in self._stalled}
        if self.generations is not None:
            self.generations.stalled = tuple(map(str, sorted(self._stalled)))
            self.generations.is_stuck = bool(self._watches) and replicas >= set(self._watches)
        if self.router is not None:
            self.router.set_stalled(replicas)

    def _note_others(self) -> None:
        replicas = {role.replica for role in self._stalled}
        marks = {} if self.router is None else self.router.marks()
        notice = _Notice(time.monotonic(), marks)
        self._noticed = {number: self._noticed.get(number, notice) for number in replicas}

    def _replace_stalled(self) -> None:
        """Lets the supervisor end stalled replicas, if their requests can go on elsewhere.

        Another one must be idle, or have gone on since the stall was noticed: otherwise the whole
        machine may stand still, and an end would only cost work. If that lasts, one replica is
        ended nevertheless: started again, it shows whether the machine goes on.
        """
        now = {} if self.router is None else self.router.marks()
        longest = self._longest_stalled()
        for role in sorted(self._stalled):
            before = self._noticed[role.replica].others
            goes_on = any(mark is None or mark != before.get(each) for each, mark in now.items())
            if (goes_on or role.replica == longest) and role.replica not in self._replaced:
                self._replaced.add(role.replica)
                reason = f"the {role} had work and made no progress"
                self._lifeline.send(Replace(role.replica, reason, again=True))

    def _longest_stalled(self) -> int | None:
        """The replica that stalled first, if all have been stalled for several time limits.

        None while a replica is about to be replaced or to start.
        """
        router = self.router
        if router is None or router.is_starting or self._replaced:
            return None
        if self._noticed.keys() != self._watches.keys() or not self._noticed:
            return None
        last = max(notice.at for notice in self._noticed.values())
        if time.monotonic() - last < _ALL_STALLED_FACTOR * self._slices.stall_timeout_s:
            return None
        return min(self._noticed, key=lambda number: self._noticed[number].at)

    # --- notes of the supervisor ------------------------------------------------------------------

    def note(self, note: Start | Lost | Restored) -> None:
        """Takes a note of the supervisor."""
        if isinstance(note, Start):
            self._workers = dict(note.workers)
            self._first_workers = next(iter(note.workers.values()), ())
            self.has_begun = True
        elif isinstance(note, Lost):
            self._lose(note)
        else:
            self._restore(note)

    def _lose(self, note: Lost) -> None:
        """Lets the requests of a replica go on elsewhere."""
        number, router = note.replica, self.router
        if router is None:
            raise ProtocolError("an engine with one replica cannot go on without it")
        if number not in self._watches:  # it had not come back, and will not
            router.absent(number, starts_again=note.starts_again)
            return
        for message in self._doors.close(number):
            self.take(number, message)
        self._senders.pop(number).close()
        del self._watches[number]
        self._workers.pop(number, None)
        self._stalled = {role for role in self._stalled if role.replica != number}
        self._replaced.discard(number)
        loss = router.lost(number, note.reason, starts_again=note.starts_again)
        self._tell_stalls()
        self._absorb(loss.messages)
        for request_id, error in loss.failed.items():
            if self.generations is not None:
                self.generations.fail(request_id, error)
        if loss.num_moved or loss.failed:
            log.warning(
                "replica %d had %d samples, which go on elsewhere (%d of them begin again), and %d"
                " prompts that had moved before, which fail",
                number,
                loss.num_moved,
                loss.num_begun_again,
                len(loss.failed),
            )

    def _restore(self, note: Restored) -> None:
        """Lets a replica that was started again have requests."""
        number, router = note.replica, self.router
        if router is None:
            raise ProtocolError("an engine with one replica is not started again")
        if not self._first_workers:
            self._first_workers = note.workers
        changed = _other_files(self._first_workers, note.workers)
        if changed and router.needs_first_weights:
            reason = f"{changed} has changed since the engine started"
            log.error("replica %d is of no use: %s", number, reason)
            self._lifeline.send(Replace(number, reason, again=False))
            return
        self._workers[number] = note.workers
        self._adopt_workers()
        self._open(number, note.door)
        self._tell_stalls()
        self._absorb(router.join(number, self._senders[number].send))
        obstacle = router.obstacle(number)
        if obstacle is not None:
            log.error("replica %d gets no requests: %s", number, obstacle)

    @property
    def workers(self) -> list[WorkerIdentity]:
        """The workers of all replicas that live."""
        return [each for workers in self._workers.values() for each in workers]

    def pass_to_managers(self, message: FromServer) -> None:
        """Sends a message to the managers that it concerns."""
        self._send(message)

    def _adopt_workers(self) -> None:
        if self._receipts is not None:
            self._receipts.adopt(self.workers)
        if self.generations is not None and self.generations.relay is not None:
            self.generations.relay.adopt_workers(self.workers)


def _seats(replica: ReplicaSlices) -> Seats:
    manager = replica.manager
    return Seats(manager.max_seqs_per_forward, manager.num_pages * manager.page_size)


def _other_files(before: tuple[WorkerIdentity, ...], now: tuple[WorkerIdentity, ...]) -> str | None:
    """A file of weights that is not what it was; None if there is none."""
    for one, other in zip(before, now, strict=True):
        for file in {*one.weight_files} ^ {*other.weight_files}:
            return file.path
    return None
