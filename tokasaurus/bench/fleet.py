"""Many replicas behind the real router in virtual time: real managers, simulated devices.

::

    clients ─requests─▶ server, router ─▶ manager 0 ─batches─▶ device 0
       ▲                   ▲ │    └─────▶ manager 1 ─batches─▶ device 1
       └────── ends ───────┼─┘                 │          ...
                           └────── updates ────┘

A client sends a request, waits for its end, and sends the next one, perhaps after a while. The
server does one thing at a time, updates before requests, and each takes the time that it is said to
take. Managers take none. What the router takes on this machine is measured beside, and does not
count in virtual time.
"""

from __future__ import annotations

import gc
import heapq
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.manager import Manager
from tokasaurus.planner.cost_model import CostModel
from tokasaurus.planner.lengths import CompletionLengths
from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import (
    ForwardBatch,
    FromServer,
    FromWorker,
    GenerateRequest,
    SequenceUpdates,
    Statistics,
    ToServer,
    ToWorker,
)
from tokasaurus.text.replica_reports import Seats
from tokasaurus.text.replicas import Replicas

__all__ = ["Clients", "Fleet", "MakeRouter", "Outcome", "Router", "ServerCost"]


class Clients(Protocol):
    """Decides what clients send."""

    def first(self) -> GenerateRequest:
        """The first request of a client. It must not be streamed."""
        ...

    def following(self, request_id: int, answer_ids: Int32Array) -> tuple[float, GenerateRequest]:
        """The next request of the client whose request has ended.

        Args:
            request_id: of the request that has ended.
            answer_ids: [generated tokens].

        Returns:
            How many seconds later the client sends it, and the request.
        """
        ...


class Router(Protocol):
    """Deals requests to replicas."""

    def send(self, message: FromServer, /) -> None: ...

    def absorb(self, replica: int, message: ToServer, /) -> object: ...


MakeRouter: TypeAlias = Callable[[Sequence[Callable[[FromServer], None]], Sequence[Seats]], Router]
"""Makes a router of the senders to the replicas and what each has room for."""


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
        request_s: how long a request took, its median, from the client's side.
        request_p95_s: how long the slowest twentieth took at least.
        cached_share: of the prompts' tokens, those that replicas had in their caches.
        least_share: tokens of the replica that generated the fewest, over the mean of all.
        device_busy: the share of the time in which devices had a batch, mean over replicas.
        server_busy: the share of the time in which the server had something to do.
        place_us: CPU time of this machine's router for a request: to choose a replica and send it.
        absorb_us: CPU time of this machine's router for an update of one sequence.
    """

    tokens_per_s: float
    requests_per_s: float
    request_s: float
    request_p95_s: float
    cached_share: float
    least_share: float
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
        clients: what is sent.
        server: what the server takes.
        make_router: deals requests to replicas.
    """

    def __init__(
        self,
        num_replicas: int,
        config: ManagerConfig,
        cost: CostModel,
        lengths: CompletionLengths,
        clients: Clients,
        server: ServerCost,
        make_router: MakeRouter = Replicas,
    ) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._now = 0.0
        self._clients = clients
        self._server = server
        self._server_is_busy = False
        self._updates: deque[tuple[int, ToServer]] = deque()  # with the replica's number
        self._waiting: deque[GenerateRequest] = deque()
        self._server_s = 0.0
        self._num_tokens = 0
        self._asked_at: dict[int, float] = {}  # by request id
        self._request_s: list[float] = []  # of the requests that have ended
        self._place_s = self._absorb_s = 0.0
        self._num_placed = self._num_absorbed = 0
        self._replicas = [
            _Replica(
                self,
                number,
                config,
                SimulatedDevice(cost, lengths, config.num_slots, config.page_size),
            )
            for number in range(num_replicas)
        ]
        seats = Seats(config.max_seqs_per_forward, config.num_pages * config.page_size)
        self._router = make_router(
            [replica.take for replica in self._replicas], [seats] * num_replicas
        )

    def run(self, num_clients: int, from_s: float, to_s: float, *, ramp_s: float = 0.2) -> Outcome:
        """Runs from the beginning, and counts between two points of time.

        Args:
            num_clients: that send requests.
            from_s: where counting begins.
            to_s: where the run ends.
            ramp_s: in which the clients start, one after the other.
        """
        for number in range(num_clients):
            self.post(ramp_s * number / num_clients, self._start)
        # Collections would go through everything that all managers hold, again and again.
        gc.disable()
        try:
            self._advance(from_s)
            self._clear()
            before = [replica.statistics for replica in self._replicas]
            self._advance(to_s)
        finally:
            gc.enable()
        span_s = to_s - from_s
        device_s = sum(replica.device_s for replica in self._replicas)
        generated, computed, cached = (
            [
                getattr(replica.statistics, name) - getattr(each, name)
                for replica, each in zip(self._replicas, before, strict=True)
            ]
            for name in ("num_generated_tokens", "num_prefill_tokens", "num_cached_tokens")
        )
        request_s = self._request_s or [0.0]
        return Outcome(
            tokens_per_s=self._num_tokens / span_s,
            requests_per_s=len(self._request_s) / span_s,
            request_s=float(np.median(request_s)),
            request_p95_s=float(np.quantile(request_s, 0.95)),
            cached_share=sum(cached) / max(1, sum(cached) + sum(computed)),
            least_share=min(generated) * len(generated) / max(1, sum(generated)),
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
        self._num_tokens = self._num_placed = self._num_absorbed = 0
        self._request_s.clear()
        for replica in self._replicas:
            replica.device_s = 0.0

    def _start(self) -> None:
        self._ask(self._clients.first())

    def _ask(self, request: GenerateRequest) -> None:
        self._asked_at[request.request_id] = self._now
        self._waiting.append(request)
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
        ends = np.cumsum(message.num_tokens)
        for row in np.flatnonzero(message.finish_reasons).tolist():
            # Requests are not streamed, so the last row has all tokens.
            answer_ids = message.token_ids[ends[row] - message.num_tokens[row] : ends[row]]
            self._end(int(message.request_ids[row]), answer_ids)

    def _end(self, request_id: int, answer_ids: Int32Array) -> None:
        self._request_s.append(self._now - self._asked_at.pop(request_id))
        pause_s, request = self._clients.following(request_id, answer_ids)
        if pause_s:
            self.post(self._now + pause_s, partial(self._ask, request))
        else:
            self._ask(request)


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

    @property
    def statistics(self) -> Statistics:
        return self._manager.statistics()

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
