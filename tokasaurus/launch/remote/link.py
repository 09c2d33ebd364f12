"""The link between a supervisor and an outpost: a TCP connection on which both know a secret.

Each side proves that it knows the secret without showing it (HMAC-SHA256 over two nonces), and
every frame has a code that only the other side can have made, in its place in the stream. So nobody
else can start a program through it. Frames are not encrypted: keys never travel, but both sides
derive them from the secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping

from zmq.utils import z85

from tokasaurus.errors import ConfigError, LaunchError
from tokasaurus.protocol.doors import DoorKeys

__all__ = ["SECRET_VARIABLE", "Link", "call", "door_keys", "secret_of", "take"]

SECRET_VARIABLE = "TOKASAURUS_LAUNCH_SECRET"

_MIN_SECRET_LENGTH = 24  # characters

_GREETING = b"tokasaurus outpost 1\n"
_NONCE_BYTES = _MAC_BYTES = 32
_HEADER = struct.Struct(f">I{_MAC_BYTES}s")  # length and code of the frame's data
_MAX_FRAME_BYTES = 1 << 28
_HANDSHAKE_S = 10.0
_SEND_S = 10.0  # how long the other side may take nothing


def secret_of(environment: Mapping[str, str]) -> str:
    """The secret of an engine: the user's, or a new one.

    Raises:
        ConfigError: the user's could be guessed.
    """
    given = environment.get(SECRET_VARIABLE)
    if given is None:
        return secrets.token_hex(32)
    if len(given) < _MIN_SECRET_LENGTH:
        raise ConfigError(
            f"the environment variable {SECRET_VARIABLE} has {len(given)} characters, and needs"
            f" {_MIN_SECRET_LENGTH}; leave it out for a random one"
        )
    return given


def door_keys(secret: str, session: bytes) -> DoorKeys:
    """The keys of an engine's doors, which supervisor and outposts derive alike.

    Args:
        secret: that they share.
        session: random bytes of this run of the engine.
    """
    names = (b"door", b"visitor")
    return DoorKeys(*(z85.encode(_mac(secret.encode(), each, session)).decode() for each in names))


def _mac(key: bytes, label: bytes, *parts: bytes) -> bytes:
    """Parts have fixed lengths, so that no two messages give the same bytes."""
    return hmac.digest(key, label + b"\0" + b"".join(parts), hashlib.sha256)


class Link:
    """One end of a link, after both sides have proved themselves. Any thread may send.

    Args:
        sock: connected.
        send_key: of the codes of the frames that are sent.
        receive_key: of those that come.
    """

    def __init__(self, sock: socket.socket, send_key: bytes, receive_key: bytes) -> None:
        self._socket = sock
        self._send_key, self._receive_key = send_key, receive_key
        self._num_sent = self._num_received = 0
        self._buffer = bytearray()
        self._sending = threading.Lock()
        self.own_host: str = sock.getsockname()[0]
        self.other_host: str = sock.getpeername()[0]
        sock.settimeout(_SEND_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, data: bytes) -> None:
        """Sends a frame. If the other side is gone, or takes nothing, the stream ends here too."""
        with self._sending:
            code = _mac(self._send_key, b"frame", self._num_sent.to_bytes(8, "big"), data)
            self._num_sent += 1
            try:
                self._socket.sendall(_HEADER.pack(len(data), code) + data)
            except OSError:
                self.end()

    def receive(self) -> list[bytes] | None:
        """Waits for data; returns the complete frames, or None at the end of the stream.

        A frame with a wrong code ends the stream.
        """
        try:
            data = self._socket.recv(1 << 20)
        except OSError:
            return None
        if not data:
            return None
        self._buffer += data
        frames = []
        while len(self._buffer) >= _HEADER.size:
            size, code = _HEADER.unpack_from(self._buffer)
            if size > _MAX_FRAME_BYTES:
                return None
            end = _HEADER.size + size
            if len(self._buffer) < end:
                break
            frame = bytes(self._buffer[_HEADER.size : end])
            number = self._num_received.to_bytes(8, "big")
            if not hmac.compare_digest(code, _mac(self._receive_key, b"frame", number, frame)):
                return None
            self._num_received += 1
            del self._buffer[:end]
            frames.append(frame)
        return frames

    def finish(self) -> None:
        """Says that nothing more is sent. What the other side sends can still be read."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        """Ends the stream for both sides. The reader here finds its end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def call(address: tuple[str, int], secret: str) -> Link:
    """Connects an outpost to its supervisor.

    Raises:
        LaunchError: the supervisor has another secret.
        OSError: the connection is refused, or fails: another call may succeed.
    """
    deadline = time.monotonic() + _HANDSHAKE_S
    sock = socket.create_connection(address, timeout=_HANDSHAKE_S)
    try:
        own = secrets.token_bytes(_NONCE_BYTES)
        sock.sendall(_GREETING + own)
        answer = _read(sock, _NONCE_BYTES + _MAC_BYTES, deadline)
        other, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
        if not hmac.compare_digest(proof, _mac(secret.encode(), b"supervisor", own, other)):
            raise LaunchError("the supervisor has another secret than this outpost")
        sock.sendall(_mac(secret.encode(), b"outpost", other, own))
        up, down = _frame_keys(secret, own, other)
        return Link(sock, up, down)
    except BaseException:
        sock.close()
        raise


def take(sock: socket.socket, secret: str) -> Link:
    """Takes the connection of an outpost; closes it if the outpost does not know the secret.

    Raises:
        LaunchError: it does not.
        OSError: the connection fails.
    """
    deadline = time.monotonic() + _HANDSHAKE_S
    try:
        greeting = _read(sock, len(_GREETING) + _NONCE_BYTES, deadline)
        if not greeting.startswith(_GREETING):
            raise LaunchError("it is no outpost of this version")
        other, own = greeting[len(_GREETING) :], secrets.token_bytes(_NONCE_BYTES)
        sock.sendall(own + _mac(secret.encode(), b"supervisor", other, own))
        proof = _read(sock, _MAC_BYTES, deadline)
        if not hmac.compare_digest(proof, _mac(secret.encode(), b"outpost", own, other)):
            raise LaunchError("it does not know the secret")
        up, down = _frame_keys(secret, other, own)
        return Link(sock, down, up)
    except BaseException:
        sock.close()
        raise


def _frame_keys(secret: str, outposts: bytes, supervisors: bytes) -> tuple[bytes, bytes]:
    """The keys of frames to the supervisor, and of frames from it."""
    nonces = outposts + supervisors
    return _mac(secret.encode(), b"up", nonces), _mac(secret.encode(), b"down", nonces)


def _read(sock: socket.socket, size: int, deadline: float) -> bytes:
    """Raises OSError if the data does not come before the deadline."""
    data = b""
    while len(data) < size:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionError("the other side ended the connection")
        data += piece
    return data
