"""The numbers that the manager counts, for the line of statistics and for metrics."""

from __future__ import annotations

from dataclasses import dataclass

from tokasaurus.manager.kv.cartridges import Tally
from tokasaurus.protocol.messages import CartridgeState, Statistics

__all__ = ["Counters", "Gauges", "statistics"]


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    num_batches: int = 0
    num_prefill_tokens: int = 0  # prompt tokens computed
    num_decode_tokens: int = 0  # decode rows
    num_grouped_tokens: int = 0  # decode rows whose prefix the worker read once for a group
    num_grouped_prefill_tokens: int = 0  # the same for rows of chunks
    num_cached_tokens: int = 0  # prompt tokens that were not computed, at any admission
    num_generated_tokens: int = 0  # absorbed
    num_wasted_tokens: int = 0  # sampled after their sequence had ended
    num_requests: int = 0  # accepted
    num_rejected: int = 0
    num_finished: int = 0  # sequences, whatever the reason
    num_preemptions: int = 0
    num_forecasts: int = 0  # of the use of pages, that could be compared with the real use
    num_forecast_pages_off: int = 0  # the differences, summed
    queue_s: float = 0.0  # from arrival to first admission, summed over sequences
    device_s: float = 0.0  # as the worker reports it
    waited_s: float = 0.0  # of device_s, as the worker reports it
    num_recompiles: int = 0  # as the worker reports it
    # Batches, by what kept more sequences from running.
    num_full_batches: int = 0
    num_seat_bound_batches: int = 0
    num_page_bound_batches: int = 0
    active_s: float = 0.0  # with batches in flight


@dataclass(frozen=True, slots=True)
class Gauges:
    """The state of one moment."""

    num_requests: int  # that have not ended
    num_queued: int  # sequences in the queue
    num_parked: int  # followers, and those that wait for pages or acknowledgements
    num_prefilling: int
    num_decoding: int
    num_draining: int  # slots that wait for the result of their last batch
    num_in_flight: int  # batches
    num_pages: int
    num_free_pages: int
    num_evictable_pages: int  # cached, or of a cartridge, and without a user
    num_cartridge_pages: int
    num_evicted_pages: int  # since the start
    num_seats: int  # sequences that may run at once
    page_size: int  # tokens
    weights_version: int
    paused: bool  # by a Pause, or because memory is released or the weights are missing


def statistics(
    counters: Counters,
    gauges: Gauges,
    step_s: float,
    tally: Tally,
    cartridges: tuple[CartridgeState, ...],
) -> Statistics:
    """Counters and gauges as a message to the server."""
    return Statistics(
        num_batches=counters.num_batches,
        num_prefill_tokens=counters.num_prefill_tokens,
        num_decode_tokens=counters.num_decode_tokens,
        num_grouped_tokens=counters.num_grouped_tokens,
        num_cached_tokens=counters.num_cached_tokens,
        num_generated_tokens=counters.num_generated_tokens,
        num_wasted_tokens=counters.num_wasted_tokens,
        num_finished=counters.num_finished,
        num_preemptions=counters.num_preemptions,
        num_evicted_pages=gauges.num_evicted_pages,
        queue_s=counters.queue_s,
        device_s=counters.device_s,
        waited_s=counters.waited_s,
        num_waiting=gauges.num_queued + gauges.num_parked,
        num_running=gauges.num_prefilling + gauges.num_decoding,
        num_pages=gauges.num_pages,
        num_free_pages=gauges.num_free_pages,
        num_evictable_pages=gauges.num_evictable_pages,
        step_s=step_s,
        weights_version=gauges.weights_version,
        paused=gauges.paused,
        num_recompiles=counters.num_recompiles,
        num_grouped_prefill_tokens=counters.num_grouped_prefill_tokens,
        num_cartridge_requests=tally.num_requests,
        num_cartridge_hits=tally.num_hits,
        num_cartridge_loads=tally.num_loads,
        num_cartridge_evictions=tally.num_evictions,
        num_cartridge_pages=gauges.num_cartridge_pages,
        cartridges=cartridges,
        num_full_batches=counters.num_full_batches,
        num_seat_bound_batches=counters.num_seat_bound_batches,
        num_page_bound_batches=counters.num_page_bound_batches,
        active_s=counters.active_s,
        num_forecasts=counters.num_forecasts,
        num_forecast_pages_off=counters.num_forecast_pages_off,
        num_in_flight=gauges.num_in_flight,
        num_seats=gauges.num_seats,
        page_size=gauges.page_size,
    )
