"""Doors that open to other machines admit the visitors of their engine, and nobody else."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from zmq.utils import z85

from tokasaurus.launch.doors import TO_MANAGER
from tokasaurus.protocol.channels import Receiver, Sender
from tokasaurus.protocol.doors import Door, DoorKeys
from tokasaurus.protocol.messages import AbortRequest, GenerateRequest, Sampling


def key(number: int) -> str:
    return z85.encode(bytes([number]) * 32).decode()


KEYS = DoorKeys(key(1), key(2))


@pytest.fixture
def door() -> Iterator[tuple[Receiver, Door]]:
    """An open door, and the door as a visitor sees it."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    receiver = Receiver(Door(address, KEYS, listener.detach()), TO_MANAGER)
    yield receiver, Door(address, KEYS)
    receiver.close()


def test_messages_with_arrays_come_through_a_locked_door_in_order(door):
    receiver, outside = door
    sender = Sender(outside, TO_MANAGER)
    prompt = np.arange(1, 5000, dtype=np.int32)
    sender.send(GenerateRequest(7, prompt, 1, 3, Sampling(), 5, ()))
    for number in range(100):
        sender.send(AbortRequest(number))
    received = []
    while len(received) < 101:
        messages = receiver.receive(20)
        assert messages
        received += messages
    assert received[0].prompt_ids.tolist() == prompt.tolist()
    assert [each.request_id for each in received[1:]] == list(range(100))
    sender.close()


def test_others_are_refused(door):
    receiver, outside = door
    strangers = {
        "no keys": Door(outside.address),
        "a key of its own": Door(outside.address, DoorKeys(KEYS.door, key(3))),
        "another engine's keys": Door(outside.address, DoorKeys(key(4), key(3))),
    }
    senders = [Sender(each, TO_MANAGER) for each in strangers.values()]
    for sender in senders:
        sender.send(AbortRequest(666))
    assert receiver.receive(1.0) == [], f"one of these came in: {list(strangers)}"
    friend = Sender(outside, TO_MANAGER)
    friend.send(AbortRequest(1))
    assert [each.request_id for each in receiver.receive(20)] == [1]
    for sender in (*senders, friend):
        sender.close()


def test_what_travels_is_encrypted():
    """A tap between visitor and door sees nothing of a message."""
    with socket.create_server(("127.0.0.1", 0)) as tap:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        door = Door(f"tcp://127.0.0.1:{port}", KEYS, listener.detach())
        receiver = Receiver(door, TO_MANAGER)
        sender = Sender(Door(f"tcp://127.0.0.1:{tap.getsockname()[1]}", KEYS), TO_MANAGER)
        prompt = np.arange(1000, 2000, dtype=np.int32)
        sender.send(GenerateRequest(7, prompt, 1, 3, Sampling(), 5, ()))
        visitor, _ = tap.accept()
        seen = b""
        with visitor, socket.create_connection(("127.0.0.1", port)) as behind:
            visitor.settimeout(0.05)
            behind.settimeout(0.05)
            messages = []
            while not messages:
                for source, sink in ((visitor, behind), (behind, visitor)):
                    try:
                        data = source.recv(1 << 16)
                    except TimeoutError:
                        continue
                    seen += data
                    sink.sendall(data)
                messages = receiver.receive(0.01)
        assert messages[0].prompt_ids.tolist() == prompt.tolist()
        assert len(seen) > prompt.nbytes
        assert prompt[:8].tobytes() not in seen
        sender.close()
        receiver.close()


def test_a_stranger_cannot_fill_the_memory_with_one_message(door):
    _, outside = door
    host, port = outside.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        mechanism = b"CURVE".ljust(20, b"\0")
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism
        sock.sendall(greeting.ljust(64, b"\0"))
        sock.sendall(b"\x06" + struct.pack(">Q", 1 << 29))  # a command of 512 MiB
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1024):  # the door ends the connection
                pass
