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
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from tokasaurus.bench.cpu_time import loop_turn_ns, machine_line
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedService
from tokasaurus.bench.http_load import Load, run_load
from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.demo import MODEL_DIR
from tokasaurus.model.facts import model_facts
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
    step_ms: float = flag(10.0, minimum=0, help="How long a step takes, for paced streams.")
    quick: bool = flag(False, help="Measure roughly: one short window.")

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=ServerBenchConfig,
    program="toka-bench server",
    summary="CPU time of the real server process, against a simulated device.",
    examples=("toka-bench server", "toka-bench server endpoint=chat", "toka-bench server quick=T"),
)


def run(config: ServerBenchConfig) -> None:
    """Measures and prints the results."""
    turns = [loop_turn_ns()]
    costs = _measure(config)
    turns.append(loop_turn_ns())
    rows = [
        ("small requests", f"{costs.request_us:.0f}", "request"),
        (f"requests with n={_SAMPLES}", f"{costs.generated_us:.2f}", "generated token"),
        ("streams", f"{costs.streamed_us:.1f}", "streamed token"),
        ("paced streams", f"{costs.event_us:.1f}", "event"),
    ]
    print(f"\nCPU time of the server, {config.endpoint}\n")
    print(table(("load", "us", "of each"), rows))
    print(f"\n{machine_line(turns)}")
    print_json(
        {
            "endpoint": config.endpoint,
            "us_per_small_request": round(costs.request_us, 1),
            "us_per_generated_token": round(costs.generated_us, 3),
            "us_per_streamed_token": round(costs.streamed_us, 2),
            "us_per_event": round(costs.event_us, 2),
            "loop_turn_ns": [round(turn, 1) for turn in turns],
        }
    )


@dataclass(frozen=True)
class _Costs:
    """Microseconds of CPU time."""

    request_us: float
    generated_us: float
    streamed_us: float
    event_us: float


def _measure(config: ServerBenchConfig) -> _Costs:
    num_small, num_large, num_streams = (64, 1, 8) if config.quick else (2000, 8, 256)
    windows = 1 if config.quick else config.windows
    small = _load(config, num_small, max_tokens=_SMALL_TOKENS)
    body = {**_body(config), "max_tokens": _SAMPLE_TOKENS, "n": _SAMPLES}
    samples = Load(_path(config), body, num_requests=num_large, num_clients=1)
    streams = _load(config, num_streams, max_tokens=_STREAM_TOKENS, stream=True)
    with _service(config, "instant") as service:
        progress(f"{num_small} small requests ...")
        small_us = _median(windows, service, small)
        progress(f"{num_large} requests of {_SAMPLES} samples ...")
        samples_us = _median(windows, service, samples)
        progress(f"{num_streams} streams of {_STREAM_TOKENS} tokens ...")
        streams_us = _median(windows, service, streams)
    with _service(config, f"fixed:{config.step_ms / 1e3}") as service:
        progress(
            f"{num_streams} streams of {_STREAM_TOKENS} tokens, {config.step_ms:g} ms each ..."
        )
        event_us = _median(windows, service, streams, per_event=True)
    return _Costs(
        request_us=small_us,
        generated_us=samples_us / (_SAMPLES * _SAMPLE_TOKENS),
        streamed_us=streams_us / _STREAM_TOKENS,
        event_us=event_us,
    )


@contextlib.contextmanager
def _service(config: ServerBenchConfig, cost: str) -> Iterator[SimulatedService]:
    """Runs a server, warm, with a device of the given cost."""
    flags = EngineConfig(
        model=str(MODEL_DIR),
        max_seqs_per_forward=2048,
        kv_cache_num_tokens=1 << 20,
        log_level="WARNING",
        uvicorn_log_level="warning",
    )
    facts = model_facts(str(MODEL_DIR), None)
    slices, plan = simulated_slices(flags, facts), DevicePlan(cost, vocab_size=facts.vocab_size)
    with SimulatedService(slices, plan) as service:
        run_load(service.port, _load(config, _WARM_UP, max_tokens=_SMALL_TOKENS))
        yield service


def _median(
    num_windows: int, service: SimulatedService, load: Load, *, per_event: bool = False
) -> float:
    """The median CPU time of the server for each request, or for each event, in microseconds."""
    costs = []
    for _ in range(num_windows):
        start = service.cpu_s("server")
        num_events = run_load(service.port, load)
        cpu_s = service.cpu_s("server") - start
        costs.append(cpu_s / (num_events if per_event else load.num_requests) * 1e6)
    return statistics.median(costs)


def _load(config: ServerBenchConfig, num_requests: int, **fields: object) -> Load:
    return Load(_path(config), {**_body(config), **fields}, num_requests, config.clients)


def _path(config: ServerBenchConfig) -> str:
    return "/v1/chat/completions" if config.endpoint == "chat" else "/v1/completions"


def _body(config: ServerBenchConfig) -> dict[str, object]:
    common = {"model": "default", "temperature": 1.0, "ignore_eos": True}
    if config.endpoint == "chat":
        return {**common, "messages": [{"role": "user", "content": _PROMPT}]}
    return {**common, "prompt": _PROMPT}
