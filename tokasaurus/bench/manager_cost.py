"""What the manager costs: the CPU time of its real process, with its real channels.

::

    steady decode      the cache is full, requests are queued, and no sequence ends: each new page
                       of a sequence is evicted from the prefix cache
    start and finish   sequences generate one token: the cost is that of prompt, admission and end
    reference          128 prompt tokens and 128 generated ones, with everything counted

Each number is the median of several windows, since other work on the machine may disturb a window.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tokasaurus.bench.clients import Clients
from tokasaurus.bench.device_process import DevicePlan
from tokasaurus.bench.engine import SimulatedEngine
from tokasaurus.bench.requests import NUM_HEADERS, Requests
from tokasaurus.config.engine import EngineConfig
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.worker_loop import DeviceStatistics

__all__ = [
    "Cost",
    "Effort",
    "Setting",
    "Steady",
    "measure_reference",
    "measure_start_finish",
    "measure_steady",
    "start_us",
]


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    num_windows: int
    steps: int  # of a window of steady decode
    num_starts: int  # sequences of a window of start and finish
    num_waves: int  # waves of sequences in the reference workload, at least 2


@dataclass(frozen=True)
class Setting:
    """What the measurements have in common."""

    mix: str
    cost: str
    steps_ahead: int
    effort: Effort
    pp_size: int = 1

    @property
    def num_lanes(self) -> int:
        """Batches that together serve every running sequence once."""
        return self.pp_size + 1 if self.pp_size > 1 else 1

    def engine(self, **limits: int) -> SimulatedEngine:
        flags = EngineConfig.from_flags(
            scheduling_steps_ahead=self.steps_ahead,
            use_hydragen=True,
            log_level="WARNING",
            pp_size=self.pp_size,
            pp_num_buffer_stages=1,
            **limits,
        )
        plan = DevicePlan(self.cost, pp_size=self.pp_size)
        return SimulatedEngine(simulated_slices(flags), plan)


@dataclass(frozen=True)
class Cost:
    """CPU time in microseconds, over several windows."""

    median_us: float
    lowest_us: float

    @staticmethod
    def of(windows_us: list[float]) -> Cost:
        return Cost(statistics.median(windows_us), min(windows_us))

    def per(self, number: int) -> Cost:
        """The cost of one of ``number`` units."""
        return Cost(self.median_us / number, self.lowest_us / number)


# --- steady decode --------------------------------------------------------------------------------

_PROMPT = 384  # tokens
_HEADER = 320  # tokens of each prompt, in the full mix
_SETTLED_BATCHES = 30  # without prompt tokens
_MAX_SETTLING = 600  # batches
_ABORT_EVERY = 20  # batches, in the full mix


@dataclass(frozen=True)
class Steady:
    """One row of the table of steady decode."""

    running: int  # how many sequences the cache holds
    batch: float  # mean number of tokens that a batch drew
    us_per_token: float
    ms_per_step: float
    lowest_us_per_token: float  # over all windows
    steps_per_s: float  # by the wall clock


@dataclass(frozen=True)
class _Window:
    """Totals at a moment, or the difference of two readings."""

    cpu_s: float
    num_tokens: int
    num_steps: int
    wall_s: float

    def since(self, other: _Window) -> _Window:
        """What was added after an earlier reading."""
        return _Window(
            self.cpu_s - other.cpu_s,
            self.num_tokens - other.num_tokens,
            self.num_steps - other.num_steps,
            self.wall_s - other.wall_s,
        )

    @property
    def us_per_token(self) -> float:
        return self.cpu_s / self.num_tokens * 1e6


def measure_steady(setting: Setting, num_running: int) -> Steady:
    """Measures decoding only, while earlier prompts fill the prefix cache."""
    effort = setting.effort
    max_tokens = effort.num_windows * effort.steps + _MAX_SETTLING
    request_tokens = _PROMPT + max_tokens
    header_tokens = _HEADER if setting.mix == "full" else 0
    with setting.engine(
        kv_cache_num_tokens=NUM_HEADERS * header_tokens
        + num_running * (request_tokens - header_tokens),
        max_num_tokens_per_request=request_tokens,
        # High enough that the cache is what limits the batch.
        max_seqs_per_forward=num_running + num_running // 8,
    ) as engine:
        clients, requests = Clients(engine), Requests(setting.mix, header_tokens)
        for request in Requests().series(0, num_running, request_tokens - 1, 1):
            clients.send(request)
        clients.run_to_end(num_running)
        first = clients.num_sent
        for request in requests.series(first, 2 * num_running, _PROMPT, max_tokens):
            clients.send(request)
        clients.run_until(_settled(engine.device, num_running // 2 // setting.num_lanes))
        aborts = iter(range(first, first + num_running)) if setting.mix == "full" else None
        windows = [
            _steady_window(engine, clients, effort.steps, aborts) for _ in range(effort.num_windows)
        ]
    costs = [window.us_per_token for window in windows]
    steps = sum(window.num_steps for window in windows)
    return Steady(
        running=num_running,
        batch=sum(window.num_tokens for window in windows) / steps,
        us_per_token=statistics.median(costs),
        ms_per_step=statistics.median(window.cpu_s / window.num_steps * 1e3 for window in windows),
        lowest_us_per_token=min(costs),
        steps_per_s=steps / sum(window.wall_s for window in windows),
    )


def _settled(device: DeviceStatistics, num_rows: int) -> Callable[[], bool]:
    """A test whether batches have ``num_rows`` rows, and for some batches none of a prompt."""
    seen, since = 0, 0

    def is_settled() -> bool:
        nonlocal seen, since
        if device.num_prompt_tokens != seen:
            seen, since = device.num_prompt_tokens, device.num_batches
        return device.num_rows >= num_rows and device.num_batches >= since + _SETTLED_BATCHES

    return is_settled


def _steady_window(
    engine: SimulatedEngine, clients: Clients, num_steps: int, aborts: Iterator[int] | None
) -> _Window:
    device = engine.device
    start = _reading(engine)
    while (done := device.num_batches - start.num_steps) < num_steps:
        until = device.num_batches + min(_ABORT_EVERY, num_steps - done)
        clients.run_until_batch(until)
        if aborts is not None:
            clients.abort(next(aborts))
    return _reading(engine).since(start)


def _reading(engine: SimulatedEngine) -> _Window:
    """The totals at this moment."""
    return _Window(
        cpu_s=engine.manager_cpu_s(),
        num_tokens=engine.device.num_drawn,
        num_steps=engine.device.num_batches,
        wall_s=time.monotonic(),
    )


# --- start and finish -----------------------------------------------------------------------------

_LONG_PROMPT = 1024
_MAX_SAMPLES = 1024


def measure_start_finish(setting: Setting) -> tuple[Cost, Cost]:
    """Measures a sequence that generates one token after a prompt of 1,024.

    Returns:
        The cost of a sequence in separate requests, each with its own prompt, and in one request
        for 1,024 samples of one prompt.
    """
    effort = setting.effort
    with setting.engine(
        kv_cache_num_tokens=effort.num_starts * _LONG_PROMPT,
        max_num_tokens_per_request=_LONG_PROMPT + 1,
        max_seqs_per_forward=_MAX_SAMPLES,
        max_tokens_per_forward=16 * _LONG_PROMPT,
    ) as engine:
        clients, requests = Clients(engine), Requests(setting.mix)

        def separate() -> int:
            count = effort.num_starts
            for request in requests.series(clients.num_sent, count, _LONG_PROMPT, 1):
                clients.send(request)
            return count

        def samples() -> int:
            count = min(effort.num_starts, _MAX_SAMPLES)
            clients.send(Requests().make(clients.num_sent, _LONG_PROMPT, 1, count))
            return count

        start_us(clients, separate)  # fills the cache
        return _start_cost(setting, clients, separate), _start_cost(setting, clients, samples)


def _start_cost(setting: Setting, clients: Clients, send: Callable[[], int]) -> Cost:
    return Cost.of([start_us(clients, send) for _ in range(setting.effort.num_windows)])


def start_us(clients: Clients, send: Callable[[], int]) -> float:
    """The CPU time of a sequence. ``send`` returns how many it has sent."""
    cpu_s, num_ended = clients.engine.manager_cpu_s(), clients.num_ended
    count = send()
    clients.run_to_end(num_ended + count)
    return (clients.engine.manager_cpu_s() - cpu_s) / count * 1e6


# --- reference workload ---------------------------------------------------------------------------

_REFERENCE_TOKENS = 128  # of the prompt, and of the completion


def measure_reference(setting: Setting, num_running: int) -> Cost:
    """Measures a generated token. All requests arrive at the beginning, and all end."""
    effort = setting.effort
    num_requests, num_tokens = effort.num_waves * num_running, 2 * _REFERENCE_TOKENS
    with setting.engine(
        kv_cache_num_tokens=num_running * num_tokens,
        max_num_tokens_per_request=num_tokens,
        max_seqs_per_forward=num_running,
    ) as engine:
        clients, requests = Clients(engine), Requests(setting.mix)

        def send() -> int:
            first = clients.num_sent
            for request in requests.series(
                first, num_requests, _REFERENCE_TOKENS, _REFERENCE_TOKENS
            ):
                clients.send(request)
            return num_requests

        return _start_cost(setting, clients, send).per(_REFERENCE_TOKENS)
