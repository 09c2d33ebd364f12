"""``toka-bench server``: what the server costs, in CPU time of its process.

    toka-bench server               four kinds of load; takes a minute
    toka-bench server quick=T       small and rough; takes seconds

Runs the real server with a real tokenizer, the real manager, and a device that draws random tokens
at no cost. The clients share the cores with them; only the server is measured::

    small requests     a short prompt and 8 tokens: the cost of a request, whatever it generates
    many samples       1,024 samples of 128 tokens in one request: the cost of a generated token
    streams            the cost of a streamed token when the server is the bottleneck: tokens that
                       come while it is busy share an event
    paced streams      the cost of an event: the device is slow, so each token has its own event

With ``traces=T`` each request is traced. What a trace costs is the difference to a run without; the
collector is in the process of the clients.

With several server processes, the sum over all of them counts, that of the process behind them
stands beside it, and the share of the busiest HTTP process shows how evenly connections spread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tokasaurus.bench.cpu_time import loop_turn_ns, machine_line
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedService
from tokasaurus.bench.flags import counts
from tokasaurus.bench.http_load import Load, run_load
from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.bench.span_sink import span_sink
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.demo import MODEL_DIR
from tokasaurus.errors import ConfigError
from tokasaurus.model.facts import model_facts
from tokasaurus.observability.tracing import is_installed
from tokasaurus.planner.configuration import simulated_slices

__all__ = ["SCHEMA", "ServerBenchConfig", "run"]

_PROMPT = "The quick brown fox jumps over the lazy dog."
_SMALL_TOKENS = 8
_SAMPLES, _SAMPLE_TOKENS = 1024, 128
_STREAM_TOKENS = 128
_WARM_UP = 64  # small requests


@dataclass(frozen=True, kw_only=True)
class ServerBenchConfig:
    """What to measure."""

    endpoint: str = flag(
        "completions", choices=("completions", "chat"), help="The API that the clients use."
    )
    clients: int = flag(
        64, minimum=1, help="How many clients send small requests, or read streams, at once."
    )
    windows: int = flag(
        3, minimum=1, help="How many measurements there are, of which the median counts."
    )
    server_processes: tuple[str, ...] = flag(
        ("1",),
        help="Numbers of server processes, such as 1,2; each is measured in turn.",
    )
    traces: bool = flag(
        False, help="Trace each request, and send the traces to a collector that drops them."
    )
    step_ms: float = flag(10.0, minimum=0, help="How long a step takes, for paced streams.")
    quick: bool = flag(False, help="Measure roughly: one short window.")

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of server processes."""
        return counts("server_processes", self.server_processes)


SCHEMA = Schema(
    target=ServerBenchConfig,
    program="toka-bench server",
    summary="CPU time of the real server process, against a simulated device.",
    examples=(
        "toka-bench server",
        "toka-bench server endpoint=chat",
        "toka-bench server server_processes=1,2",
        "toka-bench server traces=T",
        "toka-bench server quick=T",
    ),
)


def run(config: ServerBenchConfig) -> None:
    """Measures and prints the results."""
    if config.traces and not is_installed():
        raise ConfigError("traces=T needs OpenTelemetry: pip install 'tokasaurus[otlp]'")
    turns = [loop_turn_ns()]
    with span_sink() if config.traces else contextlib.nullcontext() as endpoint:
        results = [_result(config, number, endpoint) for number in config.numbers]
    turns.append(loop_turn_ns())
    loads = {"small requests": "request", f"requests with n={_SAMPLES}": "generated token"}
    loads.update({"streams": "streamed token", "paced streams": "event"})
    traced = ", each request traced" if config.traces else ""
    print(f"\nCPU time of the server, {config.endpoint}{traced}\n")
    heads = ("load", "processes", "us in all", "behind them", "of the busiest", "of each", "per s")
    rows = [
        (
            load,
            f"{result.number}",
            f"{cost.total_us:.2f}",
            f"{cost.core_us:.2f}" if result.number > 1 else "",
            f"{cost.busiest:.0%}",
            of_each,
            f"{cost.per_s:.0f}",
        )
        for cost_number, (load, of_each) in enumerate(loads.items())
        for result in results
        for cost in (result.costs[cost_number],)
    ]
    print(table(heads, rows))
    print(f"\n{machine_line(turns)}")
    for result in results:
        request, generated, streamed, event = result.costs
        print_json(
            {
                "endpoint": config.endpoint,
                "server_processes": result.number,
                "traces": config.traces,
                "us_per_small_request": round(request.total_us, 1),
                "us_per_generated_token": round(generated.total_us, 3),
                "us_per_streamed_token": round(streamed.total_us, 2),
                "us_per_event": round(event.total_us, 2),
                "us_behind": [round(cost.core_us, 3) for cost in result.costs],
                "share_of_busiest": [round(cost.busiest, 3) for cost in result.costs],
                "per_s": [round(cost.per_s, 1) for cost in result.costs],
                "loop_turn_ns": [round(turn, 1) for turn in turns],
            }
        )


@dataclass(frozen=True)
class _Cost:
    """What one unit of a load costs.

    Attributes:
        total_us: CPU time of all server processes, in microseconds.
        core_us: that of the process behind the HTTP processes; with one process, all.
        busiest: share of the CPU time of the busiest of the processes that share the port.
        per_s: units in a second, on this machine with its clients.
    """

    total_us: float
    core_us: float
    busiest: float
    per_s: float

    def divided(self, number: float) -> _Cost:
        """For a load whose unit is one of this many."""
        return _Cost(
            self.total_us / number, self.core_us / number, self.busiest, self.per_s * number
        )


@dataclass(frozen=True)
class _Result:
    """The costs of a request, a generated token, a streamed token, and an event."""

    number: int
    costs: tuple[_Cost, _Cost, _Cost, _Cost]


def _result(config: ServerBenchConfig, number: int, otlp_endpoint: str | None) -> _Result:
    num_small, num_large, num_streams = (64, 1, 8) if config.quick else (2000, 8, 256)
    windows = 1 if config.quick else config.windows
    small = _load(config, num_small, max_tokens=_SMALL_TOKENS)
    body = {**_body(config), "max_tokens": _SAMPLE_TOKENS, "n": _SAMPLES}
    samples = Load(_path(config), body, num_requests=num_large, num_clients=1)
    streams = _load(config, num_streams, max_tokens=_STREAM_TOKENS, stream=True)
    with _service(config, "instant", number, otlp_endpoint) as service:
        progress(f"{num_small} small requests ...")
        small_cost = _median(windows, service, small)
        progress(f"{num_large} requests of {_SAMPLES} samples ...")
        samples_cost = _median(windows, service, samples)
        progress(f"{num_streams} streams of {_STREAM_TOKENS} tokens ...")
        streams_cost = _median(windows, service, streams)
    with _service(config, f"fixed:{config.step_ms / 1e3}", number, otlp_endpoint) as service:
        progress(
            f"{num_streams} streams of {_STREAM_TOKENS} tokens, {config.step_ms:g} ms each ..."
        )
        event_cost = _median(windows, service, streams, per_event=True)
    return _Result(
        number,
        (
            small_cost,
            samples_cost.divided(_SAMPLES * _SAMPLE_TOKENS),
            streams_cost.divided(_STREAM_TOKENS),
            event_cost,
        ),
    )


@contextlib.contextmanager
def _service(
    config: ServerBenchConfig, cost: str, number: int, otlp_endpoint: str | None
) -> Iterator[SimulatedService]:
    """Runs a server, warm, with a device of the given cost."""
    flags = EngineConfig(
        model=str(MODEL_DIR),
        max_seqs_per_forward=2048,
        kv_cache_num_tokens=1 << 20,
        log_level="WARNING",
        uvicorn_log_level="warning",
        server_processes=number,
        otlp_endpoint=otlp_endpoint,
    )
    facts = model_facts(str(MODEL_DIR), None)
    slices, plan = simulated_slices(flags, facts), DevicePlan(cost, vocab_size=facts.vocab_size)
    with SimulatedService(slices, plan) as service:
        run_load(service.port, _load(config, _WARM_UP, max_tokens=_SMALL_TOKENS))
        yield service


def _median(
    num_windows: int, service: SimulatedService, load: Load, *, per_event: bool = False
) -> _Cost:
    """The median window: what a request, or an event, costs."""
    costs = []
    for _ in range(num_windows):
        core_s, http_s, start_s = service.cpu_s("server"), service.http_cpu_s(), time.monotonic()
        num_events = run_load(service.port, load)
        took_s = time.monotonic() - start_s
        core_s = service.cpu_s("server") - core_s
        http_s = [now - before for now, before in zip(service.http_cpu_s(), http_s, strict=True)]
        number = num_events if per_event else load.num_requests
        costs.append(
            _Cost(
                (core_s + sum(http_s)) / number * 1e6,
                core_s / number * 1e6,
                max(http_s) / sum(http_s) if http_s else 1.0,
                number / took_s,
            )
        )
    return sorted(costs, key=lambda cost: cost.total_us)[len(costs) // 2]


def _load(config: ServerBenchConfig, num_requests: int, **fields: object) -> Load:
    return Load(_path(config), {**_body(config), **fields}, num_requests, config.clients)


def _path(config: ServerBenchConfig) -> str:
    return "/v1/chat/completions" if config.endpoint == "chat" else "/v1/completions"


def _body(config: ServerBenchConfig) -> dict[str, object]:
    common = {"model": "default", "temperature": 1.0, "ignore_eos": True}
    if config.endpoint == "chat":
        return {**common, "messages": [{"role": "user", "content": _PROMPT}]}
    return {**common, "prompt": _PROMPT}
