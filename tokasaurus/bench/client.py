"""``toka-bench client``: what the Python client costs, with thousands of requests under way.

    toka-bench client               takes a minute
    toka-bench client quick=T       small and rough; takes seconds

One ``AsyncClient`` in this process sends small requests to the real server, with the real manager
and a device that costs nothing. Only this process is measured. Each number of connections is
measured with Python's usual garbage collection, and with a higher threshold of it: each request
has some hundred objects, and each collection looks at those of all requests under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokasaurus.bench.cpu_time import loop_turn_ns, machine_line
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedService
from tokasaurus.bench.flags import counts
from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.client import AsyncClient, RetryPolicy
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.demo import MODEL_DIR
from tokasaurus.model.facts import model_facts
from tokasaurus.planner.configuration import simulated_slices

__all__ = ["SCHEMA", "ClientBenchConfig", "run"]

_PROMPT_IDS = [5, 6, 7, 8]
_TOKENS = 16
_REQUESTS_EACH = 2  # of each connection in a window, at least
_FEWEST_REQUESTS = 4096


@dataclass(frozen=True, kw_only=True)
class ClientBenchConfig:
    """What to measure."""

    connections: tuple[str, ...] = flag(
        ("64", "256", "1024", "4096"),
        help="Numbers of requests under way, such as 64,4096; each is measured in turn.",
    )
    gc_threshold: int = flag(
        20_000, minimum=1, help="The threshold of garbage collection beside Python's usual one."
    )
    quick: bool = flag(False, help="Measure roughly: few requests.")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of connections."""
        return counts("connections", self.connections)


SCHEMA = Schema(
    target=ClientBenchConfig,
    program="toka-bench client",
    summary="CPU time of the Python client, with thousands of requests under way.",
    examples=(
        "toka-bench client",
        "toka-bench client connections=1024,10000",
        "toka-bench client quick=T",
    ),
)


@dataclass(frozen=True)
class _Cost:
    """What a request costs in this process.

    Attributes:
        us: CPU time, in microseconds.
        gc_share: of it, in garbage collection.
        per_s: requests in a second, on this machine with the engine's processes.
    """

    us: float
    gc_share: float
    per_s: float


def run(config: ClientBenchConfig) -> None:
    """Measures and prints the results."""
    turns = [loop_turn_ns()]
    usual = gc.get_threshold()
    thresholds = (usual[0], config.gc_threshold)
    costs: dict[tuple[int, int], _Cost] = {}
    with _service(max(config.numbers)) as service:
        for number in config.numbers:
            for threshold in thresholds:
                progress(f"{number} connections, threshold {threshold} ...")
                gc.set_threshold(threshold, *usual[1:])
                try:
                    costs[number, threshold] = asyncio.run(_cost(service, number, config.quick))
                finally:
                    gc.set_threshold(*usual)
    turns.append(loop_turn_ns())
    heads = ("connections", "gc threshold", "us a request", "garbage collection", "per s")
    rows = [
        (f"{number}", f"{threshold}", f"{cost.us:.0f}", f"{cost.gc_share:.0%}", f"{cost.per_s:.0f}")
        for (number, threshold), cost in costs.items()
    ]
    print(f"\nCPU time of the client's process\n\n{table(heads, rows)}\n\n{machine_line(turns)}")
    for (number, threshold), cost in costs.items():
        print_json(
            {
                "connections": number,
                "gc_threshold": threshold,
                "us_per_request": round(cost.us, 1),
                "gc_share": round(cost.gc_share, 3),
                "per_s": round(cost.per_s, 1),
                "loop_turn_ns": [round(turn, 1) for turn in turns],
            }
        )


async def _cost(service: SimulatedService, number: int, is_quick: bool) -> _Cost:
    """What a request costs with this many under way. A request that fails ends the benchmark."""
    once = RetryPolicy(max_retries=0)
    url = f"http://127.0.0.1:{service.port}"
    num_requests = number if is_quick else max(_REQUESTS_EACH * number, _FEWEST_REQUESTS)
    async with AsyncClient(url, max_connections=number, retry=once) as client:
        await asyncio.gather(*(_ask(client) for _ in range(number)))  # makes the connections
        gc.collect()
        with _collecting() as gc_s:
            start_s, cpu_s = time.monotonic(), time.process_time()
            await asyncio.gather(*(_ask(client) for _ in range(num_requests)))
            cpu_s, took_s = time.process_time() - cpu_s, time.monotonic() - start_s
    return _Cost(cpu_s / num_requests * 1e6, sum(gc_s) / cpu_s, num_requests / took_s)


async def _ask(client: AsyncClient) -> None:
    await client.complete(_PROMPT_IDS, max_tokens=_TOKENS, ignore_eos=True)


@contextlib.contextmanager
def _collecting() -> Iterator[list[float]]:
    """The CPU seconds of each garbage collection in a with-block."""
    took: list[float] = []

    def note(phase: str, _info: dict[str, Any]) -> None:
        if phase == "start":
            took.append(-time.process_time())
        else:
            took[-1] += time.process_time()

    gc.callbacks.append(note)
    try:
        yield took
    finally:
        gc.callbacks.remove(note)


@contextlib.contextmanager
def _service(num_connections: int) -> Iterator[SimulatedService]:
    flags = EngineConfig(
        model=str(MODEL_DIR),
        max_seqs_per_forward=2048,
        max_queued_requests=num_connections,
        kv_cache_num_tokens=1 << 20,
        log_level="WARNING",
        uvicorn_log_level="warning",
    )
    facts = model_facts(str(MODEL_DIR), None)
    plan = DevicePlan("instant", vocab_size=facts.vocab_size)
    with SimulatedService(simulated_slices(flags, facts), plan) as service:
        yield service
