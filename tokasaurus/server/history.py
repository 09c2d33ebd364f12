"""The engine's last ten minutes, one sample a second, and what limits throughput now.

It reads the manager's latest statistics, which come about once a second, so a sample costs
microseconds whatever the engine does. Rates are taken over the seconds that the statistics cover.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from tokasaurus.protocol.messages import Statistics
from tokasaurus.text.generations import Generations
from tokasaurus.text.limits import Limit, find_limit, kv_use

__all__ = ["INTERVAL_S", "History", "Sample"]

INTERVAL_S = 1.0
_NUM_SAMPLES = 600
_WINDOW_S = 5.0  # over which rates are taken: statistics of single seconds jump


class Sample(NamedTuple):
    """One moment. Rates and shares are means over the seconds before it."""

    time_s: float  # since the epoch
    tokens_in: float  # prompt tokens per second, computed or found in the cache
    tokens_out: float  # generated tokens per second
    running: int  # sequences
    waiting: int  # sequences, also those that the server holds back
    in_flight: int  # batches
    kv_use: float  # share of the pages that sequences hold
    prefix_hits: float  # share of the prompt tokens
    shared: float  # share of the decode rows whose prefix attention read once for a group
    device_busy: float  # share of the time
    device_waiting: float  # share of the time: batches were in flight, and the device was not busy


class _Mark(NamedTuple):
    """Statistics, and when they were found here."""

    at: float
    thread_s: float
    statistics: Statistics


class History:
    """The samples of one engine. Belongs to the event loop's thread.

    Args:
        clock: seconds.
        thread_clock: seconds in which this thread computed.

    Attributes:
        samples: oldest first.
        limit: what limits throughput; None before there are figures.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        thread_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.samples: deque[Sample] = deque(maxlen=_NUM_SAMPLES)
        self.limit: Limit | None = None
        self._clock = clock
        self._thread_clock = thread_clock
        self._marks: deque[_Mark] = deque()

    def sample(self, generations: Generations) -> None:
        """Takes a sample, once the manager has sent figures. Due every ``INTERVAL_S``."""
        statistics = generations.statistics
        if statistics is None:
            return
        now = _Mark(self._clock(), self._thread_clock(), statistics)
        if self._marks and _is_of_others(self._marks[-1].statistics, statistics):
            self._marks.clear()
        self._marks.append(now)
        while now.at - self._marks[0].at > _WINDOW_S and len(self._marks) > 2:
            self._marks.popleft()
        before = self._marks[0]
        num_held = generations.num_held
        self.samples.append(_sample(before, now, num_held))
        self._find_limit(before, now, num_held)

    def _find_limit(self, before: _Mark, now: _Mark, num_held: int) -> None:
        one, other = before.statistics, now.statistics
        goes_on = other.num_running and not other.paused
        if goes_on and one.num_batches == other.num_batches:
            return  # a batch takes longer than the window, or these are the first figures
        elapsed_s = now.at - before.at
        busy = (now.thread_s - before.thread_s) / elapsed_s if elapsed_s else 0.0
        self.limit = find_limit(one, other, num_held=num_held, server_busy=busy)


def _is_of_others(before: Statistics, now: Statistics) -> bool:
    """Whether totals fell, so that differences mean nothing."""
    return now.num_batches < before.num_batches


def _sample(before: _Mark, now: _Mark, num_held: int) -> Sample:
    one, other = before.statistics, now.statistics
    elapsed_s = max(now.at - before.at, 1e-9)
    computed = other.num_prefill_tokens - one.num_prefill_tokens
    cached = other.num_cached_tokens - one.num_cached_tokens
    decoded = other.num_decode_tokens - one.num_decode_tokens
    grouped = other.num_grouped_tokens - one.num_grouped_tokens
    all_s = elapsed_s * max(1, other.num_replicas)
    device_s = other.device_s - one.device_s
    active_s = other.active_s - one.active_s
    return Sample(
        time_s=round(time.time(), 1),
        tokens_in=round((computed + cached) / elapsed_s, 1),
        tokens_out=round((other.num_generated_tokens - one.num_generated_tokens) / elapsed_s, 1),
        running=other.num_running,
        waiting=other.num_waiting + num_held,
        in_flight=other.num_in_flight,
        kv_use=round(kv_use(other), 4),
        prefix_hits=_share(cached, computed + cached),
        shared=_share(grouped, decoded),
        device_busy=_share(device_s, all_s),
        device_waiting=_share(max(0.0, active_s - device_s), all_s),
    )


def _share(part: float, whole: float) -> float:
    return round(min(1.0, part / whole), 4) if whole else 0.0
