"""``toka-bench routing``: how conversations are dealt to replicas, the router against simpler ways.

    toka-bench routing
    toka-bench routing plot=docs/images/routing.svg

Replicas are real managers with simulated devices, in virtual time (``bench.fleet``), and clients
hold conversations (``bench.conversations``). The ways to deal out requests:

- ``router``: ``text/replicas.py``, as the server has it;
- ``least_work``: the same router, which is told that nothing is ever cached;
- ``round_robin``: each request goes to the next replica;
- ``sticky``: each conversation goes to the next replica, and stays there.

Beside it, the CPU time of the router alone is measured for up to 1,024 replicas.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from tokasaurus.bench.conversations import Conversations, conversation_of
from tokasaurus.bench.cpu_time import loop_turn_ns, machine_line
from tokasaurus.bench.flags import counts
from tokasaurus.bench.fleet import Fleet, MakeRouter, Outcome, ServerCost
from tokasaurus.bench.output import markdown_table, print_json, progress
from tokasaurus.bench.plot import check_plot
from tokasaurus.bench.pool import in_processes
from tokasaurus.bench.routing_plot import Lines, write_routing_plot
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ConfigError
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.lengths import DrawnLengths
from tokasaurus.planner.named_costs import cost_model
from tokasaurus.protocol.messages import (
    FinishReason,
    FromServer,
    GenerateRequest,
    SequenceUpdates,
    ToServer,
)
from tokasaurus.text.replica_reports import Seats
from tokasaurus.text.replicas import Replicas

__all__ = ["POLICIES", "SCHEMA", "RoutingConfig", "run"]

_MAX_TOKENS = 512
_MEDIAN_TOKENS, _SIGMA = 128, 0.6  # of answers, log-normal
_CLIENTS_MEASURED = 4  # for each replica, where the router is alone
_NUM_MEASURED = 1000  # requests, at least


class RoundRobin:
    """Each request goes to the next replica."""

    def __init__(
        self, senders: Sequence[Callable[[FromServer], None]], seats: Sequence[Seats]
    ) -> None:
        self._senders = senders
        self._next = 0

    def send(self, message: FromServer) -> None:
        self._senders[self._next](message)
        self._next = (self._next + 1) % len(self._senders)

    def absorb(self, replica: int, message: ToServer) -> None:
        """Nothing that a replica says changes where requests go."""


class Sticky(RoundRobin):
    """Each conversation goes to the next replica, and stays there."""

    def send(self, message: FromServer) -> None:
        if isinstance(message, GenerateRequest):
            self._next = conversation_of(message.request_id) % len(self._senders)
        super().send(message)


def _least_work(
    senders: Sequence[Callable[[FromServer], None]], seats: Sequence[Seats]
) -> Replicas:
    return Replicas(senders, [Seats(each.num_sequences, 0) for each in seats])


POLICIES: Mapping[str, MakeRouter] = {
    "router": Replicas,
    "sticky": Sticky,
    "least_work": _least_work,
    "round_robin": RoundRobin,
}


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """What to compare."""

    replicas: int = flag(4, minimum=1, help="Replicas behind the router.")
    clients: tuple[str, ...] = flag(
        ("64", "128", "256", "384"), help="Numbers of clients for each replica."
    )
    policies: tuple[str, ...] = flag(
        tuple(POLICIES), choices=tuple(POLICIES), help="How requests are dealt to replicas."
    )
    sizes: tuple[str, ...] = flag(
        ("1", "4", "16", "64", "256", "1024"),
        help="Numbers of replicas for which the router's CPU time is measured.",
    )
    cost: str = flag("llama-8b-h100", help="The cost model of each device; see toka-bench replay.")
    seats: int = flag(256, minimum=1, help="The engine's flag max_seqs_per_forward.")
    cache_tokens: int = flag(262144, minimum=1, help="The engine's flag kv_cache_num_tokens.")
    request_tokens: int = flag(
        8192, minimum=2048, help="The engine's flag max_num_tokens_per_request."
    )
    turns: float = flag(6.0, minimum=1, help="Turns of a conversation, on average.")
    pause_s: float = flag(
        5.0, minimum=0.001, help="Seconds between an answer and the next turn, on average."
    )
    warm_up_s: float = flag(30.0, minimum=0, help="Seconds before counting begins.")
    span_s: float = flag(30.0, minimum=0.001, help="Seconds that are counted.")
    seed: int = flag(0, minimum=0, help="The seed of the conversations.")
    jobs: int | None = flag(
        None, minimum=1, help="How many runs at the same time.", adapts="the number of cores"
    )
    plot: str = flag("", may_be_empty=True, help="The file of an SVG that draws the results.")

    def __post_init__(self) -> None:
        check_fields(self)
        counts("clients", self.clients)
        counts("sizes", self.sizes)
        cost_model(self.cost)
        if self.cache_tokens < self.request_tokens:
            raise ConfigError(
                f"cache_tokens={self.cache_tokens} is less than request_tokens="
                f"{self.request_tokens}; raise the first, or lower the second"
            )


SCHEMA = Schema(
    target=RoutingConfig,
    program="toka-bench routing",
    summary="Compare ways to deal conversations to replicas, in virtual time.",
    examples=("toka-bench routing", "toka-bench routing clients=32,64 plot=routing.svg"),
)


@dataclass(frozen=True)
class _Task:
    """One run, for a process of its own."""

    config: RoutingConfig
    num_clients: int  # for each replica
    policy: str


def run(config: RoutingConfig) -> None:
    """Compares and prints."""
    if config.plot:
        check_plot(config.plot)
    turns = [loop_turn_ns()]
    # First, and alone: what follows keeps all cores busy.
    costs = {size: _router_us(config, size) for size in counts("sizes", config.sizes)}
    turns.append(loop_turn_ns())
    tasks = [
        _Task(config, num_clients, policy)
        for num_clients in counts("clients", config.clients)
        for policy in config.policies
    ]
    found: dict[_Task, Outcome] = {}
    for task, outcome in in_processes(_predict, tasks, config.jobs):
        found[task] = outcome
        name = f"{task.num_clients} clients, {task.policy}"
        progress(f"{len(found)}/{len(tasks)}: {name}: {outcome.tokens_per_s:.4g} tokens/s")
    _print(config, {task: found[task] for task in tasks}, costs)
    print(f"\n{machine_line(turns)}")
    if config.plot:
        write_routing_plot(config.plot, _panels(found, tasks, costs))
    print_json(
        {
            "cells": [
                {"clients": task.num_clients, "policy": task.policy, **_rounded(found[task])}
                for task in tasks
            ],
            "router": [
                {"replicas": size, "place_us": round(place, 2), "end_us": round(end, 2)}
                for size, (place, end) in costs.items()
            ],
            "loop_turn_ns": turns,
        }
    )


def _rounded(outcome: Outcome) -> dict[str, float]:
    return {key: float(f"{value:.5g}") for key, value in asdict(outcome).items()}


def _manager_config(config: RoutingConfig) -> ManagerConfig:
    flags = EngineConfig.from_flags(
        max_seqs_per_forward=config.seats,
        kv_cache_num_tokens=config.cache_tokens,
        max_num_tokens_per_request=config.request_tokens,
    )
    return simulated_slices(flags).replicas[0].manager


def _conversations(config: RoutingConfig) -> Conversations:
    return Conversations(
        config.turns, config.pause_s, _MAX_TOKENS, config.request_tokens, config.seed
    )


def _predict(task: _Task) -> Outcome:
    config = task.config
    chance = np.random.default_rng(config.seed)
    drawn = np.rint(chance.lognormal(np.log(_MEDIAN_TOKENS), _SIGMA, 4096))
    fleet = Fleet(
        config.replicas,
        _manager_config(config),
        cost_model(config.cost),
        DrawnLengths(np.clip(drawn, 1, _MAX_TOKENS).astype(np.int64)),
        _conversations(config),
        ServerCost(),
        POLICIES[task.policy],
    )
    to_s = config.warm_up_s + config.span_s
    num_clients = task.num_clients * config.replicas
    return fleet.run(num_clients, config.warm_up_s, to_s, ramp_s=config.warm_up_s / 2)


def _print(
    config: RoutingConfig,
    found: Mapping[_Task, Outcome],
    costs: Mapping[int, tuple[float, float]],
) -> None:
    print(f"Predicted, {config.replicas} replicas, {config.cost}, {config.seats} sequences each\n")
    rows = [
        (
            task.num_clients,
            task.policy,
            f"{each.tokens_per_s:,.0f}",
            f"{each.requests_per_s:.1f}",
            f"{each.request_s:.2f}",
            f"{each.request_p95_s:.2f}",
            f"{each.cached_share:.1%}",
            f"{each.least_share:.1%}",
            f"{each.device_busy:.1%}",
        )
        for task, each in found.items()
    ]
    heads = ("clients each", "policy", "tokens/s", "turns/s", "turn s", "p95 s")
    shares = ("prompts cached", "least replica", "devices busy")
    print(markdown_table((*heads, *shares), rows))
    print("\nMeasured here: CPU time of the router for a turn, and for its end\n")
    us = [(size, f"{place:.1f}", f"{end:.1f}") for size, (place, end) in costs.items()]
    print(markdown_table(("replicas", "us a turn", "us an end"), us))


def _panels(
    found: Mapping[_Task, Outcome],
    tasks: Sequence[_Task],
    costs: Mapping[int, tuple[float, float]],
) -> list[Lines]:
    def lines(name: str, factor: float = 1.0) -> dict[str, list[tuple[int, float]]]:
        drawn: dict[str, list[tuple[int, float]]] = {}
        for task in tasks:
            value = factor * getattr(found[task], name)
            drawn.setdefault(task.policy, []).append((task.num_clients, value))
        return drawn

    axis = "clients for each replica"
    places = [(size, place) for size, (place, _) in costs.items()]
    return [
        Lines("Tokens a second", axis, lines("tokens_per_s")),
        Lines("Prompt tokens cached, %", axis, lines("cached_share", 100)),
        Lines("Seconds a turn, 95% are faster", axis, lines("request_p95_s")),
        Lines("Router: CPU us a turn (measured)", "replicas", {"router": places}),
    ]


# --- the router alone -----------------------------------------------------------------------------


def _router_us(config: RoutingConfig, num_replicas: int) -> tuple[float, float]:
    """CPU microseconds of the router for a turn of a conversation, and for its end."""
    inboxes: list[list[GenerateRequest]] = [[] for _ in range(num_replicas)]
    seats = Seats(config.seats, config.cache_tokens)
    router = Replicas([partial(_receive, inbox) for inbox in inboxes], [seats] * num_replicas)
    clients = _conversations(config)
    chance = np.random.default_rng(config.seed)
    answer_ids = chance.integers(1, 1000, _MEDIAN_TOKENS, dtype=np.int32)
    requests = [clients.first() for _ in range(_CLIENTS_MEASURED * num_replicas)]
    num_rounds = max(4, -(-_NUM_MEASURED // len(requests)))
    place_s = end_s = 0.0
    for _ in range(num_rounds):
        place_s += _timed(router.send, [(request,) for request in requests])
        ends = []
        requests = []
        for number, inbox in enumerate(inboxes):
            if inbox:
                ends.append((number, _ends([each.request_id for each in inbox], answer_ids)))
            requests += [clients.following(each.request_id, answer_ids)[1] for each in inbox]
            inbox.clear()
        end_s += _timed(router.absorb, ends)
    count = num_rounds * len(requests)
    return place_s / count * 1e6, end_s / count * 1e6


def _receive(inbox: list[GenerateRequest], message: FromServer) -> None:
    assert isinstance(message, GenerateRequest)
    inbox.append(message)


def _timed(call: Callable[..., object], arguments: Sequence[tuple[Any, ...]]) -> float:
    started = time.process_time()
    for each in arguments:
        call(*each)
    return time.process_time() - started


def _ends(request_ids: Sequence[int], answer_ids: np.ndarray) -> SequenceUpdates:
    """The only rows of requests with one sample, which all have the same answer."""
    count = len(request_ids)
    zeros, nothing = np.zeros(count, np.int32), np.zeros(0, np.float32)
    return SequenceUpdates(
        request_ids=np.array(request_ids, np.int64),
        sample_indices=zeros,
        num_tokens=np.full(count, len(answer_ids), np.int32),
        finish_reasons=np.full(count, FinishReason.STOP, np.int32),
        num_cached_tokens=zeros,
        num_logprobs=np.full(count, -1, np.int32),
        weights_versions=zeros,
        token_ids=np.tile(answer_ids, count),
        logprobs=nothing,
        top_ids=np.zeros(0, np.int32),
        top_logprobs=nothing,
    )
