"""Carries messages to the worker and its results back, so that the device waits for neither.

It knows the order of submitting and collecting, and nothing of sockets or tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias

from tokasaurus.protocol.commands import Control
from tokasaurus.protocol.messages import FromWorker, ToWorker

__all__ = ["WorkerLoop"]

Receive: TypeAlias = Callable[[float | None], list[ToWorker]]
"""Takes the longest time to wait, None for no limit. Returns what has arrived, oldest first."""


class PendingBatch(Protocol):
    """A batch or control in flight: ``model.worker.pending.Pending``."""

    @property
    def is_done(self) -> bool: ...

    def collect(self) -> FromWorker: ...


class WorkerLoop:
    """Submits the next batch before it waits for the former one, if the next has arrived.

    So the device has work while the host collects a result and prepares a batch. A result that is
    complete is sent at once: where batches run as they are submitted, on the CPU, none ever waits
    for the next batch.

    A control may take minutes. So all results before it are sent first.

    Args:
        submit: of the worker.
        receive: of the worker's door.
        send: to the manager.
    """

    def __init__(
        self,
        submit: Callable[[ToWorker], PendingBatch],
        receive: Receive,
        send: Callable[[FromWorker], None],
    ) -> None:
        self._submit, self._receive, self._send = submit, receive, send
        self._in_flight: deque[PendingBatch] = deque()

    def take_turn(self) -> None:
        """Takes what has arrived. Waits for a message only if none is in flight."""
        messages = self._receive(0 if self._in_flight else None)
        for message in messages:
            if isinstance(message, Control):
                self._collect(but=0)
            self._in_flight.append(self._submit(message))
            self._collect(but=1)
        if not messages:
            self._collect(but=0)

    def _collect(self, but: int) -> None:
        """Sends results until only ``but`` are in flight, and those that are done anyway."""
        while self._in_flight and (len(self._in_flight) > but or self._in_flight[0].is_done):
            self._send(self._in_flight.popleft().collect())
