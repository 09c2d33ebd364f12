"""What a replay counts, and its final report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokasaurus.errors import ConfigError, ProtocolError
from tokasaurus.manager.counters import Counters, Gauges
from tokasaurus.planner.pipeline import Span, busy_shares
from tokasaurus.planner.trace import TraceRequest
from tokasaurus.protocol.messages import RequestRejected, SequenceUpdates

__all__ = ["Moment", "Report", "SteadyPart", "Tally"]


@dataclass(frozen=True, slots=True)
class Moment:
    """The manager's state after a turn."""

    time_s: float
    used: float  # the share of the pages that sequences hold
    cached: float  # the share that only the prefix cache holds
    num_running: int
    num_queued: int
    num_tokens: int  # generated so far, without those behind the end of their sequence

    @staticmethod
    def of(time_s: float, gauges: Gauges, num_tokens: int) -> Moment:
        held = gauges.num_pages - gauges.num_free_pages - gauges.num_evictable_pages
        return Moment(
            time_s=time_s,
            used=held / gauges.num_pages,
            cached=gauges.num_evictable_pages / gauges.num_pages,
            num_running=gauges.num_prefilling + gauges.num_decoding,
            num_queued=gauges.num_queued + gauges.num_parked,
            num_tokens=num_tokens,
        )


@dataclass(frozen=True)
class SteadyPart:
    """What the device did in the second half of the time in which sequences waited for room.

    By then the first sequences have made way for others, and the last ones do not run alone yet.
    """

    start_s: float
    end_s: float
    tokens_per_s: float  # without those behind the end of their sequence
    stage_busy: tuple[float, ...]  # the share of the time in which each stage ran a batch

    @property
    def bubble(self) -> float:
        """The share of the time in which a stage had nothing to run: the mean over stages."""
        return 1 - sum(self.stage_busy) / len(self.stage_busy)


@dataclass(frozen=True)
class Report:
    """The outcome of a replay. Times are virtual."""

    num_requests: int
    num_sequences: int
    num_tokens: int  # generated and delivered
    makespan_s: float  # from the beginning to the last answer
    tokens_per_s: float  # delivered tokens over the makespan
    num_batches: int
    mean_batch_size: float  # drawn tokens per batch
    mean_cache_use: float  # the share of the pages that sequences hold, mean over time
    peak_cache_use: float
    device_idle: float  # the share of the makespan in which a stage waited for a batch
    num_preemptions: int
    num_prefill_tokens: int  # computed prompt tokens; those after a preemption count again
    num_cached_tokens: int  # prompt tokens that were found in the prefix cache
    num_wasted_tokens: int  # drawn after the end of their sequence
    # How far a forecast of the use of pages is from the next one: mean, as a share of all pages.
    forecast_error: float
    mean_latency_s: float  # of sequences, from arrival to their last token
    median_latency_s: float
    p99_latency_s: float
    steady: SteadyPart | None  # None if no sequence has waited
    timeline: tuple[Moment, ...]  # one for each turn of the manager


class Tally:
    """Follows every sequence of a trace. Columns are over sequences, in the order of the trace.

    Args:
        trace: the trace. The number of a request in it is the request's id.
    """

    def __init__(self, trace: Sequence[TraceRequest]) -> None:
        counts = np.array([len(request.output_tokens) for request in trace])
        self._first_rows = np.cumsum(counts) - counts
        self._num_requests = len(trace)
        self._arrivals = np.repeat([request.arrival_s for request in trace], counts)
        self._ends = np.full(len(self._arrivals), np.nan)
        self._may_be_cut = np.repeat([request.first_k > 0 for request in trace], counts)
        self.has_stop_strings = np.repeat([request.stop_strings for request in trace], counts)
        self.num_expected = np.concatenate([request.output_tokens for request in trace])
        self.num_received = np.zeros(len(self._arrivals), np.int64)
        self._spans: list[Sequence[Span]] = []  # of each batch
        self._num_drawn = 0
        self._timeline: list[Moment] = []

    def rows(self, updates: SequenceUpdates) -> NDArray[np.int64]:
        """The rows of the sequences of an update."""
        rows: NDArray[np.int64] = self._first_rows[updates.request_ids] + updates.sample_indices
        return rows

    def count_batch(self, num_drawn: int, spans: Sequence[Span]) -> None:
        """Counts a batch, the tokens that it drew, and when it was at which stage."""
        self._spans.append(spans)
        self._num_drawn += num_drawn

    def count_updates(self, updates: SequenceUpdates, at: float) -> None:
        """Counts an update. Raises ProtocolError if it names a sequence that has ended."""
        rows = self.rows(updates)
        if not np.isnan(self._ends[rows]).all():
            raise ProtocolError("a sequence is updated after its end")
        self.num_received[rows] += updates.num_tokens
        self._ends[rows[updates.finish_reasons != 0]] = at

    def refuse(self, message: RequestRejected) -> None:
        """Raises ConfigError, since the configuration does not suit the trace."""
        line = message.request_id + 1
        raise ConfigError(f"line {line} of the trace: the manager refuses it: {message.reason}")

    def observe(self, moment: Moment) -> None:
        self._timeline.append(moment)

    def report(self, counters: Counters, num_pages: int, waited_s: float) -> Report:
        """The outcome.

        Args:
            counters: of the manager.
            num_pages: of the KV cache.
            waited_s: how long stages had nothing to run.

        Raises:
            ProtocolError: a sequence has not ended, or has a wrong length.
        """
        self._check()
        makespan_s = float(self._ends.max())
        latencies = self._ends - self._arrivals
        num_tokens = int(np.minimum(self.num_received, self.num_expected).sum())
        return Report(
            num_requests=self._num_requests,
            num_sequences=len(self._ends),
            num_tokens=num_tokens,
            makespan_s=makespan_s,
            tokens_per_s=_ratio(num_tokens, makespan_s),
            num_batches=len(self._spans),
            mean_batch_size=_ratio(self._num_drawn, len(self._spans)),
            mean_cache_use=self._mean_cache_use(),
            peak_cache_use=max(moment.used for moment in self._timeline),
            device_idle=_ratio(waited_s, makespan_s),
            num_preemptions=counters.num_preemptions,
            num_prefill_tokens=counters.num_prefill_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_wasted_tokens=counters.num_wasted_tokens,
            forecast_error=_ratio(counters.num_forecast_pages_off, counters.num_forecasts)
            / num_pages,
            mean_latency_s=float(latencies.mean()),
            median_latency_s=float(np.median(latencies)),
            p99_latency_s=float(np.percentile(latencies, 99)),
            steady=self._steady(),
            timeline=tuple(self._timeline),
        )

    def _steady(self) -> SteadyPart | None:
        moments = [moment for moment in self._timeline if moment.num_queued]
        moments = [moment for moment in moments if moment.time_s >= moments[-1].time_s / 2]
        if not moments or moments[0].time_s == moments[-1].time_s:
            return None
        first, last = moments[0], moments[-1]
        return SteadyPart(
            start_s=first.time_s,
            end_s=last.time_s,
            tokens_per_s=(last.num_tokens - first.num_tokens) / (last.time_s - first.time_s),
            stage_busy=busy_shares(self._spans, first.time_s, last.time_s),
        )

    def _check(self) -> None:
        if np.isnan(self._ends).any():
            raise ProtocolError(f"{int(np.isnan(self._ends).sum())} sequences never ended")
        is_exact = self.num_received == self.num_expected
        # The server cuts tokens behind a stop string, and first_k may end a sample at any length.
        is_longer = self.has_stop_strings & (self.num_received > self.num_expected)
        wrong = np.flatnonzero(~(is_exact | is_longer | self._may_be_cut))
        if len(wrong):
            row = int(wrong[0])
            raise ProtocolError(
                f"sequence {row} of the trace has {self.num_expected[row]} tokens,"
                f" and {self.num_received[row]} came"
            )

    def _mean_cache_use(self) -> float:
        """The mean over time; each moment lasts until the next. Over moments if no time passed."""
        times = np.array([moment.time_s for moment in self._timeline])
        used = np.array([moment.used for moment in self._timeline])
        if times[-1] == times[0]:
            return float(used.mean())
        return float(np.average(used[:-1], weights=np.diff(times)))


def _ratio(count: float, over: float) -> float:
    return count / over if over else 0.0
