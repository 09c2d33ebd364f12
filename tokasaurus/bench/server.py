"""``toka-bench server``: what the server costs, in CPU time of its process.

    toka-bench server               four kinds of load; a minute
    toka-bench server quick=T       small and rough; seconds

The real server with a real tokenizer, the real manager, and a device that draws random tokens at no cost.
The clients share the cores with them, and only the server is measured::

    small requests     a short prompt, 8 tokens: what a request costs, whatever it generates
    many samples       1,024 samples of 128 tokens in one request: what a generated token costs, as text
    streams            what a streamed token costs where the server is the bottleneck: tokens that come
                       while it is busy share an event
    paced streams      what an event costs: the device takes its time, so that no two tokens share one
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tokasaurus.bench.cpu_time import loop_turn_ns
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
        "completions", choices=("completions", "chat"), help="Which API the clients speak."
    )
    clients: int = flag(64, minimum=1, help="Connections of small requests and of streams.")
    windows: int = flag(3, minimum=1, help="The median of so many measurements counts.")
    step_ms: float = flag(10.0, minimum=0, help="Of a device step of paced streams.")
    quick: bool = flag(False, help="Small and rough: one short window.")

    def __post_init__(self) -> None:
        check_fields(self)


SCHEMA = Schema(
    target=ServerBenchConfig,
    program="toka-bench server",
    summary="CPU time of the real server process, against a simulated device.",
    examples=("toka-bench server", "toka-bench server endpoint=chat", "toka-bench server quick=T"),
)


def run(config: ServerBenchConfig) -> None:
    """Measures and prints."""
    turns = [loop_turn_ns()]
    num_small, num_large, num_streams = (64, 1, 8) if config.quick else (2000, 8, 256)
    windows = 1 if config.quick else config.windows
    with _service("instant") as service:
        run_load(service.port, _load(config, _WARM_UP, max_tokens=_SMALL_TOKENS))
        progress(f"{num_small} small requests ...")
        small = _median(
            windows,
            service,
            _load(config, num_small, max_tokens=_SMALL_TOKENS),
            lambda _: num_small,
        )
        progress(f"{num_large} requests of {_SAMPLES} samples ...")
        samples = Load(
            _path(config),
            {**_body(config), "max_tokens": _SAMPLE_TOKENS, "n": _SAMPLES},
            num_requests=num_large,
            num_clients=1,
        )
        num_tokens = num_large * _SAMPLES * _SAMPLE_TOKENS
        generated = _median(windows, service, samples, lambda _: num_tokens)
        progress(f"{num_streams} streams of {_STREAM_TOKENS} tokens ...")
        streams = _load(config, num_streams, max_tokens=_STREAM_TOKENS, stream=True)
        num_tokens = num_streams * _STREAM_TOKENS
        streamed = _median(windows, service, streams, lambda _: num_tokens)
    with _service(f"fixed:{config.step_ms / 1e3}") as service:
        run_load(service.port, _load(config, _WARM_UP, max_tokens=_SMALL_TOKENS))
        progress(
            f"{num_streams} streams of {_STREAM_TOKENS} tokens, {config.step_ms:g} ms each ..."
        )
        event = _median(windows, service, streams, lambda num_events: num_events)
    turns.append(loop_turn_ns())
    print(f"\nCPU time of the server, {config.endpoint}\n")
    print(
        table(
            ("load", "us", "of each"),
            [
                ("small requests", f"{small:.0f}", "request"),
                (f"requests with n={_SAMPLES}", f"{generated:.2f}", "generated token"),
                ("streams", f"{streamed:.1f}", "streamed token"),
                ("paced streams", f"{event:.1f}", "event"),
            ],
        )
    )
    print(
        f"\nThis machine: {turns[0]:.0f} ns for a turn of an empty Python loop, {turns[1]:.0f} at the end"
    )
    print_json(
        {
            "endpoint": config.endpoint,
            "us_per_small_request": round(small, 1),
            "us_per_generated_token": round(generated, 3),
            "us_per_streamed_token": round(streamed, 2),
            "us_per_event": round(event, 2),
            "loop_turn_ns": [round(turn, 1) for turn in turns],
        }
    )


def _service(cost: str) -> SimulatedService:
    flags = EngineConfig(
        model=str(MODEL_DIR),
        max_seqs_per_forward=2048,
        kv_cache_num_tokens=1 << 20,
        log_level="WARNING",
        uvicorn_log_level="warning",
    )
    facts = model_facts(str(MODEL_DIR), None)
    return SimulatedService(
        simulated_slices(flags, facts), DevicePlan(cost, vocab_size=facts.vocab_size)
    )


def _median(
    num_windows: int, service: SimulatedService, load: Load, num_units: Callable[[int], int]
) -> float:
    """Microseconds of the server for each of ``num_units(events)``."""
    costs = []
    for _ in range(num_windows):
        start = service.cpu_s("server")
        num_events = run_load(service.port, load)
        costs.append((service.cpu_s("server") - start) / num_units(num_events) * 1e6)
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
