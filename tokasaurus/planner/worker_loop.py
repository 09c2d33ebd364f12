"""Runs a simulated device in a worker's place, in real time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.protocol.channels import Receiver, Sender
from tokasaurus.protocol.messages import ForwardBatch, FromServer, FromWorker, ToWorker

__all__ = ["DeviceStatistics", "work"]


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


def work(
    door: Receiver[ToWorker],
    to_manager: Sender[FromServer | FromWorker],
    device: SimulatedDevice,
    statistics: DeviceStatistics,
) -> None:
    """Runs batches without end, one after the other, each for its modelled time.

    The time of the simulation itself is part of the time of a batch. A batch that waits while the
    previous one runs starts when that one is due to end, so oversleeping does not add up.
    """
    free_at = time.monotonic()
    while True:
        start = free_at
        batches = door.receive(timeout_s=0)
        if not batches:
            batches = door.receive()
            start = time.monotonic()
        waited_s = start - free_at
        for batch in batches:
            if not isinstance(batch, ForwardBatch):
                to_manager.send(device.carry_out(batch))
                continue
            result = device.run(batch)
            now = time.monotonic()
            free_at = max(start + result.device_s, now)
            if free_at > now:
                time.sleep(free_at - now)
            to_manager.send(result)
            statistics.add(len(result.token_ids), len(batch.prefill_ids), waited_s, result.device_s)
            start, waited_s = free_at, 0.0
