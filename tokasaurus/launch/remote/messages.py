"""What a supervisor and an outpost tell each other on their link."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from tokasaurus.launch.lifeline import Assignment
from tokasaurus.launch.machine import Machine
from tokasaurus.protocol.role import Role

__all__ = [
    "Beat",
    "Begin",
    "Dismissed",
    "Ended",
    "FromOutpost",
    "Joined",
    "Kill",
    "Look",
    "Notes",
    "Open",
    "Opened",
    "Refused",
    "Seen",
    "ToOutpost",
    "Welcome",
    "encode",
    "from_outpost",
    "meeting_door",
    "to_outpost",
]


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


class Joined(_Message, frozen=True):
    """Outpost to supervisor, first of all: which one it is."""

    index: int  # by which the supervisor places processes
    name: str  # of its machine, for messages
    version: str


class Welcome(_Message, frozen=True):
    """Supervisor to outpost: it belongs to the engine."""

    session: bytes  # what the keys of the doors follow from, beside the secret


class Refused(_Message, frozen=True):
    """Supervisor to outpost: it does not belong to the engine, and must end."""

    reason: str


class Look(_Message, frozen=True):
    """Supervisor to outpost: look at your machine."""

    device: str  # the flags that decide what to look at
    instruction_set: str


class Seen(_Message, frozen=True):
    """Outpost to supervisor: its machine, or why it cannot be used."""

    machine: Machine | None
    first_device: int  # the visible CUDA device that its first worker takes
    problem: str = ""


class Open(_Message, frozen=True):
    """Supervisor to outpost: take a port for a door of a process that will begin."""

    door: str


class Opened(_Message, frozen=True):
    """Outpost to supervisor: the door's address."""

    door: str
    address: str


class Begin(_Message, frozen=True):
    """Supervisor to outpost: start a process."""

    assignment: Assignment
    num_workers: int  # of the engine on that machine
    device: int  # of a worker, among those of its outpost
    num_threads: int | None  # of a worker on the CPU, if its place decides


class Notes(_Message, frozen=True):
    """Bytes of a process's lifeline, in either direction."""

    role: Role
    data: bytes


class Kill(_Message, frozen=True):
    """Supervisor to outpost: end a process at once."""

    role: Role


class Ended(_Message, frozen=True):
    """Outpost to supervisor: a process has ended, after its last notes."""

    role: Role
    status: int  # less than 0 for a signal


class Beat(_Message, frozen=True):
    """Either side: it is there. Silence means that it is gone."""


class Dismissed(_Message, frozen=True):
    """Supervisor to outpost: the engine has ended."""


FromOutpost: TypeAlias = Joined | Seen | Opened | Notes | Ended | Beat
ToOutpost: TypeAlias = Welcome | Refused | Look | Open | Begin | Notes | Kill | Beat | Dismissed

encode = msgspec.msgpack.encode
from_outpost = msgspec.msgpack.Decoder(FromOutpost).decode
to_outpost = msgspec.msgpack.Decoder(ToOutpost).decode


def meeting_door(replica: int) -> str:
    """The name of the port at which the workers of a replica meet; the first of them opens it."""
    return f"ranks-{replica}"
