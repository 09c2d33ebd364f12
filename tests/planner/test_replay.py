"""Replays: their virtual times match sums by hand, and each sequence gets its tokens."""

from __future__ import annotations

import pytest

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError, ProtocolError
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.cost_model import fixed
from tokasaurus.planner.replay import Replay, Timing, replay
from tokasaurus.planner.trace import TraceRequest
from tokasaurus.planner.workloads import WORKLOADS

_FLAGS = {
    "kv_cache_num_tokens": 4096,
    "scheduling_steps_ahead": 2,
    "max_seqs_per_forward": 64,
    "allocator_sanity_checks": True,
}


def manager_config(**flags):
    return simulated_slices(EngineConfig(**{**_FLAGS, **flags})).replicas[0].manager


def line(**changes):
    fields = {"arrival_s": 0.0, "prompt_tokens": 9, "output_tokens": (3,), "max_tokens": 100}
    return TraceRequest(**{**fields, **changes})


def test_one_request_takes_a_step_for_each_token():
    report = replay([line(arrival_s=5.0)], manager_config(), Timing(fixed(1.0)))
    assert report.makespan_s == 5 + 3
    assert report.mean_latency_s == 3
    assert report.num_tokens == 3
    # One batch was planned before the stop was known.
    assert report.num_wasted_tokens == report.num_batches - 3 == 1
    assert report.num_prefill_tokens == 9


def test_sequences_run_together():
    report = replay([line(), line(output_tokens=(5, 5))], manager_config(), Timing(fixed(1.0)))
    assert report.num_sequences == 3
    assert report.num_tokens == 13
    assert report.makespan_s <= 6  # a sample may wait one step for the prompt of its request
    assert report.peak_cache_use == 3 / 256


def test_the_device_waits_for_a_slow_manager():
    fast = replay([line()], manager_config(), Timing(fixed(1.0)))
    slow = replay([line()], manager_config(scheduling_steps_ahead=1), Timing(fixed(1.0), 1.0))
    assert fast.device_idle == 0
    assert slow.makespan_s == 2 * fast.makespan_s + 1  # the last result takes a turn too
    assert slow.device_idle == pytest.approx(3 / 7)


def test_a_shallow_look_ahead_lets_the_device_wait_and_a_deep_one_wastes_tokens():
    lengths, manager_s = range(10, 26), 0.25
    trace = [line(output_tokens=(length,)) for length in lengths]
    shallow, deep = (
        replay(trace, manager_config(scheduling_steps_ahead=depth), Timing(fixed(1.0), manager_s))
        for depth in (1, 8)
    )
    # Before every batch it waits for a turn of the manager, or only before the first one.
    assert shallow.device_idle * shallow.makespan_s == pytest.approx(
        manager_s * shallow.num_batches
    )
    assert deep.device_idle * deep.makespan_s == pytest.approx(manager_s)
    assert deep.makespan_s < shallow.makespan_s
    # Seven batches are planned between the one that draws a sequence's stop and its result.
    assert shallow.num_wasted_tokens == 0
    assert deep.num_wasted_tokens == 7 * len(lengths)


def test_a_sequence_with_a_stop_string_ends_after_the_server_has_searched():
    trace = [line(stop_strings=True, output_tokens=(7,))]
    report = replay(trace, manager_config(), Timing(fixed(1.0), server_s=0.5))
    assert report.num_tokens == 7
    assert report.num_batches > 7


def test_a_timeline_follows_the_use_of_the_cache():
    run = Replay([line(), line(arrival_s=50.0)], manager_config(), Timing(fixed(1.0)))
    while run.advance():
        pass
    report = run.report()
    times = [moment.time_s for moment in report.timeline]
    assert times == sorted(times)
    assert report.timeline[0].num_running == 1
    assert report.timeline[0].used == 1 / 256
    assert report.timeline[-1].used == 0
    assert report.mean_cache_use == pytest.approx((3 + 3) / 53 / 256, rel=0.2)


def test_a_report_before_the_end_is_refused():
    run = Replay([line()], manager_config(), Timing(fixed(1.0)))
    run.advance()
    with pytest.raises(ProtocolError, match="still has sequences"):
        run.report()


def test_the_error_of_a_request_that_never_fits_names_its_line():
    trace = [line(), line(prompt_tokens=4000)]
    with pytest.raises(ConfigError, match=r"line 2 of the trace.*4096"):
        replay(trace, manager_config(), Timing(fixed(1.0)))


@pytest.mark.parametrize("kind", WORKLOADS)
def test_every_sequence_gets_its_tokens_despite_preemptions(kind):
    """The report itself checks each length."""
    trace = WORKLOADS[kind](1, 0.01)
    config = manager_config(
        kv_cache_num_tokens=30_000, bump_city_population_me=True, allocator_sanity_checks=False
    )
    report = replay(trace, config, Timing(fixed(0.01)))
    assert report.num_sequences == sum(len(request.output_tokens) for request in trace)
    assert report.num_tokens == sum(sum(request.output_tokens) for request in trace)
    assert report.num_preemptions > 0


def test_the_same_trace_gives_the_same_run():
    trace, config = WORKLOADS["chat"](3, 0.01), manager_config(allocator_sanity_checks=False)
    first, second = (replay(trace, config, Timing(fixed(0.01))) for _ in range(2))
    assert first == second
