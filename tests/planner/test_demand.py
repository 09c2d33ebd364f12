"""Demands: shapes as traces, what they add up to, and their parts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tokasaurus.errors import ConfigError
from tokasaurus.planner.demand import Demand, demand_of_shape, is_shape
from tokasaurus.planner.trace import TraceRequest
from tokasaurus.planner.workloads import WORKLOADS


def test_a_shape_without_spread_has_equal_requests():
    demand = demand_of_shape("prompt=1024,output=256,n=8,requests=5,prefix=100")
    assert demand.num_requests == 5
    assert demand.num_sequences == 40
    assert demand.num_prompt_tokens == 5 * 1024
    assert demand.num_output_tokens == 40 * 256
    assert demand.longest == 1024 + 256
    assert demand.arrives_at_once
    assert {(each.prefix_id, each.prefix_tokens) for each in demand.trace} == {(0, 100)}


def test_spread_outputs_have_the_mean_that_was_asked_and_a_higher_limit():
    demand = demand_of_shape("prompt=10,output=200,n=100,requests=100,spread=0.5")
    lengths = np.concatenate([each.output_tokens for each in demand.trace])
    assert lengths.mean() == pytest.approx(200, rel=0.03)
    assert lengths.std() == pytest.approx(200 * np.sqrt(np.exp(0.25) - 1), rel=0.1)
    assert {each.max_tokens for each in demand.trace} == {800}
    assert demand.trace == demand_of_shape(demand.source).trace
    assert demand.trace != demand_of_shape(demand.source, seed=1).trace


def test_a_rate_spreads_arrivals():
    demand = demand_of_shape("prompt=10,output=5,requests=1000,rate=50")
    arrivals = [each.arrival_s for each in demand.trace]
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(1000 / 50, rel=0.15)
    assert not demand.arrives_at_once


def test_a_file_is_not_taken_for_a_shape():
    assert is_shape("prompt=1,output=2")
    assert not is_shape("traces/chat.jsonl")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("promt=8,output=8", "'promt' is not a part of a shape; the nearest is 'prompt'"),
        ("colour=8", "'colour' is not a part of a shape; the parts are prompt, output, n, "),
        ("prompt=8", "a shape needs output"),
        ("prompt=8,output=x", "output must be a whole number of at least 1, not 'x'"),
        ("prompt=0,output=8", "prompt must be a whole number of at least 1, not '0'"),
        ("prompt=8,output=8,rate=inf", "rate must be a number of at least 0, not 'inf'"),
        ("prompt=8,output=8,rate=-1", "rate must be a number of at least 0, not '-1'"),
        (f"prompt=8,output={1 << 63}", "output may be at most 2147483647"),
        ("prompt=8,output=8,spread=1e200", "spread may be at most 10"),
        ("prompt=8,output=8,output=9", "output is there twice"),
        ("prompt=8,output=8,prefix=9", "prefix may be at most prompt"),
        ("prompt=8,output=8,max=7", "output may be at most max"),
        ("prompt=8,output=8,n=4001,requests=1000", "4,001,000 samples, and a shape may have"),
    ],
)
def test_errors_of_a_shape_name_the_part(shape, words):
    with pytest.raises(ConfigError) as caught:
        demand_of_shape(shape)
    assert str(caught.value).startswith(f"workload={shape}")
    assert words in str(caught.value)


def samples_of(demands):
    return sorted(
        itertools.chain.from_iterable(
            [(each.prompt_tokens, length) for length in each.output_tokens]
            for demand in demands
            for each in demand.trace
        )
    )


def test_dealing_keeps_every_sample_and_evens_loads():
    for name, make in WORKLOADS.items():
        demand = Demand(make(0, 0.2), name)
        for count, seats in ((1, 64), (3, 64), (8, 512)):
            parts = demand.dealt(count, seats)
            assert samples_of(parts) == samples_of([demand]), name
            if name != "sampling" or seats == 64:  # the samples of a request stay together
                loads = [part.num_prompt_tokens + part.num_output_tokens for part in parts]
                assert max(loads) < 1.2 * sum(loads) / len(loads), (name, count)


def test_samples_that_exceed_the_seats_of_a_replica_go_to_several():
    one = Demand(
        [TraceRequest(arrival_s=0, prompt_tokens=9, output_tokens=(5,) * 100, max_tokens=9)], "x"
    )
    assert [len(part.trace[0].output_tokens) for part in one.dealt(4, 32)] == [25] * 4
    assert len(one.dealt(4, 100)) == 1


def test_the_first_part_has_whole_requests_unless_the_first_is_too_large():
    demand = demand_of_shape("prompt=10,output=5,n=8,requests=10")
    assert demand.first(80) is demand
    assert demand.first(1000) is demand
    assert demand.first(31).num_requests == 3
    assert demand.first(5).num_sequences == 5
    first_k = Demand(
        [
            TraceRequest(
                arrival_s=0, prompt_tokens=9, output_tokens=(5,) * 8, max_tokens=9, first_k=6
            )
        ],
        "x",
    )
    assert first_k.first(3).trace[0].first_k == 3


def test_an_empty_demand_is_refused():
    with pytest.raises(ConfigError, match=r"workload=x has no requests"):
        Demand([], "x")
