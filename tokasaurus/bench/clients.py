"""A load generator that plays the server and all of its clients.

Like a server, it acknowledges the tokens of sequences with stop strings, at once. Of a sequence it
keeps only the number of its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from tokasaurus.bench.engine import SimulatedEngine
from tokasaurus.errors import ProtocolError
from tokasaurus.protocol.messages import (
    AbortRequest,
    Acknowledge,
    FinishReason,
    GenerateRequest,
    RequestRejected,
    SequenceUpdates,
    ToServer,
)

__all__ = ["Clients"]

_WAIT_S = 0.002
_STUCK_S = 60.0
_MAX_REQUESTS = 1 << 20


class Clients:
    """Sends requests and counts what comes back.

    Args:
        engine: the engine that answers.

    Attributes:
        engine: the engine that answers.
        num_sent: how many requests were sent, which is the id of the next one.
        num_ended: how many sequences have ended.
        num_tokens: how many tokens have come.
    """

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self._is_searched = np.zeros(_MAX_REQUESTS, np.bool_)  # by request: it has stop strings
        self._num_received = np.zeros(_MAX_REQUESTS, np.int32)
        self.num_sent = 0
        self.num_ended = 0
        self.num_tokens = 0

    def send(self, request: GenerateRequest) -> None:
        """Sends a request whose id is ``num_sent``. One with stop strings must have one sample."""
        self._is_searched[request.request_id] = request.hold_for_acks
        self.num_sent += 1
        self.engine.send(request)

    def abort(self, request_id: int) -> None:
        self.engine.send(AbortRequest(request_id))

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Takes messages until a condition holds.

        Raises:
            EngineDead: a process has ended.
            ProtocolError: nothing happens any more, or a request is refused.
        """
        since, num_batches = time.monotonic(), -1
        while not is_over():
            for message in self.engine.receive(_WAIT_S):
                self._take(message)
            if self.engine.device.num_batches != num_batches:
                since, num_batches = time.monotonic(), self.engine.device.num_batches
            elif time.monotonic() - since > _STUCK_S:
                raise ProtocolError(f"nothing has happened for {_STUCK_S:.0f} s")

    def run_until_batch(self, number: int) -> None:
        """Takes messages until the device has run ``number`` batches in all."""
        self.run_until(lambda: self.engine.device.num_batches >= number)

    def run_for(self, seconds: float) -> None:
        """Takes messages for some time."""
        end = time.monotonic() + seconds
        self.run_until(lambda: time.monotonic() >= end)

    def run_to_end(self, num_sequences: int) -> None:
        """Takes messages until ``num_sequences`` have ended in all."""
        self.run_until(lambda: self.num_ended >= num_sequences)

    def _take(self, message: ToServer) -> None:
        if isinstance(message, SequenceUpdates):
            self.num_ended += int(np.count_nonzero(message.finish_reasons))
            self.num_tokens += len(message.token_ids)
            self._acknowledge(message)
        elif isinstance(message, RequestRejected):
            raise ProtocolError(f"request {message.request_id} was refused: {message.reason}")

    def _acknowledge(self, updates: SequenceUpdates) -> None:
        rows = np.flatnonzero(
            self._is_searched[updates.request_ids]
            & (updates.finish_reasons == FinishReason.RUNNING)
        )
        if rows.size:
            ids = updates.request_ids[rows]
            self._num_received[ids] += updates.num_tokens[rows]
            self.engine.send(
                Acknowledge(ids, updates.sample_indices[rows], self._num_received[ids])
            )
