"""Channels between the processes of one engine.

They are ZeroMQ PUSH/PULL sockets over Unix sockets in the engine's private directory. Each process
has a door, a socket that it binds, and the server has one for each replica. The processes that send
to a door connect::

    server.sock  ◀── manager
    manager.sock ◀── server, worker
    worker.sock  ◀── manager

With several server processes there are also HTTP processes, and a door of the server for them::

    http.sock    ◀── HTTP processes
    http-1.sock  ◀── server

Doors of further replicas have numbers, as ``Role`` says. The doors of a replica that was started
again are in a directory of their own. Which replica a message of a manager is
from follows from the door that it came through.

Where an engine has processes on several machines, doors are TCP sockets with keys (``Door``).

Sending never blocks and never drops a message; the supervisor deals with a peer that died. The
messages of one sender arrive in order.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Generic, TypeVar

import zmq
import zmq.asyncio

from tokasaurus.protocol.doors import Door, enter, lock
from tokasaurus.protocol.role import Role
from tokasaurus.protocol.wire import Codec

__all__ = ["AsyncReceiver", "Receiver", "Sender", "door_address"]

M = TypeVar("M")


def door_address(directory: str | Path, role: Role) -> str:
    """The address of a role's door, as ZeroMQ writes it.

    Args:
        directory: the engine's private directory.
        role: of the process that opens the door.
    """
    return f"ipc://{directory}/{role}.sock"


def _door(door: Door | str) -> Door:
    return Door(door) if isinstance(door, str) else door


class Sender(Generic[M]):
    """Sends to one door; may be created before the door opens.

    Args:
        door: or its address, if it is within this machine.
        codec: for the messages that this door takes.
    """

    def __init__(self, door: Door | str, codec: Codec[M]) -> None:
        self._codec = codec
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set(zmq.SNDHWM, 0)
        self._socket.set(zmq.LINGER, 0)
        enter(self._socket, _door(door))

    def send(self, message: M) -> None:
        self._socket.send(self._codec.encode(message))

    def close(self) -> None:
        self._socket.close()


class Receiver(Generic[M]):
    """Opens a door and receives, for a process that waits for nothing else."""

    def __init__(self, door: Door | str, codec: Codec[M]) -> None:
        self._codec = codec
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, 0)
        lock(self._socket, _door(door))
        self._timeout_ms = -1  # of the socket

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """The socket, to be polled together with others."""
        return self._socket

    def receive(self, timeout_s: float | None = None) -> list[M]:
        """Waits for at least one message, then returns all that have arrived, oldest first.

        Args:
            timeout_s: how long to wait before returning an empty list; None waits without limit.
        """
        timeout_ms = -1 if timeout_s is None else round(timeout_s * 1000)
        if timeout_ms != self._timeout_ms:
            self._socket.set(zmq.RCVTIMEO, timeout_ms)
            self._timeout_ms = timeout_ms
        try:
            messages = [self._codec.decode(self._socket.recv())]
        except zmq.Again:
            return []
        while True:
            try:
                messages.append(self._codec.decode(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def close(self) -> None:
        self._socket.close(linger=0)


class AsyncReceiver(Generic[M]):
    """Opens a door and receives, for a process that runs an asyncio event loop."""

    def __init__(self, door: Door | str, codec: Codec[M]) -> None:
        self._codec = codec
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.set(zmq.RCVHWM, 0)
        lock(self._socket, _door(door))
        self._awaited: asyncio.Future[bytes] | None = None

    async def receive(self) -> M:
        awaited = self._awaited = asyncio.ensure_future(self._socket.recv())
        data = await awaited
        self._awaited = None
        return self._codec.decode(data)

    async def receive_all(self) -> list[M]:
        """Waits for at least one message, then returns all that have arrived, oldest first."""
        return [await self.receive(), *self.receive_rest()]

    def receive_rest(self) -> list[M]:
        """All messages that have arrived, oldest first; only while nothing else receives.

        Of a receiver that was cancelled too: it may have a message that it has not returned.
        """
        messages: list[M] = []
        awaited, self._awaited = self._awaited, None
        if awaited is not None and awaited.done() and not awaited.cancelled():
            messages.append(self._codec.decode(awaited.result()))
        socket: zmq.Socket[bytes] = zmq.Socket.shadow(self._socket)
        while True:
            try:
                messages.append(self._codec.decode(socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return messages

    def close(self) -> None:
        self._socket.close(linger=0)
