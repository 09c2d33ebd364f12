"""``toka-bench lookahead``: how long the device waits, and how many tokens planning ahead wastes.

    toka-bench lookahead                        4,096 sequences, steps of 3 ms; takes a minute
    toka-bench lookahead fixed=8 step_ms=1.0

Runs in real time, with the real manager process. Sequences end at lengths that the manager does not
know. Tokens are wasted in the batches that were planned before it learned of an end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokasaurus.bench.clients import Clients
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedEngine
from tokasaurus.bench.flags import counts
from tokasaurus.bench.output import print_json, progress, table
from tokasaurus.bench.requests import Requests
from tokasaurus.config.engine import EngineConfig
from tokasaurus.config.schema import Schema, check_fields, flag
from tokasaurus.errors import ConfigError
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.worker_loop import DeviceStatistics
from tokasaurus.rounding import round_up

__all__ = ["SCHEMA", "LookaheadConfig", "run"]

_PROMPT = 64
_MAX_TOKENS = 2048
_PAGE = 16
_SETTLING_BATCHES = 20  # by then the manager has taken in the whole queue


@dataclass(frozen=True, kw_only=True)
class LookaheadConfig:
    """The load, and the fixed depths to compare with the engine's default."""

    num_sequences: int = flag(4096, minimum=2, help="How many sequences run together.")
    step_ms: float = flag(3.0, minimum=0, help="How long the device takes for a batch.")
    fixed: tuple[str, ...] = flag(
        ("1", "2", "4", "8"), help="Numbers of steps to plan ahead, one measurement for each."
    )
    waves: int = flag(
        3, minimum=2, help="How many sequences there are in all, as a multiple of num_sequences."
    )
    mean_length: int = flag(480, minimum=2, help="The mean number of tokens of a completion.")

    def __post_init__(self) -> None:
        check_fields(self)
        counts("fixed", self.fixed)
        if self.mean_length * (self.waves - 1) < 2 * _SETTLING_BATCHES:
            raise ConfigError(
                f"waves={self.waves}, mean_length={self.mean_length}: the sequences would end"
                " before there is a step to measure; raise one of them"
            )


SCHEMA = Schema(
    target=LookaheadConfig,
    program="toka-bench lookahead",
    summary="How long a device waits for the manager, and how many tokens are wasted after a stop.",
    examples=("toka-bench lookahead", "toka-bench lookahead fixed=1,8 step_ms=1.0"),
)


@dataclass(frozen=True)
class _Outcome:
    """The results of one depth. Those of steps are taken while the batch is full."""

    steps_ahead: str
    num_steps: int
    mean_batch: float
    ms_per_step: float
    waited_ms_per_step: float
    manager_ms_per_step: float  # CPU time
    waited_share: float  # of the time
    wasted_tokens: int
    wasted_per_sequence: float
    wasted_share: float  # of all generated tokens


def run(config: LookaheadConfig) -> None:
    """Measures and prints the results."""
    outcomes = []
    for name, steps_ahead in _policies(config).items():
        progress(f"{name} ...")
        outcomes.append(_measure(config, name, steps_ahead))
    print(f"\n{config.num_sequences} sequences, steps of {config.step_ms:g} ms\n")
    heads = (
        "steps ahead",
        "ms/step",
        "waited ms/step",
        "manager ms/step",
        "waited",
        "wasted/sequence",
        "wasted",
    )
    print(table(heads, [_row(outcome) for outcome in outcomes]))
    print_json({"lookahead": [_rounded(outcome) for outcome in outcomes]})


def _policies(config: LookaheadConfig) -> dict[str, int | None]:
    """The steps to plan ahead, by name; None lets the manager choose."""
    return {
        "adaptive": None,
        **{f"fixed {depth}": depth for depth in counts("fixed", config.fixed)},
    }


def _measure(config: LookaheadConfig, name: str, steps_ahead: int | None) -> _Outcome:
    count = config.num_sequences
    slices = simulated_slices(
        EngineConfig.from_flags(
            kv_cache_num_tokens=count * round_up(_PROMPT + _MAX_TOKENS, _PAGE),
            max_num_tokens_per_request=_PROMPT + _MAX_TOKENS,
            max_seqs_per_forward=count,
            log_level="WARNING",
        )
    )
    if steps_ahead is not None:
        (replica,) = slices.replicas
        manager = dataclasses.replace(
            replica.manager, scheduling_steps_ahead=steps_ahead, adapt_steps_ahead=False
        )
        replica = dataclasses.replace(replica, manager=manager)
        slices = dataclasses.replace(slices, replicas=(replica,))
    plan = DevicePlan(f"fixed:{config.step_ms / 1e3}", _lengths(config.mean_length))
    with SimulatedEngine(slices, plan) as engine:
        clients, device = Clients(engine), engine.device
        num_requests = config.waves * count
        for request in Requests().series(0, num_requests, _PROMPT, _MAX_TOKENS):
            clients.send(request)
        clients.run_until(lambda: device.num_rows >= 0.99 * count)
        clients.run_until_batch(device.num_batches + _SETTLING_BATCHES)
        start, cpu_s = _Reading.of(device), engine.manager_cpu_s()
        # Until then the queue holds a sequence for each slot.
        clients.run_to_end(num_requests - count)
        full, cpu_s = _Reading.of(device).since(start), engine.manager_cpu_s() - cpu_s
        clients.run_to_end(num_requests)
        clients.run_for(0.1 + 0.02 * config.step_ms)  # the batches in flight end
        num_wasted = device.num_drawn - clients.num_tokens
    if full.num_batches == 0:
        raise ConfigError(
            f"waves={config.waves}, mean_length={config.mean_length}: the sequences ended before"
            " there was a step to measure; raise one of them"
        )
    busy_s = full.device_s + full.waited_s
    return _Outcome(
        steps_ahead=name,
        num_steps=full.num_batches,
        mean_batch=full.num_drawn / full.num_batches,
        ms_per_step=busy_s / full.num_batches * 1e3,
        waited_ms_per_step=full.waited_s / full.num_batches * 1e3,
        manager_ms_per_step=cpu_s / full.num_batches * 1e3,
        waited_share=full.waited_s / busy_s,
        wasted_tokens=num_wasted,
        wasted_per_sequence=num_wasted / num_requests,
        wasted_share=num_wasted / clients.num_tokens,
    )


@dataclass(frozen=True)
class _Reading:
    """The totals of the device at a moment, or the difference of two readings."""

    num_batches: int
    num_drawn: int
    waited_s: float
    device_s: float

    @staticmethod
    def of(device: DeviceStatistics) -> _Reading:
        return _Reading(device.num_batches, device.num_drawn, device.waited_s, device.device_s)

    def since(self, other: _Reading) -> _Reading:
        return _Reading(
            self.num_batches - other.num_batches,
            self.num_drawn - other.num_drawn,
            self.waited_s - other.waited_s,
            self.device_s - other.device_s,
        )


def _lengths(mean: int) -> tuple[int, ...]:
    """A thousand log-normal lengths. None reaches max_tokens, so the manager can foresee no end."""
    sigma = 0.6
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, 1000)
    return tuple(np.clip(drawn, 1, _MAX_TOKENS - 1).astype(int).tolist())


def _row(outcome: _Outcome) -> tuple[object, ...]:
    return (
        outcome.steps_ahead,
        f"{outcome.ms_per_step:.2f}",
        f"{outcome.waited_ms_per_step:.3f}",
        f"{outcome.manager_ms_per_step:.2f}",
        f"{outcome.waited_share:.2%}",
        f"{outcome.wasted_per_sequence:.2f}",
        f"{outcome.wasted_share:.2%}",
    )


def _rounded(outcome: _Outcome) -> dict[str, Any]:
    values = dataclasses.asdict(outcome)
    return {
        name: round(value, 5) if isinstance(value, float) else value
        for name, value in values.items()
    }
