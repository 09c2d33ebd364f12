"""Notes between two processes over a socket: lines of JSON, and the end of the stream.

The end means that the other side is gone, however it went.
"""

from __future__ import annotations

import socket
from typing import Generic, TypeVar

import msgspec

__all__ = ["NotUnderstood", "NoteSocket"]

N = TypeVar("N")  # all notes that either side sends


class NotUnderstood(Exception):
    """What has come is none of the notes that this side knows."""


class NoteSocket(Generic[N]):
    """One end.

    Args:
        sock: connected to the other end.
        decoder: of every note.
    """

    def __init__(self, sock: socket.socket, decoder: msgspec.json.Decoder[N]) -> None:
        self._socket = sock
        self._decoder = decoder
        self._buffer = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, note: N) -> None:
        """Sends a note. Does nothing if the other end is gone, which the receiver notices."""
        self.write(msgspec.json.encode(note) + b"\n")

    def receive_first(self) -> N | None:
        """Waits for one note, and leaves later ones to ``receive``; None at the stream's end.

        Raises:
            NotUnderstood: it is none.
        """
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
                return self._decode(whole)

    def receive(self) -> list[N] | None:
        """Waits for data; returns the complete notes, or None at the end of the stream.

        Raises:
            NotUnderstood: one of them is none.
        """
        data = self.read()
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [self._decode(line) for line in lines]

    def _decode(self, line: bytes) -> N:
        try:
            return self._decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise NotUnderstood(str(error)) from error

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
