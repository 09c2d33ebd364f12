"""``toka-bench scaling``: the throughput of 1 to 1,024 replicas behind one router, on paper.

    toka-bench scaling
    toka-bench scaling request_us=395 token_us=0.24 plot=docs/images/scaling.svg

Replicas are real managers with simulated devices, in virtual time (``bench.fleet``). With
``request_us`` or ``token_us``, each number of replicas runs twice: with a server that takes no
time, and with one that takes so long, as ``toka-bench server`` measures, until it is busy all the
time. The more replicas, the
shorter the time that is simulated. Managers' reports, one a second each, are measured apart.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokasaurus.bench.cpu_time import loop_turn_ns, machine_line
from tokasaurus.bench.flags import counts
from tokasaurus.bench.fleet import Fleet, Outcome, ServerCost
from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.bench.plot import check_plot
from tokasaurus.bench.scaling_plot import write_scaling_plot
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.manager import Manager
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.lengths import DrawnLengths
from tokasaurus.planner.named_costs import cost_model
from tokasaurus.planner.simulated_device import STOP_ID, VOCAB_SIZE
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import Eta, GenerateRequest, Sampling
from tokasaurus.text.replica_reports import Seats
from tokasaurus.text.replicas import Replicas

__all__ = ["SCHEMA", "ScalingConfig", "run"]

_PROMPT_TOKENS = 64
_MAX_TOKENS = 256
_MEDIAN_TOKENS, _SIGMA = 48, 0.6  # of completions, log-normal
_CLIENTS_PER_SEAT = 1.25  # so that requests wait at each replica
_WARM_UP_S = 0.5  # longer than most requests take
_LONGEST_S, _SHORTEST_S = 1.0, 0.25
_REPLICA_S = 200.0  # replicas times seconds, at most
_NUM_REPORTS = 1000
_SATURATED = 0.99


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """What to predict."""

    replicas: tuple[str, ...] = flag(
        ("1", "4", "16", "64", "256", "1024"), help="Numbers of replicas."
    )
    cost: str = flag("llama-8b-h100", help="The cost model of each device; see toka-bench replay.")
    seats: int = flag(32, minimum=1, help="The engine's flag max_seqs_per_forward.")
    request_us: float = flag(0.0, minimum=0, help="What the server takes for a request.")
    token_us: float = flag(0.0, minimum=0, help="What the server takes for a generated token.")
    seed: int = flag(0, minimum=0, help="The seed of prompts and lengths.")
    plot: str = flag("", may_be_empty=True, help="The file of an SVG that draws throughput.")

    def __post_init__(self) -> None:
        check_fields(self)
        counts("replicas", self.replicas)
        cost_model(self.cost)


SCHEMA = Schema(
    target=ScalingConfig,
    program="toka-bench scaling",
    summary="Predict the throughput of many replicas behind one router, in virtual time.",
    examples=(
        "toka-bench scaling",
        "toka-bench scaling request_us=395 token_us=0.24 plot=scaling.svg",
    ),
)


def run(config: ScalingConfig) -> None:
    """Predicts and prints."""
    if config.plot:
        check_plot(config.plot)
    turns = [loop_turn_ns()]
    servers = {"free": ServerCost()}
    if config.request_us or config.token_us:
        servers["charged"] = ServerCost(config.request_us * 1e-6, config.token_us * 1e-6)
    cells: list[dict[str, Any]] = []
    for num_replicas in counts("replicas", config.replicas):
        reports_us = _reports_us(config, num_replicas)
        for name, server in list(servers.items()):
            outcome = _predict(config, num_replicas, server)
            progress(f"{num_replicas} replicas, {name}: {outcome.tokens_per_s:.4g} tokens/s")
            cell = {key: float(f"{value:.5g}") for key, value in asdict(outcome).items()}
            if outcome.server_busy > _SATURATED:  # more replicas would change nothing
                del servers[name]
            cells.append(
                {
                    "replicas": num_replicas,
                    "server": name,
                    **cell,
                    "report_us": round(reports_us, 1),
                }
            )
    turns.append(loop_turn_ns())
    _print(config, cells)
    print(f"\n{machine_line(turns)}")
    if config.plot:
        lines: dict[str, list[tuple[int, float]]] = {}
        for each in cells:
            line = lines.setdefault(each["server"], [])
            line.append((each["replicas"], each["tokens_per_s"]))
        names = {
            "free": "a server that takes no time",
            "charged": f"a server of {config.request_us:g} us a request,"
            f" {config.token_us:g} us a token",
        }
        write_scaling_plot(config.plot, {names[name]: line for name, line in lines.items()})
    print_json({"cost": config.cost, "cells": cells, "loop_turn_ns": turns})


def _print(config: ScalingConfig, cells: list[dict[str, Any]]) -> None:
    rows = []
    first = {each["server"]: each for each in reversed(cells)}
    for each in cells:
        one = first[each["server"]]
        ideal = one["tokens_per_s"] / one["replicas"] * each["replicas"]
        rows.append(
            (
                each["replicas"],
                each["server"],
                f"{each['tokens_per_s']:,.0f}",
                f"{each['tokens_per_s'] / ideal:.1%}" if ideal else "",
                f"{each['requests_per_s']:,.0f}",
                f"{each['device_busy']:.1%}",
                f"{each['server_busy']:.1%}",
                f"{each['place_us']:.1f}",
                f"{each['absorb_us']:.2f}",
                f"{each['report_us']:.0f}",
            )
        )
    heads = ("replicas", "server", "tokens/s", "of ideal", "requests/s", "devices busy")
    measured = ("server busy", "us to place", "us an update", "us a report")
    print(f"\nPredicted throughput, {config.cost}, {config.seats} sequences at once each\n")
    print(table((*heads, *measured), rows))
    print(
        "\nMeasured here: what the router takes for a request, an update of one sequence, and what"
    )
    print("a replica reports each second: statistics and a prediction. The rest is predicted.")


def _manager_config(config: ScalingConfig) -> ManagerConfig:
    tokens = _PROMPT_TOKENS + _MAX_TOKENS
    flags = EngineConfig.from_flags(
        max_seqs_per_forward=config.seats,
        kv_cache_num_tokens=2 * config.seats * tokens,
        max_num_tokens_per_request=tokens,
    )
    return simulated_slices(flags).replicas[0].manager


def _predict(config: ScalingConfig, num_replicas: int, server: ServerCost) -> Outcome:
    chance = np.random.default_rng(config.seed)
    drawn = np.rint(chance.lognormal(np.log(_MEDIAN_TOKENS), _SIGMA, 4096))
    lengths = DrawnLengths(np.clip(drawn, 1, _MAX_TOKENS).astype(np.int64))
    fleet = Fleet(
        num_replicas,
        _manager_config(config),
        cost_model(config.cost),
        lengths,
        _Strangers(chance),
        server,
    )
    span_s = min(_LONGEST_S, max(_SHORTEST_S, _REPLICA_S / num_replicas - _WARM_UP_S))
    num_clients = round(_CLIENTS_PER_SEAT * config.seats * num_replicas)
    return fleet.run(num_clients, _WARM_UP_S, _WARM_UP_S + span_s)


class _Strangers:
    """Clients whose prompts share nothing, and who ask again at once."""

    def __init__(self, chance: np.random.Generator) -> None:
        self._chance = chance
        self._numbers = itertools.count()

    def first(self) -> GenerateRequest:
        number = next(self._numbers)
        return GenerateRequest(
            request_id=number,
            prompt_ids=self._chance.integers(1, VOCAB_SIZE, _PROMPT_TOKENS, dtype=np.int32),
            n=1,
            max_tokens=_MAX_TOKENS,
            sampling=Sampling(),
            seed=number,
            stop_token_ids=(STOP_ID,),
        )

    def following(self, request_id: int, answer_ids: Int32Array) -> tuple[float, GenerateRequest]:
        return 0.0, self.first()


def _reports_us(config: ScalingConfig, num_replicas: int) -> float:
    """CPU microseconds of the router for what a replica reports in a second.

    That is a prediction and statistics, of which the sums are looked at once a second.
    """
    manager = _manager_config(config)
    report = Manager(manager).statistics()
    seats = Seats(manager.max_seqs_per_forward, manager.num_pages * manager.page_size)
    router = Replicas([lambda _: None] * num_replicas, [seats] * num_replicas)
    clients = _Strangers(np.random.default_rng(config.seed))
    for _ in range(num_replicas):  # each goes to another replica
        router.send(clients.first())
    prediction = Eta(np.zeros(0, np.int64), np.zeros(0, np.float64), 1.0)
    num_rounds = max(2, _NUM_REPORTS // num_replicas)
    started = time.process_time()
    for _ in range(num_rounds):
        for number in range(num_replicas):
            router.absorb(number, prediction)
            router.absorb(number, report)
        assert router.statistics is not None
    return (time.process_time() - started) / num_rounds / num_replicas * 1e6
