"""Several clients of one engine in virtual time: the turnstile, the manager, a simulated device.

The device takes the time of its cost model for each batch, and everything else takes none. So the
same requests lead to the same times on every machine::

    clients ─▶ turnstile ─requests─▶ manager ─batches─▶ device
                   ▲                  │  ▲                │
                   └──────ends────────┘  └────results─────┘
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.manager import Manager
from tokasaurus.planner.cost_model import CostModel
from tokasaurus.planner.lengths import ListedLengths
from tokasaurus.planner.simulated_device import STOP_ID, VOCAB_SIZE, SimulatedDevice
from tokasaurus.protocol.messages import (
    ForwardBatch,
    ForwardResult,
    FromServer,
    GenerateRequest,
    Sampling,
    SequenceUpdates,
)
from tokasaurus.text.turnstile import Turnstile


@dataclass(frozen=True)
class Ask:
    """A request of a client.

    Attributes:
        at_s: when it comes.
        client: the client's name.
        prompt_tokens: of a prompt that no other request has.
        output_tokens: of each sample.
        max_tokens: the limit that it names.
    """

    at_s: float
    client: str
    prompt_tokens: int
    output_tokens: tuple[int, ...]
    max_tokens: int
    priority: int = 0


@dataclass
class Outcome:
    """What became of a request."""

    ask: Ask
    num_left: int  # samples that have not ended
    ended_s: float = 0.0

    @property
    def latency_s(self) -> float:
        """From its arrival to the end of its last sample."""
        assert self.num_left == 0, f"a request of {self.ask.client} has not ended"
        return self.ended_s - self.ask.at_s


class SharedEngine:
    """One engine and the requests of all clients.

    Args:
        asks: in any order.
        config: of the manager.
        cost: of the device.
    """

    def __init__(self, asks: list[Ask], config: ManagerConfig, cost: CostModel) -> None:
        self.now = 0.0
        self.outcomes = [Outcome(ask, len(ask.output_tokens)) for ask in asks]
        self.manager = Manager(config)
        self.tokens: Counter[str] = Counter()  # generated so far, by client
        self.batches: list[ForwardBatch] = []
        lengths = ListedLengths([ask.output_tokens for ask in asks])
        self._device = SimulatedDevice(cost, lengths, config.num_slots, config.page_size)
        self._device_free_at = 0.0
        self._turnstile = Turnstile(self._to_manager, 4 * config.max_seqs_per_forward)
        self._to_take: list[FromServer] = []
        self._arrivals = sorted(enumerate(asks), key=lambda numbered: numbered[1].at_s)
        self._results: list[tuple[float, int, ForwardResult]] = []

    def run(self, until_s: float = float("inf"), client: str = "") -> None:
        """Runs until this time, or until all requests, or those of one client, have ended."""
        while self.now < until_s and any(
            outcome.num_left for outcome in self.outcomes if client in ("", outcome.ask.client)
        ):
            self._turn()

    def latencies(self, client: str) -> list[float]:
        """Of the client's requests."""
        return [o.latency_s for o in self.outcomes if o.ask.client == client]

    def _to_manager(self, message: FromServer) -> None:
        self._to_take.append(message)

    def _turn(self) -> None:
        times = [self._results[0][0]] if self._results else []
        if self._arrivals:
            times.append(self._arrivals[0][1].at_s)
        self.now = max(self.now, min(times)) if not self._to_take else self.now
        while self._arrivals and self._arrivals[0][1].at_s <= self.now:
            number, ask = self._arrivals.pop(0)
            self._turnstile.submit(_request(number, ask))
        events: list = [*self._to_take]
        self._to_take.clear()
        while self._results and self._results[0][0] <= self.now:
            events.append(heapq.heappop(self._results)[2])
        actions = self.manager.take_turn(events, self.now)
        for order in actions.to_worker:
            assert isinstance(order, ForwardBatch)
            self.batches.append(order)
            result = self._device.run(order)
            self._device_free_at = max(self.now, self._device_free_at) + result.device_s
            heapq.heappush(self._results, (self._device_free_at, order.number, result))
        for message in actions.messages:
            assert isinstance(message, SequenceUpdates), message
            self._update(message)

    def _update(self, message: SequenceUpdates) -> None:
        for request_id, count, reason in zip(
            message.request_ids.tolist(),
            message.num_tokens.tolist(),
            message.finish_reasons.tolist(),
            strict=True,
        ):
            outcome = self.outcomes[request_id]
            self.tokens[outcome.ask.client] += count
            if reason:
                outcome.num_left -= 1
                outcome.ended_s = self.now
                if outcome.num_left == 0:
                    self._turnstile.ended(request_id, sum(outcome.ask.output_tokens))


def _request(number: int, ask: Ask) -> GenerateRequest:
    chance = np.random.default_rng(number)
    return GenerateRequest(
        request_id=number,
        prompt_ids=chance.integers(1, VOCAB_SIZE, ask.prompt_tokens, dtype=np.int32),
        n=len(ask.output_tokens),
        max_tokens=ask.max_tokens,
        sampling=Sampling(),
        seed=number,
        stop_token_ids=(STOP_ID,),
        priority=ask.priority,
        client=ask.client,
    )
