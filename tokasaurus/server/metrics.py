"""The Prometheus metrics of one engine.

Requests are observed when they end, and the manager's figures are copied when Prometheus asks, so a
generated token costs nothing here. docs/operations.md says what each metric means.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tokasaurus.cartridges.store import CartridgeStore
from tokasaurus.text.generation import Generation
from tokasaurus.text.generations import Generations
from tokasaurus.text.limits import KINDS, Limit, kv_use
from tokasaurus.text.replicas import Replicas

__all__ = ["Figure", "Metrics", "figures", "limit_figures", "store_figures"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_NUM_ERRORS = 256  # of predictions, the latest
_FEWEST_ERRORS = 10
_SHORTEST_S = 0.1  # a prediction of less is as good as this

# The manager's figures: name after "tokasaurus_", field of Statistics, help.
_TOTALS = (
    ("computed_prompt_tokens", "num_prefill_tokens", "Prompt tokens computed"),
    ("cached_prompt_tokens", "num_cached_tokens", "Prompt tokens found in the prefix cache"),
    ("generated_tokens", "num_generated_tokens", "Tokens generated"),
    ("wasted_tokens", "num_wasted_tokens", "Tokens generated after their sequence had ended"),
    ("decode_tokens", "num_decode_tokens", "Rows of decoding, one for each token and sequence"),
    (
        "grouped_decode_tokens",
        "num_grouped_tokens",
        "Rows of decoding for which attention read a shared prefix once for a group",
    ),
    (
        "grouped_prompt_tokens",
        "num_grouped_prefill_tokens",
        "Prompt tokens computed for which attention read a shared prefix once for a group",
    ),
    ("batches", "num_batches", "Forward passes planned"),
    ("finished_sequences", "num_finished", "Sequences that ended, for whatever reason"),
    ("preemptions", "num_preemptions", "Times that a running sequence gave its pages back"),
    ("evicted_pages", "num_evicted_pages", "Pages that the prefix cache gave up"),
    ("queue_seconds", "queue_s", "Waiting of sequences before they ran first, summed"),
    ("device_seconds", "device_s", "Computing time of the device"),
    (
        "worker_wait_seconds",
        "waited_s",
        "Part of device_seconds in which the last stage waited for other workers: the bubble",
    ),
    ("active_seconds", "active_s", "Time with batches in flight"),
    ("forecasts", "num_forecasts", "Times that the use of pages was compared with its forecast"),
    ("forecast_pages_off", "num_forecast_pages_off", "Pages by which it differed, summed"),
    ("recompiles", "num_recompiles", "Graphs that torch.compile made after the warm-up"),
    ("cartridge_requests", "num_cartridge_requests", "Prompts behind cartridges"),
    ("cartridge_hits", "num_cartridge_hits", "Those whose cartridges were in the KV cache"),
    ("cartridge_loads", "num_cartridge_loads", "Times that cartridges were written to the cache"),
    ("cartridge_evictions", "num_cartridge_evictions", "Times that cartridges were evicted"),
)
_STATE = (
    ("running_sequences", "num_running", "Sequences that run"),
    ("waiting_sequences", "num_waiting", "Sequences that the manager holds and that do not run"),
    ("kv_pages", "num_pages", "Pages of the KV cache"),
    ("kv_free_pages", "num_free_pages", "Pages that hold nothing"),
    ("kv_cached_pages", "num_evictable_pages", "Pages that only the prefix cache holds"),
    ("batches_in_flight", "num_in_flight", "Forward passes planned and not answered"),
    ("seats", "num_seats", "Sequences that may run at once"),
    ("cartridge_pages", "num_cartridge_pages", "Pages that hold cartridges"),
    ("step_seconds", "step_s", "Time of a forward pass at present, a moving average"),
)


# Of each replica since it was started last, so these fall when it is started again.
_REPLICA_STATE = (
    ("running_sequences", "num_running", "Sequences that run in the replica"),
    ("waiting_sequences", "num_waiting", "Sequences that its manager holds and that do not run"),
    ("step_seconds", "step_s", "Time of its forward pass at present, a moving average"),
    ("generated_tokens", "num_generated_tokens", "Tokens generated since it was started"),
    ("cached_prompt_tokens", "num_cached_tokens", "Prompt tokens found in its prefix cache since"),
)


class Metrics:
    """The metrics of one engine. Watches its generations.

    Args:
        figures: gives the engine's figures at the moment.
        clock: seconds.
    """

    def __init__(
        self,
        figures: Callable[[], Iterable[Figure]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "tokasaurus_http_requests",
            "HTTP requests answered",
            ("path", "status"),
            registry=registry,
        )
        prompts = Counter(
            "tokasaurus_prompts", "Prompts that ended", ("outcome",), registry=registry
        )
        self._errors: deque[float] = deque(maxlen=_NUM_ERRORS)
        self._outcomes = {
            outcome: prompts.labels(outcome)
            for outcome in ("finished", "aborted", "refused", "failed")
        }
        self._first_token_s = Histogram(
            "tokasaurus_time_to_first_token_seconds",
            "From a prompt's arrival to its first token, where tokens are reported as they come",
            buckets=_SECONDS,
            registry=registry,
        )
        self._request_s = Histogram(
            "tokasaurus_prompt_seconds",
            "From a prompt's arrival to the end of its last sample",
            buckets=_SECONDS,
            registry=registry,
        )
        self._token_s = Histogram(
            "tokasaurus_time_per_output_token_seconds",
            "From the first token of a prompt to its end, divided by the further tokens of a"
            " sample",
            buckets=_SECONDS_PER_TOKEN,
            registry=registry,
        )
        registry.register(_Figures(figures))

    @property
    def eta_band(self) -> tuple[float, float] | None:
        """What most prompts took, as multiples of their first predictions: of ten, eight.

        None before enough prompts have ended of which a prediction was made.
        """
        if len(self._errors) < _FEWEST_ERRORS:
            return None
        ordered = sorted(self._errors)
        last = len(ordered) - 1
        return ordered[round(0.1 * last)], ordered[round(0.9 * last)]

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self._registry)

    # --- a Watcher of generations -----------------------------------------------------------------

    def started(self, generation: Generation) -> None:
        generation.started_at = self._clock()

    def began(self, generation: Generation) -> None:
        """Its first token has come."""
        generation.began_at = self._clock()

    def predicted(self, generation: Generation, seconds: float) -> None:
        generation.predicted = self._clock(), seconds

    def ended(self, generation: Generation, outcome: str) -> None:
        """The outcome is finished, aborted, refused by the manager or failed with the engine."""
        self._outcomes[outcome].inc()
        if outcome != "finished":
            return
        now = self._clock()
        self._request_s.observe(now - generation.started_at)
        if generation.predicted is not None:
            at, seconds = generation.predicted
            self._errors.append((now - at) / max(seconds, _SHORTEST_S))
        if generation.began_at is None:
            return
        self._first_token_s.observe(generation.began_at - generation.started_at)
        num_further = generation.num_generated_tokens / len(generation.samples) - 1
        if num_further > 0:
            self._token_s.observe((now - generation.began_at) / num_further)


@dataclass(frozen=True)
class Figure:
    """One number at one moment.

    Attributes:
        name: after "tokasaurus_".
        meaning: for people.
        value: at this moment.
        is_total: the value counts from the start of the engine.
        replica: that it is of; None for the engine.
        kind: which of several figures of this name it is; None if there is only one.
    """

    name: str
    meaning: str
    value: float
    is_total: bool = False
    replica: int | None = None
    kind: str | None = None

    @property
    def labels(self) -> dict[str, str]:
        """Those of Prometheus."""
        labels = {} if self.replica is None else {"replica": str(self.replica)}
        return labels if self.kind is None else {**labels, "kind": self.kind}


def figures(generations: Generations | None) -> Iterator[Figure]:
    """The manager's latest figures, and the server's own; few before the manager has sent any."""
    if generations is None:
        return
    meaning = "Processes that have work and make no progress"
    yield Figure("stalled_processes", meaning, len(generations.stalled))
    if generations.replicas is not None:
        yield from _replica_figures(generations.replicas)
    statistics = generations.statistics
    if statistics is None:
        return
    for name, field, meaning in _TOTALS:
        yield Figure(name, meaning, getattr(statistics, field), is_total=True)
    for name, field, meaning in _STATE:
        yield Figure(name, meaning, getattr(statistics, field))
    yield Figure("kv_use", "Share of the pages that sequences hold", kv_use(statistics))
    meaning = "Sequences that the server holds back, since the manager has enough"
    yield Figure("held_sequences", meaning, generations.num_held)
    yield Figure("prompts_in_flight", "Prompts that have not ended", len(generations))
    meaning = "1 while requests wait for a command: to resume, or to restore memory or weights"
    yield Figure("paused", meaning, int(statistics.paused))
    yield Figure("weights_version", "Updates of the weights", statistics.weights_version)
    backlog_s = generations.backlog_s
    if backlog_s is not None:
        meaning = "Predicted time until everything in flight has ended"
        yield Figure("backlog_seconds", meaning, backlog_s)


def limit_figures(limit: Limit | None) -> Iterator[Figure]:
    """What limits throughput: the sentence is in the help text, where it makes no new series."""
    if limit is None:
        return
    meaning = f"1 for what limits throughput. {limit.sentence}"
    for kind in KINDS:
        yield Figure("limit", meaning, int(kind == limit.kind), kind=kind)


def store_figures(store: CartridgeStore | None) -> Iterator[Figure]:
    """The bytes of cartridges on this machine."""
    if store is None:
        return
    meaning = "Bytes of the cartridges that are kept in the memory of the host"
    yield Figure("cartridge_host_bytes", meaning, store.num_host_bytes)
    meaning = "Bytes of the cartridges that the store has on its disk"
    yield Figure("cartridge_disk_bytes", meaning, store.num_disk_bytes)


def _replica_figures(replicas: Replicas) -> Iterator[Figure]:
    """What the router knows of each replica, and what lost ones have cost."""
    reports, losses = replicas.reports(), replicas.losses
    for name, value, meaning in (
        ("lost_replicas", losses.num_replicas, "Times that a replica ended"),
        ("moved_samples", losses.num_moved, "Samples of lost replicas that went on elsewhere"),
        ("begun_again_samples", losses.num_begun_again, "Those of them that had to begin again"),
        ("lost_tokens", losses.num_lost_tokens, "Tokens that lost replicas had not delivered"),
    ):
        yield Figure(name, meaning, value, is_total=True)
    for number, report in reports.items():
        meaning = "1 if the replica takes requests"
        yield Figure("replica_up", meaning, int(report.state == "ok"), replica=number)
    for number, report in reports.items():
        meaning = "Samples that the replica has"
        yield Figure("replica_samples", meaning, report.num_open, replica=number)
    for number, report in reports.items():
        meaning = "Tokens that these samples are expected to take, of prompts and answers"
        yield Figure("replica_expected_tokens", meaning, report.work, replica=number)
    for name, field, meaning in _REPLICA_STATE:
        for number, report in reports.items():
            value = 0 if report.statistics is None else getattr(report.statistics, field)
            yield Figure(f"replica_{name}", meaning, value, replica=number)
    for number, report in reports.items():
        used = 0.0 if report.statistics is None else kv_use(report.statistics)
        yield Figure(
            "replica_kv_use", "Share of its pages that sequences hold", used, False, number
        )


class _Figures(Collector):
    """Copies the figures when Prometheus asks."""

    def __init__(self, figures: Callable[[], Iterable[Figure]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        # The figures of one name follow one another.
        for name, same in itertools.groupby(self._figures(), key=lambda figure: figure.name):
            each = list(same)
            first = each[0]
            kind = CounterMetricFamily if first.is_total else GaugeMetricFamily
            family = kind(f"tokasaurus_{name}", first.meaning, labels=tuple(first.labels))
            for figure in each:
                family.add_metric(list(figure.labels.values()), figure.value)
            yield family
