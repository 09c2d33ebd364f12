"""Runs a trace in virtual time: the real manager, a simulated device, and a queue of events.

Three servers work at the same time, each on one thing. The manager takes ``manager_s`` for a turn,
the device takes the time of its cost model for a batch, and the server takes ``server_s`` to search
an update for stop strings::

    arrivals ─▶ manager ─batches─▶ device
                 ▲   ▲ └─updates─▶ server ─acknowledgements, stops─┐
                 │   └───results───┘                               │
                 └─────────────────────────────────────────────────┘

The same trace, configuration and costs give the same run, unless ``manager_s`` is measured.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.manager import Manager
from tokasaurus.planner.cost_model import CostModel
from tokasaurus.planner.pipeline import ONE_STAGE, SimulatedPipeline, Stages
from tokasaurus.planner.report import Moment, Report, Tally
from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.planner.trace import TraceRequest, generate_request, trace_lengths
from tokasaurus.protocol.messages import (
    Acknowledge,
    FinishReason,
    ForwardBatch,
    FromServer,
    FromWorker,
    GenerateRequest,
    PromptLogprobs,
    RequestRejected,
    SequenceUpdates,
    Statistics,
    StopSequence,
    ToServer,
    ToWorker,
)

__all__ = ["MakeRequest", "Replay", "Timing", "replay"]


@dataclass(frozen=True)
class Timing:
    """How long everything takes, in seconds."""

    cost: CostModel
    manager_s: float | None = 0.0  # for a turn; None for the time that it takes on this machine
    server_s: float = 0.0  # from an update to its acknowledgement
    stages: Stages = ONE_STAGE  # of the device; their times add up to the cost


class _Event(NamedTuple):
    time: float
    order: int  # counts events, so that those of the same time keep their order
    message: FromServer | FromWorker


MakeRequest: TypeAlias = Callable[[TraceRequest, int], GenerateRequest]


def replay(
    trace: Sequence[TraceRequest],
    config: ManagerConfig,
    timing: Timing,
    make_request: MakeRequest = generate_request,
) -> Report:
    """Runs a trace to its end.

    Args:
        trace: what to run.
        config: of the manager.
        timing: how long everything takes.
        make_request: the message of a request and its number in the trace, if its ids matter. Its
            id and seed are the number.

    Raises:
        ProtocolError: a sequence got more or fewer tokens than the trace says, or never ended. This
            is a defect of the manager.
        ConfigError: the manager refuses a request of the trace.
    """
    run = Replay(trace, config, timing, make_request)
    while run.advance():
        pass
    return run.report()


class Replay:
    """One run, turn by turn. :func:`replay` runs a whole trace."""

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        config: ManagerConfig,
        timing: Timing,
        make_request: MakeRequest = generate_request,
    ) -> None:
        self._timing = timing
        self._manager = Manager(config)
        device = SimulatedDevice(
            timing.cost, trace_lengths(trace), config.num_slots, config.page_size
        )
        self._pipeline = SimulatedPipeline(device, timing.stages, config.num_slots)
        self._manager_free_at = 0.0
        self._events: list[_Event] = []
        self._num_events = 0
        self._tally = Tally(trace)
        for number, request in enumerate(trace):
            self.post(request.arrival_s, make_request(request, number))

    def advance(self) -> bool:
        """Runs one turn of the manager. Returns False if no event is left."""
        if not self._events:
            return False
        now = max(self._events[0].time, self._manager_free_at)
        messages = []
        while self._events and self._events[0].time <= now:
            messages.append(heapq.heappop(self._events).message)
        started = time.perf_counter()
        actions = self._manager.take_turn(messages, now)
        manager_s = self._timing.manager_s
        done = now + (time.perf_counter() - started if manager_s is None else manager_s)
        self._manager_free_at = done
        for order in actions.to_worker:
            self._run(order, done)
        for message in actions.messages:
            self._deliver(message, done)
        num_tokens = self._manager.counters.num_generated_tokens
        self._tally.observe(Moment.of(done, self._manager.gauges(), num_tokens))
        return True

    def statistics(self) -> Statistics:
        """The manager's figures at this moment."""
        return self._manager.statistics()

    def report(self) -> Report:
        """The outcome, once :meth:`advance` has returned False.

        Raises:
            ProtocolError: a sequence has not ended.
        """
        if not self._manager.idle:
            raise ProtocolError("no event is left, but the manager still has sequences")
        num_pages = self._manager.gauges().num_pages
        return self._tally.report(self._manager.counters, num_pages, self._pipeline.waited_s)

    def post(self, at: float, message: FromServer | FromWorker) -> None:
        """Lets the manager get a message at this time."""
        heapq.heappush(self._events, _Event(at, self._num_events, message))
        self._num_events += 1

    def _run(self, order: ToWorker, sent_at: float) -> None:
        if not isinstance(order, ForwardBatch):
            done, done_at = self._pipeline.carry_out(order, sent_at)
            self.post(done_at, done)
            return
        result, spans = self._pipeline.run(order, sent_at)
        self._tally.count_batch(len(result.token_ids), spans)
        self.post(spans[-1].end_s, result)

    def _deliver(self, message: ToServer, at: float) -> None:
        if isinstance(message, SequenceUpdates):
            self._tally.count_updates(message, at)
            self._answer_updates(message, at + self._timing.server_s)
        elif isinstance(message, RequestRejected):
            self._tally.refuse(message)
        elif isinstance(message, PromptLogprobs):
            raise ProtocolError("prompt logprobs came, but no trace asks for them")

    def _answer_updates(self, updates: SequenceUpdates, at: float) -> None:
        """Posts the server's answers for sequences that have stop strings and still run."""
        rows = self._tally.rows(updates)
        is_searched = self._tally.has_stop_strings[rows]
        is_searched &= updates.finish_reasons == FinishReason.RUNNING
        if not is_searched.any():
            return
        rows = rows[is_searched]
        request_ids = updates.request_ids[is_searched]
        sample_indices = updates.sample_indices[is_searched]
        received = self._tally.num_received[rows]
        is_stop = received >= self._tally.num_expected[rows]
        for request_id, sample_index in zip(
            request_ids[is_stop].tolist(), sample_indices[is_stop].tolist(), strict=True
        ):
            self.post(at, StopSequence(request_id, sample_index))
        counts = received[~is_stop].astype(np.int32)
        if len(counts):
            self.post(at, Acknowledge(request_ids[~is_stop], sample_indices[~is_stop], counts))
