"""The lifeline: a socket pair between the supervisor and each process it watches.

The process says when it is ready, or why it failed. The supervisor says when to stop, and when
another process died. The end of the stream means that the other side is gone: a process whose
supervisor vanished, for whatever reason, ends itself, so no process is ever left behind.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TypeAlias

import msgspec

from tokasaurus.config.slices import EngineSlices
from tokasaurus.launch.note_socket import NoteSocket
from tokasaurus.protocol.channels import door_address
from tokasaurus.protocol.doors import Door
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.role import Role

__all__ = [
    "AskRetire",
    "Assignment",
    "Dead",
    "Done",
    "Failed",
    "FromProcess",
    "Joined",
    "Left",
    "Lifeline",
    "Lost",
    "MayRetire",
    "Ready",
    "Replace",
    "Restored",
    "Retire",
    "Serving",
    "Start",
    "Stop",
    "Succession",
    "ToProcess",
]


class _Note(msgspec.Struct, frozen=True, tag=True):
    pass


class Ready(_Note, frozen=True):
    """Process to supervisor: it is initialised and able to work.

    The supervisor passes a worker's on to its manager.
    """

    largest_batch_s: float = 0.0  # what the largest batch of a worker may take
    worker: WorkerIdentity | None = None  # what it is, if it is a worker
    num_pages: int | None = None  # of its KV cache; None if it has as many as were planned


class Failed(_Note, frozen=True):
    """Process to supervisor: it is about to exit because of an exception."""

    summary: str  # one line
    traceback: str
    # The flags or the files of the model are to blame, so that another start would fail as well.
    is_final: bool = False


class Replace(_Note, frozen=True):
    """Server to supervisor: end this replica, which is of no use."""

    replica: int
    reason: str
    again: bool  # start it again


class Done(_Note, frozen=True):
    """Process to supervisor: it is about to exit, which completes the engine's work."""


class Succession(msgspec.Struct, frozen=True):
    """The engines of a keeper, as each of them sees the others."""

    directory: str  # of the keeper, with the sockets through which they reach one another
    number: int  # of this engine
    follows: bool  # another serves until this one is ready

    def store_socket(self, number: int) -> str:
        """Through which an engine answers for files and batches."""
        return str(Path(self.directory, f"store-{number}.sock"))

    def connections_socket(self, number: int, process: int | str) -> str:
        """Through which a process that serves HTTP takes connections; "*" stands for all."""
        return str(Path(self.directory, f"connections-{number}-{process}.sock"))


class Assignment(_Note, frozen=True):
    """Supervisor to a process that it spawned: the first note, with its role."""

    role: Role
    directory: str  # private to the engine, with the doors of the replica
    slices: EngineSlices
    listener_fd: int | None = None  # the server's listening socket
    succession: Succession | None = None  # of the server, where a new engine can take over
    # By the name of a role: those that open to other machines.
    doors: dict[str, Door] = {}

    def door(self, role: Role) -> Door:
        """A role's door, to open it or to enter it."""
        return self.doors.get(str(role)) or Door(door_address(self.directory, role))


class Start(_Note, frozen=True):
    """Supervisor to the server: every replica is ready, or lost."""

    # The workers of those that are ready, by replica and in the order of ranks.
    workers: dict[int, tuple[WorkerIdentity, ...]] = {}


class Lost(_Note, frozen=True):
    """Supervisor to the server: this replica ended, and others go on or are started again."""

    replica: int
    reason: str
    starts_again: bool


class Restored(_Note, frozen=True):
    """Supervisor to the server: a lost replica was started again, and is ready."""

    replica: int
    directory: str  # of its doors, the server's among them
    workers: tuple[WorkerIdentity, ...]  # in the order of ranks
    doors: dict[str, Door] = {}  # as of an assignment

    def door(self, role: Role) -> Door:
        """A role's door, to open it or to enter it."""
        return self.doors.get(str(role)) or Door(door_address(self.directory, role))


class Joined(_Note, frozen=True):
    """Supervisor to the server: an HTTP process was started."""

    number: int


class Left(_Note, frozen=True):
    """Supervisor to the server: an HTTP process has ended."""

    number: int


class Dead(_Note, frozen=True):
    """Supervisor to what answers clients: the engine ended; answer every request and stop."""

    reason: str


class Stop(_Note, frozen=True):
    """Supervisor to a process: finish what is running, then exit."""


class AskRetire(_Note, frozen=True):
    """Supervisor to the server: can a new engine take over?"""


class MayRetire(_Note, frozen=True):
    """Server to supervisor: the answer to ``AskRetire``."""

    refusal: str | None  # why a new engine would not be the same; None if it can take over
    # The weights have been updated, so a new engine would have others.
    has_new_weights: bool


class Retire(_Note, frozen=True):
    """Supervisor to what answers clients: a new engine serves. Finish what is there, and exit."""

    timeout_s: float  # for everything in flight
    successor: int  # the number of the new engine


class Serving(_Note, frozen=True):
    """Server to supervisor: clients are answered from now on."""


FromProcess: TypeAlias = Ready | Failed | Replace | Done | MayRetire | Serving
ToProcess: TypeAlias = (
    Assignment | Ready | Start | Lost | Restored | Joined | Left | Dead | Stop | AskRetire | Retire
)

_decoder = msgspec.json.Decoder(FromProcess | ToProcess)


class Lifeline(NoteSocket[FromProcess | ToProcess]):
    """One end of a lifeline."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, _decoder)

    @staticmethod
    def pair() -> tuple[Lifeline, Lifeline]:
        ours, theirs = socket.socketpair()
        return Lifeline(ours), Lifeline(theirs)
