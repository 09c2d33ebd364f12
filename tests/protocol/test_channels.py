"""Doors in an event loop."""

from __future__ import annotations

import asyncio
import select
import socket
from pathlib import Path

import zmq
from engine_process import eventually

from tokasaurus.launch.doors import TO_SERVER
from tokasaurus.protocol.channels import AsyncReceiver, Sender
from tokasaurus.protocol.messages import WorkerStall


def test_a_receiver_that_is_cancelled_as_messages_come_loses_none(tmp_path):
    assert asyncio.run(_messages_after_a_cancellation(tmp_path)) == [1.0, 2.0, 3.0]


async def _messages_after_a_cancellation(directory: Path) -> list[float]:
    door = f"ipc://{directory}/door.sock"
    receiver = AsyncReceiver(door, TO_SERVER)
    sender = Sender(door, TO_SERVER)
    task = asyncio.create_task(receiver.receive())
    await asyncio.sleep(0.1)
    ours, theirs = socket.socketpair()
    left: list[WorkerStall] = []

    def lose() -> None:
        asyncio.get_running_loop().remove_reader(ours)
        task.cancel()
        left.extend(receiver.receive_rest())

    asyncio.get_running_loop().add_reader(ours, lose)
    for seconds in (1.0, 2.0, 3.0):
        sender.send(WorkerStall(seconds))
    # The loop is busy until one has come.
    assert select.select([receiver._socket.get(zmq.FD)], [], [], 60)[0]
    theirs.send(b"x")
    # In one turn of the loop, the first message reaches the task's future, and the task is
    # cancelled before it runs.
    await asyncio.wait([task])
    assert task.cancelled()

    def all_have_come() -> bool:
        left.extend(receiver.receive_rest())
        return len(left) >= 3

    eventually(all_have_come, "three messages")
    ours.close()
    theirs.close()
    sender.close()
    receiver.close()
    return [each.seconds for each in left]
