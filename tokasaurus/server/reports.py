"""What a server reports unasked: a line in the log now and then, and gauges to a statsd daemon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

from tokasaurus.config.slices import ServerConfig
from tokasaurus.protocol.messages import Statistics
from tokasaurus.server.history import INTERVAL_S, History
from tokasaurus.server.metrics import Figure, figures, limit_figures
from tokasaurus.text.generations import Generations
from tokasaurus.text.limits import kv_use
from tokasaurus.text.replicas import Replicas

__all__ = ["StatisticsLine", "report", "statsd_packets"]

log = logging.getLogger(__name__)

_GAUGES_EVERY_S = 1.0
_PACKET_BYTES = 1400  # fits an Ethernet frame


async def report(config: ServerConfig, generations: Generations, history: History) -> None:
    """Reports as configured, until it is cancelled. A report that fails has no other effect.

    Args:
        config: the server's slice.
        generations: of the engine.
        history: takes a sample every second.
    """
    await asyncio.gather(
        _take_samples(generations, history),
        _print_lines(config.stats_report_s, generations, history),
        _send_gauges(config.statsd_address, generations, history),
    )


async def _take_samples(generations: Generations, history: History) -> None:
    while True:
        history.sample(generations)
        await asyncio.sleep(INTERVAL_S)


# --- the line -------------------------------------------------------------------------------------


async def _print_lines(period_s: float, generations: Generations, history: History) -> None:
    if period_s == 0:
        return
    line = StatisticsLine(generations, history)
    while True:
        await asyncio.sleep(period_s)
        text = line.next()
        if text is not None:
            log.info("%s", text)


class StatisticsLine:
    """Sums the engine's work up in one line, since the previous line.

    Args:
        generations: of the engine.
        history: says what limits throughput.
        clock: seconds.
    """

    def __init__(
        self,
        generations: Generations,
        history: History,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._generations = generations
        self._history = history
        self._clock = clock
        self._before = generations.statistics
        self._told_at = clock()

    def next(self) -> str | None:
        """The next line; None if there was no work since the previous one."""
        now, before = self._clock(), self._before
        current = self._generations.statistics
        elapsed_s = max(now - self._told_at, 1e-9)
        self._told_at, self._before = now, current
        if current is None or before is None:
            return None
        num_batches = current.num_batches - before.num_batches
        if num_batches == 0 and not len(self._generations):
            return None
        line = ", ".join(self._parts(before, current, elapsed_s))
        limit = self._history.limit
        return line if limit is None else f"{line}. Limit: {limit.sentence}"

    def _parts(self, before: Statistics, current: Statistics, elapsed_s: float) -> Iterator[str]:
        computed = current.num_prefill_tokens - before.num_prefill_tokens
        cached = current.num_cached_tokens - before.num_cached_tokens
        generated = current.num_generated_tokens - before.num_generated_tokens
        yield f"in {_count((computed + cached) / elapsed_s)} tokens/s"
        yield f"out {_count(generated / elapsed_s)} tokens/s"
        yield f"running {_count(current.num_running)}"
        yield f"waiting {_count(current.num_waiting + self._generations.num_held)}"
        yield f"KV {kv_use(current):.0%}"
        replicas = self._generations.replicas
        if replicas is not None:
            yield from _replica_parts(replicas)
        if computed + cached:
            yield f"prefix hits {cached / (computed + cached):.0%}"
        preemptions = current.num_preemptions - before.num_preemptions
        if preemptions:
            yield f"preemptions {preemptions}"
        backlog_s = self._generations.backlog_s
        if backlog_s:
            yield f"done in {_duration(backlog_s)}"


def _replica_parts(replicas: Replicas) -> Iterator[str]:
    """The sequences that each replica runs, in order; a dash where it takes no requests."""
    running = []
    for report in replicas.reports().values():
        number = 0 if report.statistics is None else report.statistics.num_running
        running.append(_count(number) if report.state == "ok" else "-")
    yield f"replicas {' '.join(running)}"


def _count(number: float) -> str:
    """A number with at most three significant digits: 7, 950, 12.3k."""
    if number < 10:
        return f"{number:.1f}".removesuffix(".0")
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


# --- statsd ---------------------------------------------------------------------------------------


async def _send_gauges(
    address: tuple[str, int] | None, generations: Generations, history: History
) -> None:
    if address is None:
        return
    try:
        found = await asyncio.get_running_loop().getaddrinfo(*address, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: this cannot be a host name
        log.warning("no statsd gauges: %s:%d: %s", *address, error)
        return
    family, kind, protocol, _, resolved = found[0]
    with socket.socket(family, kind, protocol) as sender:
        sender.setblocking(False)
        sent: tuple[Statistics | None, tuple[str, ...]] = None, ()
        while True:
            latest = generations.statistics, generations.stalled
            if latest[0] is not sent[0] or latest[1] != sent[1]:
                sent = latest
                for packet in statsd_packets(
                    chain(figures(generations), limit_figures(history.limit))
                ):
                    with contextlib.suppress(OSError):  # the daemon is away, or too slow
                        sender.sendto(packet, resolved)
            await asyncio.sleep(_GAUGES_EVERY_S)


def statsd_packets(found: Iterable[Figure]) -> Iterator[bytes]:
    """The figures as gauges, several lines in a packet."""
    packet = b""
    for figure in found:
        value = figure.value
        text = str(value) if isinstance(value, int) else f"{value:.6f}"
        name = ".".join((figure.name, *figure.labels.values()))
        line = f"tokasaurus.{name}:{text}|g".encode()
        if packet and len(packet) + 1 + len(line) > _PACKET_BYTES:
            yield packet
            packet = b""
        packet += b"\n" + line if packet else line
    if packet:
        yield packet
