"""The lifeline: a socket pair between the supervisor and each process it watches.

The process says when it is ready, or why it failed. The supervisor says when to stop, and when
another process died. The end of the stream means that the other side is gone: a process whose
supervisor vanished, for whatever reason, ends itself, so no process is ever left behind.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from tokasaurus.config.slices import EngineSlices
from tokasaurus.protocol.channels import door_address
from tokasaurus.protocol.doors import Door
from tokasaurus.protocol.identity import WorkerIdentity
from tokasaurus.protocol.role import Role

__all__ = [
    "Assignment",
    "Dead",
    "Done",
    "Failed",
    "FromProcess",
    "Joined",
    "Left",
    "Lifeline",
    "Lost",
    "Ready",
    "Replace",
    "Restored",
    "Start",
    "Stop",
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


class Assignment(_Note, frozen=True):
    """Supervisor to a process that it spawned: the first note, with its role."""

    role: Role
    directory: str  # private to the engine, with the doors of the replica
    slices: EngineSlices
    listener_fd: int | None = None  # the server's listening socket
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


FromProcess: TypeAlias = Ready | Failed | Replace | Done
ToProcess: TypeAlias = Assignment | Ready | Start | Lost | Restored | Joined | Left | Dead | Stop

_decoder = msgspec.json.Decoder(FromProcess | ToProcess)


class Lifeline:
    """One end of a lifeline: notes as lines of JSON."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""

    @staticmethod
    def pair() -> tuple[Lifeline, Lifeline]:
        ours, theirs = socket.socketpair()
        return Lifeline(ours), Lifeline(theirs)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, note: FromProcess | ToProcess) -> None:
        """Sends a note. Does nothing if the other end is gone, which the receiver notices."""
        self.write(msgspec.json.encode(note) + b"\n")

    def receive_first(self) -> FromProcess | ToProcess | None:
        """Waits for one note, and leaves later ones to ``receive``; None at the stream's end."""
        while True:
            try:
                data = self._socket.recv(1 << 16, socket.MSG_PEEK)
                line, end, _ = data.partition(b"\n")
                self._buffer += self._socket.recv(len(line) + len(end))
            except OSError:
                return None
            if not data:
                return None
            if end:
                whole, self._buffer = self._buffer, b""
                note: FromProcess | ToProcess = _decoder.decode(whole)
                return note

    def receive(self) -> list[FromProcess | ToProcess] | None:
        """Waits for data; returns the complete notes, or None at the end of the stream."""
        data = self.read()
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [_decoder.decode(line) for line in lines]

    def read(self) -> bytes:
        """Waits for data; returns it as it came, or b"" at the end of the stream."""
        try:
            return self._socket.recv(1 << 16)
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        """Sends what ``read`` gave elsewhere. Does nothing if the other end is gone."""
        try:
            self._socket.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        self._socket.close()
