"""Stages of a simulated device: their times match sums by hand, and lanes keep them busy."""

from __future__ import annotations

import functools
import math

import pytest
from batches_by_hand import NEVER, Entering, Fed, batch_of

from tokasaurus.config.engine import EngineConfig
from tokasaurus.errors import ConfigError
from tokasaurus.planner.configuration import simulated_slices
from tokasaurus.planner.cost_model import fixed
from tokasaurus.planner.named_costs import PRESETS
from tokasaurus.planner.pipeline import SimulatedPipeline, Span, Stages, busy_shares
from tokasaurus.planner.replay import Timing, replay
from tokasaurus.planner.report import Report
from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.planner.trace import TraceRequest
from tokasaurus.planner.workloads import WORKLOADS
from tokasaurus.protocol.commands import Control, UpdateWeights


class ByHand:
    """Batches written by hand on a pipeline that takes ``seconds`` for each."""

    def __init__(self, stages: Stages, seconds: float = 4.0) -> None:
        device = SimulatedDevice(fixed(seconds), NEVER, num_slots=16, page_size=16)
        self.pipeline = SimulatedPipeline(device, stages, 16)
        self.number = 0

    def run(self, sent_at: float = 0.0, **batch: object) -> list[tuple[float, float]]:
        spans = self.pipeline.run(batch_of(self.number, **batch), sent_at)[1]
        self.number += 1
        return [tuple(span) for span in spans]


def prompt_of(slot: int) -> dict[str, object]:
    return {"entering": [Entering(slot)], "fed": [Fed(slot, 0, 3, (slot,))]}


# --- clocks --------------------------------------------------------------------------------------


def test_batches_follow_one_another_through_the_stages():
    pipeline = ByHand(Stages.equal(4))
    assert pipeline.run(**prompt_of(0)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert pipeline.run(**prompt_of(1)) == [(1, 2), (2, 3), (3, 4), (4, 5)]
    # A batch that comes late finds the stages free.
    assert pipeline.run(sent_at=7, **prompt_of(2)) == [(7, 8), (8, 9), (9, 10), (10, 11)]
    # Each stage waited from 2, 3, 4 and 5 on; and all but the first for the first batch.
    assert pipeline.pipeline.waited_s == (5 + 6 + 7 + 8) / 4


def test_the_first_stage_waits_for_the_tokens_of_its_rows_and_for_no_others():
    pipeline = ByHand(Stages.equal(4, hop_s=0.25))
    assert pipeline.run(**prompt_of(0))[-1] == (3.75, 4.75)
    assert pipeline.run(**prompt_of(1))[0] == (1, 2)
    # Slot 0 drew its token in batch 0, whose ids are back at 5.
    assert pipeline.run(decode=[0])[0] == (5, 6)
    assert pipeline.run(decode=[1])[0] == (6, 7)  # they came back at 6
    assert pipeline.run(decode=[0, 1])[0] == (11, 12)  # 1 drew in the batch that ended at 10.75
    assert pipeline.run(sent_at=30, decode=[0])[0] == (30, 31)


def test_the_slowest_stage_sets_the_pace():
    pipeline = ByHand(Stages.of([1, 2, 1]))
    ends = [pipeline.run(**prompt_of(slot))[-1][1] for slot in range(4)]
    assert ends == [4, 6, 8, 10]


def test_one_stage_never_waits_for_tokens():
    pipeline = ByHand(Stages.equal(1, hop_s=3.0))
    assert pipeline.run(**prompt_of(0)) == [(0, 4)]
    assert pipeline.run(decode=[0]) == [(4, 8)]


def test_a_result_says_how_long_the_last_stage_took():
    device = SimulatedDevice(fixed(4.0), NEVER, num_slots=16, page_size=16)
    pipeline = SimulatedPipeline(device, Stages.of([3, 1]), 16)
    assert pipeline.run(batch_of(0, **prompt_of(0)), 0.0)[0].device_s == 1


def test_controls_are_carried_out_behind_the_batches_before_them():
    pipeline = ByHand(Stages.equal(2))
    pipeline.run(**prompt_of(0))
    done, at = pipeline.pipeline.carry_out(Control(1, UpdateWeights(1, ("a",))), 1.0)
    assert (done.number, at) == (1, 4)


def test_the_busy_share_of_a_time():
    spans = [[Span(0, 2), Span(2, 3)], [Span(2, 4), Span(4, 5)]]
    assert busy_shares(spans, 0, 5) == (0.8, 0.4)
    assert busy_shares(spans, 1, 3) == (1.0, 0.5)


def test_costs_that_are_no_times_are_refused():
    for costs in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(ConfigError, match="at least 0"):
            Stages.of(costs)
    with pytest.raises(ConfigError, match="at least 0"):
        Stages.equal(2, hop_s=-1.0)


# --- how busy lanes keep them --------------------------------------------------------------------


# One prompt, and twice as many samples as there are seats.
SAMPLES = [
    TraceRequest(
        arrival_s=0.0,
        prompt_tokens=200,
        output_tokens=tuple(50 + 37 * i % 100 for i in range(1200)),
        max_tokens=200,
    )
]


@functools.cache
def steady_load(
    pp_size: int,
    stages: Stages | None = None,
    buffer_stages: int = 1,
    workload: str = "chat",
    size: float = 0.2,
) -> Report:
    """Many requests of mixed lengths on a model of 8 billion parameters."""
    config = EngineConfig.from_flags(
        kv_cache_num_tokens=pp_size * 24576,
        max_seqs_per_forward=pp_size * 96,
        scheduling_steps_ahead=3,
        pp_size=pp_size,
        pp_num_buffer_stages=buffer_stages,
    )
    timing = Timing(PRESETS["llama-8b-h100"], stages=stages or Stages.equal(pp_size))
    trace = SAMPLES if workload == "samples" else WORKLOADS[workload](0, size)
    return replay(trace, simulated_slices(config).replicas[0].manager, timing)


def bubble(report: Report) -> float:
    assert report.steady is not None
    return report.steady.bubble


def test_four_equal_stages_are_busy_95_percent_of_the_time():
    report = steady_load(4)
    assert bubble(report) < 0.02
    # Even without a lane more than stages.
    assert bubble(steady_load(4, buffer_stages=0)) < 0.05


def test_throughput_grows_with_the_stages():
    alone = steady_load(1)
    four = steady_load(4)
    assert alone.steady is not None
    assert four.steady is not None
    assert four.steady.tokens_per_s > 3.4 * alone.steady.tokens_per_s


def test_a_buffer_stage_hides_the_way_of_the_tokens():
    """A hop takes a sixth of a stage's time, and there are four between two rows of a sequence."""
    stages = Stages.equal(4, hop_s=400e-6)
    bubbles = [bubble(steady_load(4, stages, count)) for count in (0, 1)]
    assert bubbles[0] > 0.1
    assert bubbles[1] < 0.05


def test_the_slowest_of_uneven_stages_is_always_busy():
    report = steady_load(4, Stages.of([1.0, 1.0, 1.0, 1.5]))
    assert report.steady is not None
    assert report.steady.stage_busy[3] > 0.98
    assert report.steady.stage_busy[0] == pytest.approx(1 / 1.5, abs=0.02)


def test_samples_of_one_prompt_keep_all_stages_busy():
    assert bubble(steady_load(4, workload="samples")) < 0.02


def test_a_single_request_takes_the_time_of_all_stages_for_each_token():
    trace = WORKLOADS["chat"](0, 1 / 4000)
    assert len(trace) == 1
    seconds = []
    for pp_size in (1, 4):
        config = EngineConfig.from_flags(
            kv_cache_num_tokens=4096, scheduling_steps_ahead=2, pp_size=pp_size
        )
        timing = Timing(fixed(1.0), stages=Stages.equal(pp_size))
        report = replay(trace, simulated_slices(config).replicas[0].manager, timing)
        seconds.append(report.makespan_s)
    num_chunks = math.ceil(trace[0].prompt_tokens / 16)  # each a quarter of a second later
    assert seconds[0] == pytest.approx(trace[0].arrival_s + trace[0].output_tokens[0])
    assert seconds[1] <= seconds[0] + num_chunks / 4


def test_the_same_run_gives_the_same_times():
    first, second = (steady_load.__wrapped__(3, size=0.05) for _ in range(2))
    assert first.makespan_s == second.makespan_s
    assert first.steady == second.steady
