"""Links between a supervisor and an outpost: both know a secret, and nobody else can speak."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import pytest

from tokasaurus.errors import ConfigError, LaunchError
from tokasaurus.launch.remote import link as link_module
from tokasaurus.launch.remote.link import SECRET_VARIABLE, Link, call, door_keys, secret_of, take

SECRET = "a secret of thirty-two characters"


@contextmanager
def meeting(taker: Callable[[socket.socket], object]):
    """The address of a server that gives its one connection to ``taker``, and what became of it."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(taker(listener.accept()[0]))
        except (LaunchError, OSError) as error:
            results.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run)
        thread.start()
        yield listener.getsockname()[:2], results, thread
        thread.join(20)


def linked() -> tuple[Link, Link]:
    """The outpost's end and the supervisor's."""
    with meeting(lambda sock: take(sock, SECRET)) as (address, results, thread):
        outposts = call(address, SECRET)
        thread.join(20)
    (supervisors,) = results
    assert isinstance(supervisors, Link), supervisors
    return outposts, supervisors


def received(link: Link, count: int) -> list[bytes]:
    frames: list[bytes] = []
    while len(frames) < count:
        more = link.receive()
        assert more is not None
        frames += more
    return frames


def test_frames_of_any_size_come_whole_and_in_order():
    outposts, supervisors = linked()
    frames = [b"", b"x", secrets.token_bytes(3_000_000), b"last"]
    for sender, receiver in ((outposts, supervisors), (supervisors, outposts)):
        thread = threading.Thread(target=lambda link=sender: [link.send(each) for each in frames])
        thread.start()
        assert received(receiver, len(frames)) == frames
        thread.join()
    outposts.end()
    assert supervisors.receive() is None
    outposts.close()
    supervisors.close()


def test_an_outpost_without_the_secret_is_refused():
    with meeting(lambda sock: take(sock, SECRET)) as (address, results, thread):
        # It does not believe this supervisor, and says nothing more.
        with pytest.raises(LaunchError, match="another secret"):
            call(address, "another secret of thirty characters")
        thread.join(20)
        assert isinstance(results[0], ConnectionError)


def test_a_supervisor_takes_nobody_who_cannot_prove_the_secret():
    def answer(sock: socket.socket) -> None:
        take(sock, SECRET)

    greeting = b"tokasaurus outpost 1\n" + bytes(32)
    strangers = [greeting + bytes(32), b"GET / HTTP/1.1\r\n" + bytes(64), b""]
    for said in strangers:
        with meeting(answer) as (address, results, thread):
            # The supervisor may end the connection at any of these calls.
            with socket.create_connection(address) as sock, contextlib.suppress(OSError):
                sock.sendall(said)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1024):
                    pass
            thread.join(20)
            assert not thread.is_alive()
            assert isinstance(results[0], LaunchError | ConnectionError), said


def test_who_sends_a_byte_now_and_then_has_no_more_time_than_others(monkeypatch):
    monkeypatch.setattr(link_module, "_HANDSHAKE_S", 0.5)
    with meeting(lambda sock: take(sock, SECRET)) as (address, results, thread):
        with socket.create_connection(address) as sock, contextlib.suppress(OSError):
            for byte in b"tokasaurus outpost 1\n":
                sock.sendall(bytes([byte]))
                time.sleep(0.1)
        thread.join(20)
        assert isinstance(results[0], TimeoutError)


def test_an_outpost_obeys_no_supervisor_that_cannot_prove_the_secret():
    """Not even one that repeats what a true one has said."""
    recorded: list[bytes] = []

    def record(sock: socket.socket) -> None:
        take(_Recording(sock, recorded), SECRET)

    with meeting(record) as (address, _, thread):
        call(address, SECRET).close()
        thread.join(20)
    said = b"".join(recorded)
    assert len(said) == 64

    def repeat(sock: socket.socket) -> None:
        sock.sendall(said)
        while sock.recv(1024):
            pass

    with meeting(repeat) as (address, _, _), pytest.raises(LaunchError, match="another secret"):
        call(address, SECRET)


class _Recording:
    """A socket that remembers what it sends."""

    def __init__(self, sock: socket.socket, sent: list[bytes]) -> None:
        self._sock, self._sent = sock, sent

    def sendall(self, data: bytes) -> None:
        self._sent.append(data)
        self._sock.sendall(data)

    def __getattr__(self, name: str):
        return getattr(self._sock, name)


@pytest.mark.parametrize("attack", ["change", "repeat", "forge", "swap"])
def test_a_frame_that_another_has_touched_ends_the_stream(attack):
    outposts, supervisors = linked()
    recorded: list[bytes] = []
    raw = outposts._socket
    outposts._socket = _Recording(raw, recorded)
    outposts.send(b"a program to start")
    outposts.send(b"another")
    assert received(supervisors, 2) == [b"a program to start", b"another"]
    first, second = recorded
    outposts.send(b"third")
    assert received(supervisors, 1) == [b"third"]
    third = recorded[2]
    tampered = {
        "change": third[:-1] + b"D",
        "repeat": third,
        "forge": (5).to_bytes(4, "big") + bytes(32) + b"other",
        "swap": second + first,
    }
    raw.sendall(tampered[attack])
    assert supervisors.receive() is None
    outposts.close()
    supervisors.close()


def test_keys_follow_from_the_secret_and_the_session():
    keys = door_keys(SECRET, bytes(32))
    assert keys == door_keys(SECRET, bytes(32))
    others = [door_keys(SECRET, b"1" * 32), door_keys(SECRET + "x", bytes(32))]
    every = {
        keys.door,
        keys.visitor,
        *(key for each in others for key in (each.door, each.visitor)),
    }
    assert len(every) == 6


def test_a_secret_that_could_be_guessed_is_refused():
    with pytest.raises(ConfigError, match=SECRET_VARIABLE):
        secret_of({SECRET_VARIABLE: "swordfish"})
    assert secret_of({SECRET_VARIABLE: SECRET}) == SECRET
    assert secret_of({}) != secret_of({})
