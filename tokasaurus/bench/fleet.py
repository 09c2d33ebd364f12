"""Many replicas behind the real router in virtual time: real managers, simulated devices.

::

    clients ─requests─▶ server, router ─▶ manager 0 ─batches─▶ device 0
       ▲                   ▲ │    └─────▶ manager 1 ─batches─▶ device 1
       └────── ends ───────┼─┘                 │          ...
                           └────── updates ────┘

A client sends a request, waits for its end, and sends the next one. The server does one thing at a
time, updates before requests, and each takes the time that it is said to take. Managers take none.
What the router takes on this machine is measured beside, and does not count in virtual time.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.manager import Manager
from tokasaurus.planner.cost_model import CostModel
from tokasaurus.planner.lengths import CompletionLengths
from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.protocol.messages import (
    ForwardBatch,
    FromServer,
    FromWorker,
    GenerateRequest,
    SequenceUpdates,
    ToServer,
    ToWorker,
)
from tokasaurus.text.replica_reports import Seats
from tokasaurus.text.replicas import Replicas

__all__ = ["Fleet", "Outcome", "ServerCost"]

_RAMP_S = 0.2  # in which the clients start, one after the other


@dataclass(frozen=True)
class ServerCost:
    """What the server takes, in seconds."""

    request_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a fleet did between two points of virtual time.

    Attributes:
        tokens_per_s: that reached the server.
        requests_per_s: that ended.
        device_busy: the share of the time in which devices had a batch, mean over replicas.
        server_busy: the share of the time in which the server had something to do.
        place_us: CPU time of this machine's router for a request: to choose a replica and send it.
        absorb_us: CPU time of this machine's router for an update of one sequence.
    """

    tokens_per_s: float
    requests_per_s: float
    device_busy: float
    server_busy: float
    place_us: float
    absorb_us: float


class Fleet:
    """One run.

    Args:
        num_replicas: all alike.
        config: of each manager.
        cost: of each device.
        lengths: how long completions get.
        requests: what clients send, in order, without end.
        server: what the server takes.
    """

    def __init__(
        self,
        num_replicas: int,
        config: ManagerConfig,
        cost: CostModel,
        lengths: CompletionLengths,
        requests: Iterator[GenerateRequest],
        server: ServerCost,
    ) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._now = 0.0
        self._requests = requests
        self._server = server
        self._server_is_busy = False
        self._updates: deque[tuple[int, ToServer]] = deque()  # with the replica's number
        self._waiting: deque[GenerateRequest] = deque()
        self._server_s = 0.0
        self._num_tokens = self._num_ended = 0
        self._place_s = self._absorb_s = 0.0
        self._num_placed = self._num_absorbed = 0
        self._replicas = [
            _Replica(self, number, config, SimulatedDevice(cost, lengths, config.num_slots))
            for number in range(num_replicas)
        ]
        seats = Seats(config.max_seqs_per_forward, config.num_pages * config.page_size)
        self._router = Replicas(
            [replica.take for replica in self._replicas], [seats] * num_replicas
        )

    def run(self, num_clients: int, from_s: float, to_s: float) -> Outcome:
        """Runs from the beginning, and counts between two points of time."""
        for number in range(num_clients):
            self.post(_RAMP_S * number / num_clients, self._ask)
        # Collections would go through everything that all managers hold, again and again.
        gc.disable()
        try:
            self._advance(from_s)
            self._clear()
            self._advance(to_s)
        finally:
            gc.enable()
        span_s = to_s - from_s
        device_s = sum(replica.device_s for replica in self._replicas)
        return Outcome(
            tokens_per_s=self._num_tokens / span_s,
            requests_per_s=self._num_ended / span_s,
            device_busy=min(1.0, device_s / span_s / len(self._replicas)),
            server_busy=min(1.0, self._server_s / span_s),
            place_us=self._place_s / max(1, self._num_placed) * 1e6,
            absorb_us=self._absorb_s / max(1, self._num_absorbed) * 1e6,
        )

    # --- for replicas -----------------------------------------------------------------------------

    def post(self, at: float, action: Callable[[], None]) -> None:
        """Something happens at a point of time."""
        heapq.heappush(self._events, (at, self._num_events, action))
        self._num_events += 1

    @property
    def now(self) -> float:
        return self._now

    def hear(self, number: int, message: ToServer) -> None:
        """A replica says something to the server."""
        self._updates.append((number, message))
        self._serve()

    # --- the server -------------------------------------------------------------------------------

    def _advance(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self._now, _, action = heapq.heappop(self._events)
            action()
        self._now = until

    def _clear(self) -> None:
        """Forgets what was counted so far."""
        self._server_s = self._place_s = self._absorb_s = 0.0
        self._num_tokens = self._num_ended = self._num_placed = self._num_absorbed = 0
        for replica in self._replicas:
            replica.device_s = 0.0

    def _ask(self) -> None:
        self._waiting.append(next(self._requests))
        self._serve()

    def _serve(self) -> None:
        """Begins the next thing, if the server has nothing else to do."""
        if self._server_is_busy or not (self._updates or self._waiting):
            return
        self._server_is_busy = True
        if self._updates:
            number, message = self._updates.popleft()
            num_tokens = len(message.token_ids) if isinstance(message, SequenceUpdates) else 0
            self._occupy(num_tokens * self._server.token_s, partial(self._absorb, number, message))
        else:
            request = self._waiting.popleft()
            self._occupy(self._server.request_s, partial(self._place, request))

    def _occupy(self, seconds: float, then: Callable[[], None]) -> None:
        self._server_s += seconds
        self.post(self._now + seconds, partial(self._finish, then))

    def _finish(self, then: Callable[[], None]) -> None:
        self._server_is_busy = False
        then()
        self._serve()

    def _place(self, request: GenerateRequest) -> None:
        started = time.process_time()
        self._router.send(request)
        self._place_s += time.process_time() - started
        self._num_placed += 1

    def _absorb(self, number: int, message: ToServer) -> None:
        if not isinstance(message, SequenceUpdates):
            raise ProtocolError(f"replica {number} sent {type(message).__name__}, not updates")
        started = time.process_time()
        self._router.absorb(number, message)
        self._absorb_s += time.process_time() - started
        self._num_absorbed += len(message.request_ids)
        self._num_tokens += len(message.token_ids)
        num_ended = int((message.finish_reasons != 0).sum())
        self._num_ended += num_ended
        for _ in range(num_ended):
            self._ask()


class _Replica:
    """A manager and its device."""

    def __init__(
        self, fleet: Fleet, number: int, config: ManagerConfig, device: SimulatedDevice
    ) -> None:
        self._fleet, self._number = fleet, number
        self._manager, self._device = Manager(config), device
        self._inbox: list[FromServer | FromWorker] = []
        self._turn_is_due = False
        self._device_free_at = 0.0
        self.device_s = 0.0  # that the device had a batch

    def take(self, message: FromServer | FromWorker) -> None:
        """A message comes. The manager takes all that come at one time in one turn."""
        self._inbox.append(message)
        if not self._turn_is_due:
            self._turn_is_due = True
            self._fleet.post(self._fleet.now, self._turn)

    def _turn(self) -> None:
        self._turn_is_due = False
        messages, self._inbox = self._inbox, []
        actions = self._manager.take_turn(messages, self._fleet.now)
        for order in actions.to_worker:
            self._run(order)
        for message in actions.messages:
            self._fleet.hear(self._number, message)

    def _run(self, order: ToWorker) -> None:
        start = max(self._fleet.now, self._device_free_at)
        result: FromWorker
        if isinstance(order, ForwardBatch):
            result = self._device.run(order)
            self.device_s += result.device_s
            self._device_free_at = start + result.device_s
        else:
            result = self._device.carry_out(order)
        self._fleet.post(max(start, self._device_free_at), partial(self.take, result))
