"""Measures the time that the device takes for a batch, and tells when the batch has ended."""

from __future__ import annotations

import time
from typing import Protocol

import torch

__all__ = ["Clock", "HostClock", "start_clock", "wait_for_device"]


class Clock(Protocol):
    """Started before the work of a batch is enqueued, and stopped after."""

    def stop(self) -> None:
        """Marks the end of the batch's work, without waiting for it."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether all work before the mark is done."""
        ...

    def wait(self) -> float:
        """Waits for the mark. Returns the seconds from start to mark, as the device counts."""
        ...


def start_clock(device: torch.device) -> Clock:
    return HostClock() if device.type == "cpu" else EventClock(device)


def wait_for_device(device: torch.device) -> None:
    """Waits until the device has done all work that was enqueued, on every stream."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class HostClock:
    """Where the host itself computes, work is done when it is enqueued."""

    is_done = True

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._started

    def wait(self) -> float:
        return self._seconds


class EventClock:
    """Two events on the device's stream. The first comes after the work of the former batch."""

    def __init__(self, device: torch.device) -> None:
        self._start = torch.Event(device, enable_timing=True)
        self._end = torch.Event(device, enable_timing=True)
        self._start.record()

    def stop(self) -> None:
        self._end.record()

    @property
    def is_done(self) -> bool:
        return self._end.query()

    def wait(self) -> float:
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3
