"""The simulated device behind a worker's door, in real time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.protocol.channels import Receiver, Sender
from tokasaurus.protocol.messages import ForwardBatch, ForwardResult, FromServer

__all__ = ["DeviceStatistics", "work"]


class DeviceStatistics:
    """Running totals that another process can read at any time: numbers in a memory-mapped file.

    Args:
        path: of the file.
        create: by the one who writes; the reader opens it later.
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
        """Tokens, those after a sequence's end included."""
        return int(self._values[1])

    @property
    def num_rows(self) -> int:
        """Tokens that the latest batch drew."""
        return int(self._values[2])

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts that were computed."""
        return int(self._values[5])

    @property
    def waited_s(self) -> float:
        """Seconds in which the device had nothing to run, up to the latest batch."""
        return float(self._values[3])

    @property
    def device_s(self) -> float:
        """Modelled seconds."""
        return float(self._values[4])


def work(
    door: Receiver[ForwardBatch],
    to_manager: Sender[FromServer | ForwardResult],
    device: SimulatedDevice,
    statistics: DeviceStatistics,
) -> None:
    """Runs batches for ever, each for as long as the device says, one after the other.

    The time that the simulation itself takes is part of a batch's time. A batch that was there when
    the one before ended starts at that moment, so oversleeping does not add up.
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
            result = device.run(batch)
            now = time.monotonic()
            free_at = max(start + result.device_s, now)
            if free_at > now:
                time.sleep(free_at - now)
            to_manager.send(result)
            statistics.add(len(result.token_ids), len(batch.prefill_ids), waited_s, result.device_s)
            start, waited_s = free_at, 0.0
