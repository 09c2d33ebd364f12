"""What a process needs to open or to enter a door: its address, its socket and its keys.

Doors within one machine are Unix sockets in a private directory, and need no keys. A door that
opens to other machines is a TCP socket, and both sides prove themselves and encrypt with CurveZMQ
(https://rfc.zeromq.org/spec/26/). Its process refuses every peer that has not the key of the
engine's visitors.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

__all__ = ["Door", "DoorKeys", "enter", "lock"]

_DOMAIN = "doors"
# Of a message, also of one that a stranger sends before it is refused.
_MAX_BYTES = 1 << 28


class DoorKeys(msgspec.Struct, frozen=True):
    """The secret keys of an engine's doors and of all who enter them, in Z85."""

    door: str
    visitor: str


class Door(msgspec.Struct, frozen=True):
    """A door, as one process sees it."""

    address: str  # as ZeroMQ writes it
    keys: DoorKeys | None = None
    # For the process that opens it: a socket that listens at the address already.
    listener_fd: int | None = None


def enter(socket: zmq.Socket[Any], door: Door) -> None:
    """Connects a socket to a door, which need not be open yet."""
    if door.keys is not None:
        socket.set(zmq.CURVE_SERVERKEY, _public(door.keys.door))
        socket.set(zmq.CURVE_PUBLICKEY, _public(door.keys.visitor))
        socket.set(zmq.CURVE_SECRETKEY, door.keys.visitor.encode())
    socket.set(zmq.IPV6, door.address.startswith("tcp://["))
    socket.connect(door.address)


def lock(socket: zmq.Socket[Any], door: Door) -> None:
    """Opens a door: binds the socket, for visitors that have the key if the door has one."""
    if door.keys is not None:
        _admit(socket.context, _public(door.keys.visitor))
        socket.set(zmq.MAXMSGSIZE, _MAX_BYTES)
        socket.set(zmq.CURVE_SERVER, True)
        socket.set(zmq.CURVE_SECRETKEY, door.keys.door.encode())
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN.encode())
    socket.set(zmq.IPV6, door.address.startswith("tcp://["))
    if door.listener_fd is not None:
        socket.set(zmq.USE_FD, door.listener_fd)
    socket.bind(door.address)


@lru_cache(maxsize=16)
def _public(secret: str) -> bytes:
    return zmq.curve_public(secret.encode())


class _Visitors:
    """The public keys that a context's doors admit; asked by its authenticator."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self.keys


_visitors: dict[zmq.Context[Any], _Visitors] = {}
_making = threading.Lock()


def _admit(context: zmq.Context[Any], key: bytes) -> None:
    """Lets the doors of a context admit a key, and no others.

    A context has one authenticator, a thread that ends with the process.
    """
    with _making:
        if context not in _visitors:
            visitors = _Visitors()
            authenticator = ThreadAuthenticator(context)
            authenticator.start()
            authenticator.configure_curve_callback(domain=_DOMAIN, credentials_provider=visitors)
            _visitors[context] = visitors
        _visitors[context].keys.add(key)
