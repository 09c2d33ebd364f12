"""The lifeline: a socket pair between the supervisor and each process it watches.

The process says when it is ready, or why it failed. The supervisor says when to stop and what became
of the others. The end of the stream says that the other side is gone: a process whose supervisor
vanished, however it vanished, ends itself, so nothing is ever left behind.
"""

from __future__ import annotations

import socket
from typing import TypeAlias

import msgspec

from tokasaurus.config.slices import EngineSlices

__all__ = [
    "Assignment",
    "Dead",
    "Done",
    "Failed",
    "FromProcess",
    "Lifeline",
    "Ready",
    "Start",
    "Stop",
    "ToProcess",
]


class _Note(msgspec.Struct, frozen=True, tag=True):
    pass


class Ready(_Note, frozen=True):
    """Process to supervisor: initialised, and able to do its work from now on."""


class Failed(_Note, frozen=True):
    """Process to supervisor: this process is about to exit because of an exception."""

    summary: str  # one line
    traceback: str


class Done(_Note, frozen=True):
    """Process to supervisor: this process is about to exit, and the engine's work is done with it."""


class Assignment(_Note, frozen=True):
    """Supervisor to a process it spawned, first of all: what to be."""

    role: str
    directory: str  # the engine's private directory, where the doors are
    slices: EngineSlices
    listener_fd: int | None = None  # the server's listening socket


class Start(_Note, frozen=True):
    """Supervisor to the server: all the others are ready."""


class Dead(_Note, frozen=True):
    """Supervisor to the server: another process ended; answer everyone and stop."""

    reason: str


class Stop(_Note, frozen=True):
    """Supervisor to a process: finish what is running, then exit."""


FromProcess: TypeAlias = Ready | Failed | Done
ToProcess: TypeAlias = Assignment | Start | Dead | Stop

_decoder = msgspec.json.Decoder(Ready | Failed | Done | Assignment | Start | Dead | Stop)


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
        """Does nothing if the other end is gone: its owner will notice by itself."""
        try:
            self._socket.sendall(msgspec.json.encode(note) + b"\n")
        except OSError:
            return

    def receive(self) -> list[FromProcess | ToProcess] | None:
        """Waits for something to arrive; returns complete notes, or None at the end of the stream."""
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [_decoder.decode(line) for line in lines]

    def close(self) -> None:
        self._socket.close()
