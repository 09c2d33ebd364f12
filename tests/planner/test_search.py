"""Searches: bounds bound, parts stand for the whole, and nothing much better is overlooked."""

from __future__ import annotations

import itertools
import math

import pytest
from described_models import LLAMA_1B, LLAMA_8B, describe

from tokasaurus.model.facts import model_facts
from tokasaurus.planner.bound import Means, bound
from tokasaurus.planner.candidates import Layout, Question, candidate
from tokasaurus.planner.cost_model import BatchWork, fixed
from tokasaurus.planner.demand import Demand, demand_of_shape
from tokasaurus.planner.device_costs import device_cost
from tokasaurus.planner.devices import find_device
from tokasaurus.planner.explanation import why_slower
from tokasaurus.planner.pipeline import ONE_STAGE
from tokasaurus.planner.replay import Timing
from tokasaurus.planner.search import Search
from tokasaurus.planner.simulation import simulate
from tokasaurus.planner.trace import TraceRequest

SAMPLING = "prompt=600,output=60,n=16,requests=30,spread=0.4"
SINGLE = "prompt=300,output=50,requests=400,spread=0.6,prefix=100"


@pytest.fixture
def question(tmp_path):
    def make(model=LLAMA_8B, device="l4", count=1, **changes):
        facts = model_facts(describe(tmp_path, model))
        return Question(facts, find_device(device), count, **changes)

    return make


def simulated(asked, layout, demand, **flags):
    found = candidate(asked, layout, **flags)
    cost, stages = device_cost(asked, found)
    limit = bound(Means.of(demand).dealt(layout.dp_size), found.manager, cost, stages)
    return limit, simulate(found, demand, Timing(cost, stages=stages), math.inf)


def test_means_are_those_of_the_sequences():
    demand = Demand(
        [
            TraceRequest(arrival_s=0, prompt_tokens=100, output_tokens=(10, 30), max_tokens=40),
            TraceRequest(arrival_s=0, prompt_tokens=40, output_tokens=(20,), max_tokens=40),
        ],
        "x",
    )
    means = Means.of(demand)
    assert means.num_sequences == 3
    assert means.output == 20
    assert means.longest == 30
    assert means.computed == 140 / 3
    assert means.prompt == (40 * 100 + 20 * 40) / 60  # of all tokens that are generated
    assert means.age == (10**2 + 30**2 + 20**2) / 2 / 60
    assert means.samples == (2 * 2 + 1) / 3
    assert means.dealt(2).num_sequences == 2


def test_a_bound_with_a_fixed_cost_is_a_step_for_a_token_of_each(question):
    demand = demand_of_shape("prompt=64,output=50,requests=1000")
    found = candidate(question(), Layout(1, 1, 1), max_seqs_per_forward=32)
    limit = bound(Means.of(demand), found.manager, fixed(0.01), ONE_STAGE)
    assert (limit.num_running, limit.limit) == (32, "seats")
    assert limit.tokens_per_s == 32 / 0.01
    assert limit.seconds == pytest.approx(1000 * 50 * 0.01 / 32)
    few = bound(
        Means.of(demand_of_shape("prompt=64,output=50")), found.manager, fixed(0.01), ONE_STAGE
    )
    assert (few.limit, few.seconds) == ("the workload", pytest.approx(50 * 0.01))


def test_what_limits_the_sequences_that_run(question):
    demand = demand_of_shape("prompt=1000,output=100,requests=5000")
    for flags, limit in (
        ({"kv_cache_num_tokens": 16384, "max_seqs_per_forward": 64}, "pages"),
        ({"max_seqs_per_forward": 8}, "seats"),
        ({"max_tokens_per_forward": 64, "max_seqs_per_forward": 64}, "tokens of a batch"),
    ):
        manager = candidate(question(flags=flags), Layout(1, 1, 1)).manager
        found = bound(Means.of(demand), manager, fixed(0.01), ONE_STAGE)
        assert found.limit == limit, flags
    # 16,384 tokens hold so many prompts, each with half an answer and half a page.
    manager = candidate(question(flags={"kv_cache_num_tokens": 16384}), Layout(1, 1, 1)).manager
    found = bound(Means.of(demand), manager, fixed(0.01), ONE_STAGE)
    assert found.num_running == pytest.approx(16384 / (1000 + 50 + 8))


@pytest.mark.parametrize(
    ("shape", "num_running"),
    [
        ("prompt=1000,output=100,requests=5000,prefix=800", (16384 - 800) / (200 + 50 + 8)),
        ("prompt=1000,output=100,requests=500,n=4", 16384 / (250 + 50 + 8)),
        # A single request holds its whole prompt, however few of its samples run.
        ("prompt=1000,output=100,n=1000", (16384 - 1000) / (50 + 8)),
    ],
)
def test_pages_hold_what_is_shared_once(question, shape, num_running):
    means = Means.of(demand_of_shape(shape))
    manager = candidate(question(flags={"kv_cache_num_tokens": 16384}), Layout(1, 1, 1)).manager
    found = bound(means, manager, fixed(0.01), ONE_STAGE)
    assert (found.limit, found.num_running) == ("pages", pytest.approx(num_running))


def test_simulations_come_near_their_bounds_and_hardly_beat_them(question):
    cells = itertools.product(
        (SAMPLING, SINGLE), (Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2)), (32, 96)
    )
    for shape, layout, seqs in cells:
        demand = demand_of_shape(shape)
        limit, found = simulated(
            question(count=2),
            layout,
            demand,
            max_seqs_per_forward=seqs,
            max_tokens_per_forward=2048,
        )
        ratio = found.seconds / limit.seconds
        assert 0.97 < ratio < 2, (shape, str(layout), seqs, ratio)


def test_a_part_of_a_demand_tells_the_time_of_the_whole(question):
    for shape in (
        "prompt=200,output=30,requests=1500,spread=0.5",
        "prompt=300,output=20,n=16,requests=90",
    ):
        demand = demand_of_shape(shape)
        found = candidate(question(), Layout(1, 1, 1), max_seqs_per_forward=32)
        cost, stages = device_cost(question(), found)
        part = simulate(found, demand, Timing(cost, stages=stages), math.inf)
        assert part.share < 0.15
        whole = simulate(
            candidate(question(), Layout(1, 1, 1), max_seqs_per_forward=32),
            demand,
            Timing(cost, stages=stages),
            math.inf,
            whole=True,
        )
        assert whole.share == 1
        assert part.seconds == pytest.approx(whole.seconds, rel=0.05), shape


def test_a_search_finds_what_a_simulation_of_every_configuration_finds(question):
    """The oracle simulates the whole grid of all layouts."""
    asked = question(count=2)
    demand = demand_of_shape("prompt=300,output=30,requests=300,spread=0.6,prefix=100")
    plan = Search(asked, demand, max_simulations=6, max_s=1000, manager_s=0).run()
    times = {}
    for layout in (Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2)):
        for seqs, tokens in itertools.product((32, 64, 128), (2048,)):
            flags = {"max_seqs_per_forward": seqs, "max_tokens_per_forward": tokens}
            times[layout, seqs, tokens] = simulated(asked, layout, demand, **flags)[1].seconds
    assert plan.best.seconds < 1.03 * min(times.values())
    assert plan.best.seconds < 0.8 * max(times.values())  # so there was something to find
    assert [each.seconds for each in plan.outcomes if each.simulated][1:] == sorted(
        each.seconds for each in plan.outcomes[1:] if each.simulated
    )


def test_a_search_climbs_from_the_best_bound_to_what_is_faster(question):
    asked = question(LLAMA_1B, "a10g", flags={"page_size": 16})
    demand = demand_of_shape("prompt=200,output=24,n=8,requests=100")
    bounds_alone = Search(asked, demand, 1, 1000).run().best
    best = Search(asked, demand, 6, 1000).run().best
    seats = [each.candidate.manager.max_seqs_per_forward for each in (bounds_alone, best)]
    assert seats[0] < seats[1]
    assert best.seconds < 0.97 * bounds_alone.seconds


def test_devices_that_share_layers_halve_their_time_and_exchange(question):
    asked = question(count=2)
    work = BatchWork(num_decodes=8, num_decode_positions=8000, num_draws=8)
    one, two = (
        device_cost(asked, candidate(asked, layout, max_tokens_per_forward=2048))[0].parts(work)
        for layout in (Layout(2, 1, 1), Layout(1, 2, 1))
    )
    assert two.layers_s == pytest.approx(one.layers_s / 2)
    assert two.attention_s == pytest.approx(one.attention_s / 2)
    assert (one.exchange_s, one.host_s) == (0, two.host_s)
    # 65 all-reduces of 30 microseconds, and 8 rows of 4,096 numbers through a link of PCIe.
    assert two.exchange_s == pytest.approx(65 * (30e-6 + 8 * 4096 * 2 / 25.6e9))
    cost, stages = device_cost(asked, candidate(asked, Layout(1, 1, 2), max_seqs_per_forward=24))
    assert sum(cost.parts(work)) == pytest.approx(sum(one))
    assert stages.shares == (0.5, 0.5)
    assert stages.hop_s == pytest.approx(30e-6 + 24 / 3 * 4096 * 2 / 25.6e9)


def test_a_search_gives_the_same_plan_again_and_explains_every_loss(question):
    demand = demand_of_shape(SAMPLING)
    plans = [Search(question(count=2), demand, 5, 1000).run() for _ in range(2)]
    lines = [
        [
            (each.candidate.words, each.seconds, why_slower(each, plan.best))
            for each in plan.outcomes
        ]
        for plan in plans
    ]
    assert lines[0] == lines[1]
    assert lines[0][0][2] == ""
    assert all(why for _, _, why in lines[0][1:])
    assert sum(each.is_default for each in plans[0].outcomes) == 1


def test_time_that_runs_out_leaves_bounds(question):
    plan = Search(question(), demand_of_shape(SINGLE), max_s=0).run()
    assert plan.ran_out
    assert all(each.simulated is None for each in plan.outcomes)
    assert plan.best.seconds == min(each.seconds for each in plan.outcomes)


def test_decided_limits_are_not_searched(question):
    flags = {"max_seqs_per_forward": 48, "kv_cache_num_tokens": 8192}
    plan = Search(question(LLAMA_1B, "h100", flags=flags), demand_of_shape(SINGLE), 4, 1000).run()
    assert {each.candidate.manager.max_seqs_per_forward for each in plan.outcomes} == {48}
    assert {each.candidate.kv_tokens for each in plan.outcomes} == {8192}
    assert not any(each.is_default for each in plan.outcomes)
