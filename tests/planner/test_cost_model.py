"""The cost of a batch, compared with sums by hand."""

from __future__ import annotations

import math
import re

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


def test_a_small_batch_is_bound_by_reading_weights():
    assert COST.batch_s(num_tokens=2, num_context_tokens=0, num_draws=0) == 1 + 100 / 10


def test_a_large_batch_is_bound_by_products():
    assert COST.batch_s(num_tokens=5, num_context_tokens=0, num_draws=0) == 1 + 5 * 6 / 2


def test_contexts_and_draws_are_added():
    assert COST.batch_s(1, 20, 4) == 1 + 10 + 20 * 3 / 10 + 4 * 0.5


def test_a_batch_without_tokens_reads_no_weights():
    assert COST.batch_s(0, 0, 0) == 1


def test_a_fixed_cost_does_not_depend_on_the_batch():
    assert fixed(0.003).batch_s(8192, 10**7, 4096) == 0.003
    assert INSTANT.batch_s(8192, 10**7, 4096) == 0


def test_costs_are_found_by_name():
    assert cost_model("fixed:0.25") == fixed(0.25)
    assert cost_model("llama-1b-h100") is PRESETS["llama-1b-h100"]


def test_presets_are_in_a_plausible_range():
    """Weights alone: 2.5 GB and 15 GB at 3 TB/s; a thousand contexts of 1,000 tokens cost more."""
    small, large = PRESETS["llama-1b-h100"], PRESETS["llama-8b-h100"]
    assert 0.8e-3 < small.batch_s(1, 1, 1) < 2e-3
    assert 4e-3 < large.batch_s(1, 1, 1) < 8e-3
    assert 10e-3 < small.batch_s(1024, 1024 * 1000, 1024) < 20e-3


def test_the_error_of_a_wrong_name_lists_the_right_ones():
    for name in ("fast", "fixed", "fixed:", "fixed:-1", "fixed:nan", "fixed:inf"):
        assert re.match(f"cost={name}: .*instant", error_of(name)), name


def error_of(name):
    try:
        return f"accepted: {cost_model(name)}"
    except ConfigError as error:
        return str(error)


def test_no_cost_is_negative_or_infinite():
    for name, cost in PRESETS.items():
        assert 0 <= cost.batch_s(10, 100, 10) < math.inf, name
