"""Idle connections of clients pass from an old engine to a new one, as open files.

A connection without a request in it is nothing but its socket, and what has been received of its
next requests. The old engine sends these through a Unix socket, and the client notices nothing:
what it has sent in the meantime waits in the system, and the new engine reads it. With TLS a
connection has keys and counters besides, so it stays.

The received bytes are in a file in memory, which is sent as an open file, too: there may be more
than one message may have.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from tokasaurus.launch.lifeline import Succession

__all__ = ["Heirs", "Inheritance", "heirs_of", "inherit"]

_MOST_AT_ONCE = 256

Adopt: TypeAlias = Callable[[socket.socket, bytes], None]
"""Takes a connection, and what has been received of its next requests."""


def inherit(succession: Succession | None, process: int, adopt: Adopt) -> Inheritance | None:
    """Takes connections in one of an engine's processes; None if it never follows another."""
    if succession is None:
        return None
    return Inheritance(succession.connections_socket(succession.number, process), adopt)


def heirs_of(succession: Succession | None, successor: int) -> Heirs | None:
    """Those that take connections of an engine when another follows it."""
    if succession is None:
        return None
    return Heirs(succession.connections_socket(successor, "*"))


class Inheritance:
    """Takes the connections of an old engine.

    Args:
        path: of the Unix socket, below the keeper's directory, which other users cannot enter.
        adopt: gets each connection.
    """

    def __init__(self, path: str, adopt: Adopt) -> None:
        self._adopt = adopt
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(path)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._on_readable)

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MOST_AT_ONCE):
                _, descriptors, flags, _ = socket.recv_fds(self._socket, 1, 2)
                self._take(descriptors, is_whole=not flags & socket.MSG_CTRUNC)

    def _take(self, descriptors: list[int], *, is_whole: bool) -> None:
        if not is_whole:  # this process may open no more files
            for each in descriptors:
                os.close(each)
            return
        connection, *files = descriptors
        self._adopt(socket.socket(fileno=connection), b"".join(map(_content, files)))

    def close(self) -> None:
        """Takes no more than what has been sent already."""
        Path(self._socket.getsockname()).unlink(missing_ok=True)
        self._on_readable()
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()


class Heirs:
    """The processes of the new engine that take connections.

    Args:
        pattern: of the paths of their Unix sockets.
    """

    def __init__(self, pattern: str) -> None:
        self._paths = Path(pattern)
        self._turns = itertools.count()

    def give(self, descriptor: int, unread: bytes) -> bool:
        """Gives a connection to the next one of them. Returns False if none can take it now.

        Args:
            descriptor: of the connection.
            unread: what has been received of its next requests.
        """
        with contextlib.ExitStack() as stack:
            descriptors = [descriptor]
            if unread:
                file = stack.enter_context(open(os.memfd_create("unread"), "w+b"))
                file.write(unread)
                file.flush()
                descriptors.append(file.fileno())
            return self._send(descriptors)

    def _send(self, descriptors: list[int]) -> bool:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
        found = sorted(self._paths.parent.glob(self._paths.name))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            for _ in found:
                path = os.fspath(found[next(self._turns) % len(found)])
                # Its queue is full, its process has ended, or it does not listen yet.
                with contextlib.suppress(
                    BlockingIOError, ConnectionRefusedError, FileNotFoundError
                ):
                    # ``socket.send_fds`` would ignore the address.
                    sender.sendmsg([b"c"], [rights], 0, path)
                    return True
        return False


def _content(descriptor: int) -> bytes:
    """Reads a file from its beginning, and closes it."""
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()
