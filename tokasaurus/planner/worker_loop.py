"""Runs a simulated device in a worker's place, in real time."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokasaurus.planner.pipeline import SimulatedPipeline
from tokasaurus.protocol.channels import Receiver, Sender
from tokasaurus.protocol.messages import ForwardBatch, FromServer, FromWorker, ToWorker

__all__ = ["DeviceStatistics", "work"]


_COARSE_S = 0.002  # a door waits for whole milliseconds


class DeviceStatistics:
    """Running totals in a memory-mapped file, which another process can read at any time.

    Args:
        path: the file.
        create: whether to create the file, which the writer does before a reader opens it.
    """

    FILE_NAME = "device_statistics"

    def __init__(self, path: Path, *, create: bool) -> None:
        self._values = np.memmap(path, np.float64, "w+" if create else "r+", shape=(6,))

    def add(self, num_rows: int, num_prompt_tokens: int, waited_s: float, device_s: float) -> None:
        """Counts a batch that drew ``num_rows`` tokens."""
        values = self._values
        values[0] += 1
        values[1] += num_rows
        values[2] = num_rows
        values[3] += waited_s
        values[4] += device_s
        values[5] += num_prompt_tokens

    @property
    def num_batches(self) -> int:
        return int(self._values[0])

    @property
    def num_drawn(self) -> int:
        """The drawn tokens, including those after the end of a sequence."""
        return int(self._values[1])

    @property
    def num_rows(self) -> int:
        """The tokens that the latest batch drew."""
        return int(self._values[2])

    @property
    def num_prompt_tokens(self) -> int:
        """The computed tokens of prompts."""
        return int(self._values[5])

    @property
    def waited_s(self) -> float:
        """The seconds in which the device had nothing to run, up to the latest batch."""
        return float(self._values[3])

    @property
    def device_s(self) -> float:
        """The modelled seconds of all batches."""
        return float(self._values[4])


class _Answer(NamedTuple):
    """What the device has computed, and when it would have."""

    due_at: float
    message: FromWorker
    batch: ForwardBatch | None
    waited_s: float
    device_s: float


def work(
    door: Receiver[ToWorker],
    to_manager: Sender[FromServer | FromWorker],
    device: SimulatedPipeline,
    statistics: DeviceStatistics,
) -> None:
    """Runs batches without end, each for its modelled time.

    The time of the simulation itself is part of the time of a batch. A batch that waits while the
    previous one runs starts when that one is due to end, so oversleeping does not add up.
    """
    answers: deque[_Answer] = deque()

    def send_due() -> None:
        while answers and answers[0].due_at <= time.monotonic():
            answer = answers.popleft()
            to_manager.send(answer.message)
            if answer.batch is not None:
                num_rows = len(answer.batch.decode_slots) + len(answer.batch.draw_slots)
                num_fed = len(answer.batch.prefill_ids)
                statistics.add(num_rows, num_fed, answer.waited_s, answer.device_s)

    device.run_late(time.monotonic())
    while True:
        orders = _receive(door, answers[0].due_at if answers else None)
        arrived_at = time.monotonic()
        for order in orders:
            answers.append(_answer(order, device, arrived_at))
            send_due()
        send_due()


def _receive(door: Receiver[ToWorker], until: float | None) -> list[ToWorker]:
    """Waits for orders until a moment, or without end; returns those that have come."""
    if until is None:
        return door.receive()
    left_s = until - time.monotonic()
    if left_s > _COARSE_S:
        return door.receive(left_s - _COARSE_S)
    time.sleep(max(0.0, left_s))
    return door.receive(0)


def _answer(order: ToWorker, device: SimulatedPipeline, arrived_at: float) -> _Answer:
    if not isinstance(order, ForwardBatch):
        done, due_at = device.carry_out(order, arrived_at)
        return _Answer(due_at, done, None, 0.0, 0.0)
    waited_s = device.waited_s
    result, spans = device.run(order, arrived_at)
    device.run_late(time.monotonic())
    return _Answer(spans[-1].end_s, result, order, device.waited_s - waited_s, result.device_s)
