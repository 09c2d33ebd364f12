"""What a batch costs, by hand."""

from __future__ import annotations

import math

import pytest

from tokasaurus.errors import ConfigError
from tokasaurus.planner.cost_model import INSTANT, PRESETS, CostModel, cost_model, fixed

COST = CostModel(
    weight_bytes=100,
    flops_per_token=6,
    kv_bytes_per_token=3,
    bytes_per_s=10,
    flops_per_s=2,
    overhead_s=1,
    draw_s=0.5,
)


def test_a_small_batch_waits_for_the_weights():
    assert COST.batch_s(num_tokens=2, num_context_tokens=0, num_draws=0) == 1 + 100 / 10


def test_a_large_batch_waits_for_the_products():
    assert COST.batch_s(num_tokens=5, num_context_tokens=0, num_draws=0) == 1 + 5 * 6 / 2


def test_contexts_and_draws_come_on_top():
    assert COST.batch_s(1, 20, 4) == 1 + 10 + 20 * 3 / 10 + 4 * 0.5


def test_a_batch_of_differences_reads_no_weights():
    assert COST.batch_s(0, 0, 0) == 1


def test_a_fixed_step():
    assert fixed(0.003).batch_s(8192, 10**7, 4096) == 0.003
    assert INSTANT.batch_s(8192, 10**7, 4096) == 0


def test_costs_by_name():
    assert cost_model("fixed:0.25") == fixed(0.25)
    assert cost_model("llama-1b-h100") is PRESETS["llama-1b-h100"]


def test_presets_are_in_a_plausible_range():
    """Weights alone: 2.5 GB and 15 GB at 3 TB/s; a thousand contexts of 1,000 tokens cost more."""
    small, large = PRESETS["llama-1b-h100"], PRESETS["llama-8b-h100"]
    assert 0.8e-3 < small.batch_s(1, 1, 1) < 2e-3
    assert 4e-3 < large.batch_s(1, 1, 1) < 8e-3
    assert 10e-3 < small.batch_s(1024, 1024 * 1000, 1024) < 20e-3


@pytest.mark.parametrize("name", ["fast", "fixed", "fixed:", "fixed:-1", "fixed:nan", "fixed:inf"])
def test_a_wrong_name_is_told_the_right_ones(name):
    with pytest.raises(ConfigError, match=r"cost=.*instant"):
        cost_model(name)


def test_no_cost_is_negative_or_infinite():
    for name, cost in PRESETS.items():
        assert 0 <= cost.batch_s(10, 100, 10) < math.inf, name
