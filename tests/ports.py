"""Ports whose number a test must know before anything listens, or where nothing may listen."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port that nobody else is given: at first, whoever connects to it is refused.

    A program that is told the number may listen there meanwhile. The system would give a port that
    is merely free to any other program that asks for one.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
