"""What limits throughput: each kind, by the real manager in virtual time."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tokasaurus.config.engine import EngineConfig
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.cost_model import CostModel, HostCosts, fixed
from tokasaurus.planner.curve import Curve
from tokasaurus.planner.pipeline import Stages
from tokasaurus.planner.replay import Replay, Timing
from tokasaurus.planner.trace import TraceRequest
from tokasaurus.protocol.commands import Command, Pause, PauseMode
from tokasaurus.protocol.messages import Statistics
from tokasaurus.text.limits import KINDS, find_limit
from tokasaurus.text.replica_answers import merged_statistics

DOCS = Path(__file__).parents[2] / "docs"


def request(num_samples: int = 1, prompt_tokens: int = 40, output_tokens: int = 400):
    return TraceRequest(
        arrival_s=0.0,
        prompt_tokens=prompt_tokens,
        output_tokens=(output_tokens,) * num_samples,
        max_tokens=output_tokens,
    )


def statistics_of(trace, timing=None, at=(100, 160), **flags) -> tuple[Statistics, Statistics]:
    """The manager's figures when it has planned this many batches, for each of two numbers."""
    flags = {"kv_cache_num_tokens": 1 << 20, "max_seqs_per_forward": 64, **flags}
    manager = simulated_slices(EngineConfig(**flags)).replicas[0].manager
    run = Replay(trace, manager, timing or Timing(fixed(0.01)))
    found = []
    for number in at:
        while run.statistics().num_batches < number:
            assert run.advance(), f"the trace ended before batch {number}"
        found.append(run.statistics())
    return found[0], found[1]


def test_too_few_requests():
    limit = find_limit(*statistics_of([request(12)]))
    assert limit.kind == "requests"
    assert "12 of 64 sequences run" in limit.sentence


def test_sequences_that_have_just_come_are_not_denied():
    """The batches of the last seconds had too few, and now some wait."""
    before, now = statistics_of([request(12)])
    limit = find_limit(before, now, num_held=30)
    assert limit.kind == "requests"
    assert "12 of 64 sequences run and 30 have just come" in limit.sentence


def test_a_full_kv_cache_names_the_size_that_all_that_could_run_need():
    trace = [request(100)]
    before, now = statistics_of(trace, kv_cache_num_tokens=8192)
    limit = find_limit(before, now)
    assert limit.kind == "kv_cache"
    assert limit.flag == "kv_cache_num_tokens"
    assert f"from 8192 to {limit.value}" in limit.sentence
    # With that size, seats are the limit.
    assert find_limit(*statistics_of(trace, kv_cache_num_tokens=limit.value)).kind == "seats"


def test_all_seats_taken_names_a_number_that_is_enough():
    trace = [request(100)]
    limit = find_limit(*statistics_of(trace))
    assert (limit.kind, limit.flag) == ("seats", "max_seqs_per_forward")
    assert "max_seqs_per_forward=64 reached: 36 sequences wait" in limit.sentence
    more = statistics_of(trace, max_seqs_per_forward=limit.value)
    assert find_limit(*more).kind == "requests"


def test_seats_are_not_the_only_limit_where_the_cache_is_full_too():
    before, now = statistics_of([request(100)])
    now = msgspec.structs.replace(now, num_free_pages=now.num_pages // 100, num_evictable_pages=0)
    limit = find_limit(before, now)
    assert limit.value is None
    assert "together with kv_cache_num_tokens" in limit.sentence


def test_batches_full_of_prompts_are_the_device():
    trace = [request(prompt_tokens=4000, output_tokens=2) for _ in range(100)]
    limit = find_limit(*statistics_of(trace, at=(20, 60), max_tokens_per_forward=512))
    assert limit.kind == "device"
    assert "100% of them prompts" in limit.sentence


def test_a_device_that_waits_for_the_manager():
    slow = Timing(fixed(0.01), manager_s=0.01)
    trace = [request(100)]
    limit = find_limit(*statistics_of(trace, slow, scheduling_steps_ahead=1))
    assert limit.kind == "host"
    assert "computes 50% of the time" in limit.sentence
    # The remedy helps: turns of the manager and batches overlap.
    assert find_limit(*statistics_of(trace, slow, scheduling_steps_ahead=4)).kind == "seats"


def test_room_for_twice_as_many_counts_for_more_than_a_device_that_waits_now_and_then():
    trace, timing = [request(200)], Timing(fixed(0.01), manager_s=0.005)
    found = statistics_of(trace, timing, scheduling_steps_ahead=1, max_seqs_per_forward=150)
    assert find_limit(*found).kind == "host"
    found = statistics_of(trace, timing, scheduling_steps_ahead=1, kv_cache_num_tokens=4096)
    assert find_limit(*found).kind == "kv_cache"
    slow = Timing(fixed(0.01), manager_s=0.02)
    found = statistics_of(trace, slow, scheduling_steps_ahead=1, kv_cache_num_tokens=4096)
    assert find_limit(*found).kind == "host"


def test_few_sequences_are_too_few_requests_though_the_device_waits():
    slow = Timing(fixed(0.01), manager_s=0.01)
    limit = find_limit(*statistics_of([request(3)], slow, scheduling_steps_ahead=1))
    assert limit.kind == "requests"


def test_a_server_without_a_moment_of_rest():
    before, now = statistics_of([request(12)])
    assert find_limit(before, now, server_busy=0.95).flag == "server_processes"
    assert find_limit(before, now, server_busy=0.5).kind == "requests"
    # It is not the server's fault where sequences wait in the manager.
    assert find_limit(*statistics_of([request(100)]), server_busy=0.95).kind == "seats"


def test_stages_that_wait_for_others():
    before, now = statistics_of([request(100)])
    waited_s = before.waited_s + 0.5 * (now.device_s - before.device_s)
    limit = find_limit(before, msgspec.structs.replace(now, waited_s=waited_s))
    assert limit.kind == "stages"
    assert "waits 50% of its time" in limit.sentence


def test_an_engine_without_requests_is_idle_and_a_paused_one_is_paused():
    manager = simulated_slices(EngineConfig(kv_cache_num_tokens=4096)).replicas[0].manager
    run = Replay([request(output_tokens=5)], manager, Timing(fixed(1.0)))
    before = run.statistics()
    while run.advance():
        pass
    assert find_limit(before, run.statistics()).kind == "idle"
    run.post(7.0, Command(1, Pause(PauseMode.KEEP)))
    while run.advance():
        pass
    assert find_limit(before, run.statistics()).kind == "paused"


def test_sequences_that_the_server_holds_back_count_as_waiting():
    before, now = statistics_of([request(100)])
    limit = find_limit(before, now, num_held=1000)
    assert "1036 sequences wait" in limit.sentence


def test_what_kept_sequences_waiting_is_over_when_none_waits():
    before, now = statistics_of([request(100)])
    now = msgspec.structs.replace(now, num_waiting=0, num_running=3)
    assert find_limit(before, now).kind == "requests"


def test_replicas_are_judged_together_and_values_are_those_of_one():
    before, now = statistics_of([request(100)])
    both = find_limit(merged_statistics([before] * 2), merged_statistics([now] * 2))
    assert both.value == find_limit(before, now).value
    assert "max_seqs_per_forward=64 reached: 72 sequences wait" in both.sentence


def test_a_pipeline_without_bubbles_is_not_limited_by_its_stages():
    cost = CostModel(host=HostCosts(batch_s=0.001), layers=Curve.roofline(0.0, 1e-5))
    found = statistics_of(
        [request(100)], Timing(cost, stages=Stages((0.5, 0.5))), at=(300, 500), pp_size=2
    )
    assert find_limit(*found).kind == "seats"


def test_the_documentation_explains_every_kind():
    page = (DOCS / "page.md").read_text()
    assert [kind for kind in KINDS if f"| `{kind}` |" not in page] == []
