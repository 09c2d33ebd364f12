"""The cost of a batch, compared with sums by hand and with attention counted row by row."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from batches_by_hand import int32

from tokasaurus.errors import ConfigError
from tokasaurus.planner.cost_file import CostFile, read_cost, write_cost
from tokasaurus.planner.cost_model import (
    INSTANT,
    AttentionCosts,
    BatchWork,
    CostModel,
    DrawCosts,
    ExchangeCosts,
    GroupWork,
    HostCosts,
    fixed,
)
from tokasaurus.planner.curve import Curve
from tokasaurus.planner.estimate import Gpu, ModelShape, estimate
from tokasaurus.planner.named_costs import PRESETS, cost_model
from tokasaurus.protocol.messages import Adjustments, Sampling

COST = CostModel(
    host=HostCosts(batch_s=1, sequence_s=0.25),
    layers=Curve.roofline(least_s=10, each_s=3),
    exchange=ExchangeCosts(batch_s=0.5, row_s=0.125),
    head=Curve((1, 3), (2, 4)),
)
ATTENTION = AttentionCosts(
    position_s=5, pair_s=2, layout_s=7, block_rows=4, state_s=0.5, group_s=0.25
)


def decodes(count, positions=0, **changes):
    return BatchWork(num_decodes=count, num_decode_positions=positions, **changes)


def chunks(*lengths_and_ends, **changes):
    lengths, ends = zip(*lengths_and_ends, strict=True)
    return BatchWork(chunk_lengths=int32(lengths), chunk_ends=int32(ends), **changes)


def groups(*columns):
    """Each group is (rows that decode, tokens of the prefix, first chunk, chunks)."""
    return GroupWork(*(int32(column) for column in zip(*columns, strict=True)))


def test_a_curve_is_straight_between_its_points_and_goes_on_beyond_the_last():
    curve = Curve((2, 4, 8), (6, 10, 10))
    assert [curve(count) for count in (0, 1, 2, 3, 4, 5, 8)] == [6, 6, 6, 8, 10, 10, 10]
    assert Curve((2, 4), (6, 10))(10) == 22
    assert Curve.constant(3)(1000) == 3
    assert curve.times(0.5)(3) == 4


def test_a_roofline_is_the_larger_of_two_times():
    for least_s, each_s in ((10, 3), (0, 2), (5, 0), (0, 0), (0.3, 7)):
        curve = Curve.roofline(least_s, each_s)
        for count in (1, 2, 3.3, 4, 50):
            assert curve(count) == pytest.approx(max(least_s, count * each_s)), (least_s, each_s)


def test_a_curve_without_an_order_is_refused():
    for counts, seconds in (
        ((), ()),
        ((1,), ()),
        ((2, 1), (1, 1)),
        ((1,), (-1,)),
        ((1,), (math.inf,)),
    ):
        with pytest.raises(ValueError, match="curve"):
            Curve(counts, seconds)


def test_a_batch_costs_its_parts():
    parts = COST.parts(chunks((3, 3), (1, 9), num_decodes=1, num_draws=2, draw_s=0.75))
    # Three sequences with five rows.
    assert parts.host_s == 1 + 3 * 0.25
    assert parts.layers_s == 15
    assert parts.exchange_s == 0.5 + 5 * 0.125
    assert parts.attention_s == 0
    assert parts.head_s == 3
    assert parts.draws_s == 0.75


def test_a_small_batch_is_bound_by_reading_weights():
    assert COST.parts(decodes(2)).layers_s == 10


def test_a_batch_that_draws_nothing_needs_no_head():
    assert COST.parts(chunks((3, 3))).head_s == 0


def test_a_batch_without_tokens_reads_no_weights():
    assert COST.batch_s(BatchWork()) == 1


def test_a_fixed_cost_does_not_depend_on_the_batch():
    large = chunks((8192, 8192), num_decodes=4096, num_decode_positions=10**7, num_draws=4096)
    assert fixed(0.003).batch_s(large) == 0.003
    assert INSTANT.batch_s(large) == 0


# --- attention ------------------------------------------------------------------------------------


def test_attention_counts_pairs_and_the_positions_of_blocks():
    """Compared with a count row by row."""
    lengths_and_ends = ((1, 1), (4, 4), (8, 30), (12, 12))
    expected = 0
    for length, end in lengths_and_ends:
        for row in range(length):
            sees = end - length + row + 1
            expected += ATTENTION.pair_s * sees
            is_last_of_block = (row + 1) % ATTENTION.block_rows == 0 or row == length - 1
            expected += ATTENTION.layout_s * sees * is_last_of_block
    assert ATTENTION.batch_s(chunks(*lengths_and_ends)) == expected
    assert ATTENTION.batch_s(decodes(3, 100)) == 500


def test_a_group_reads_its_prefix_once_for_a_block_of_rows():
    alone = decodes(6, 6 * 20)
    together = alone._replace(groups=groups((6, 16, 0, 0)))
    # Six rows are two blocks, which multiply by 16 positions, and each row goes on from there.
    prefix = 2 * 16 * ATTENTION.layout_s + 6 * 16 * ATTENTION.pair_s
    own = 6 * 4 * ATTENTION.position_s
    costs = 6 * ATTENTION.state_s + ATTENTION.group_s
    assert ATTENTION.batch_s(together) == prefix + own + costs


def test_chunks_of_a_group_share_blocks_with_its_decodes():
    alone = chunks((2, 18), (1, 17), num_decodes=1, num_decode_positions=20)
    together = alone._replace(groups=groups((1, 16, 0, 2)))
    # Three blocks become one; the row that decodes multiplies instead of reading.
    saved = 16 * (ATTENTION.position_s - ATTENTION.pair_s) + 16 * ATTENTION.layout_s
    saved -= 4 * ATTENTION.state_s + ATTENTION.group_s
    assert ATTENTION.batch_s(alone) - ATTENTION.batch_s(together) == saved
    only_second = alone._replace(groups=groups((1, 16, 1, 1)))
    assert ATTENTION.batch_s(together) < ATTENTION.batch_s(only_second) < ATTENTION.batch_s(alone)


def test_nested_groups_save_one_after_the_other():
    alone = decodes(8, 8 * 40)
    outer, inner = (8, 16, 0, 0), (4, 8, 0, 0)
    costs = [
        ATTENTION.batch_s(alone._replace(groups=groups(*each)))
        for each in ((outer,), (inner,), (outer, inner))
    ]
    whole = ATTENTION.batch_s(alone)
    assert whole - costs[2] == (whole - costs[0]) + (whole - costs[1])


def test_a_group_that_would_cost_more_is_not_used():
    alone = decodes(1, 20)
    assert ATTENTION.batch_s(alone._replace(groups=groups((1, 16, 0, 0)))) == ATTENTION.batch_s(
        alone
    )


# --- drawing --------------------------------------------------------------------------------------


def test_a_row_that_draws_costs_by_how_it_samples():
    draws = DrawCosts(greedy_s=1, sampled_s=2, top_k_s=4, top_p_s=8, adjusted_s=16, logprobs_s=32)
    for sampling, num_logprobs, expected in (
        (Sampling(temperature=0, top_k=5), -1, 1),
        (Sampling(), -1, 2),
        (Sampling(top_k=5, top_p=0.5), -1, 4),
        (Sampling(top_p=0.5), -1, 8),
        (Sampling(min_p=0.1), -1, 8),
        (Sampling(adjustments=Adjustments()), -1, 18),
        (Sampling(), 0, 34),
        (Sampling(temperature=0, adjustments=Adjustments()), 5, 49),
    ):
        assert draws.of(sampling, num_logprobs) == expected, sampling


# --- estimates ------------------------------------------------------------------------------------

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=100,
    num_layer_parameters=1000,
)


def test_an_estimate_is_arithmetic():
    gpu = Gpu(bytes_per_s=10, flops_per_s=20)
    cost = estimate(SHAPE, gpu)
    # 2,000 bytes of weights, 2,000 operations of a row.
    assert [cost.layers(rows) for rows in (1, 2, 4)] == [200, 200, 400]
    # 1,600 bytes of the head, 1,600 operations of a row.
    assert [cost.head(rows) for rows in (1, 4)] == [160, 320]
    # Keys and values are 2 layers * 2 * 2 heads * 4 numbers of 2 bytes.
    assert cost.attention.layout_s == 64 / 10
    assert cost.attention.pair_s == 2 * 4 * 4 * 4 / 20
    assert cost.attention.position_s == 6.4
    # Where products are slow, they and not the memory limit a row that decodes.
    slow = estimate(SHAPE, Gpu(bytes_per_s=10, flops_per_s=5))
    assert slow.attention.position_s == slow.attention.pair_s == 2 * 4 * 4 * 4 / 5
    assert cost.exchange == ExchangeCosts()
    assert cost.error > 0


def test_ranks_share_layers_and_exchange_what_they_add_up():
    gpu = Gpu(bytes_per_s=10, flops_per_s=20, link_bytes_per_s=4, link_s=3)
    alone, shared = estimate(SHAPE, gpu), estimate(SHAPE, gpu, tp_size=4)
    for rows in (1, 50):
        assert shared.layers(rows) == alone.layers(rows) / 4
        assert shared.head(rows) == alone.head(rows) / 4
    for name in ("position_s", "pair_s", "layout_s"):
        assert getattr(shared.attention, name) == getattr(alone.attention, name) / 4
    # 5 all-reduces of 16 bytes a row, of which each rank sends one and a half times as many.
    assert shared.exchange.batch_s == 15
    assert shared.exchange.row_s == 5 * 24 / 4


def test_presets_are_in_a_plausible_range():
    """Weights alone: 2.5 GB and 15 GB at 3 TB/s; a thousand contexts of 1,000 tokens cost more."""
    small, large = PRESETS["llama-1b-h100"], PRESETS["llama-8b-h100"]
    one = decodes(1, 1, num_draws=1)
    assert 0.8e-3 < small.batch_s(one) < 2e-3
    assert 4e-3 < large.batch_s(one) < 8e-3
    assert 10e-3 < small.batch_s(decodes(1024, 1024 * 1000, num_draws=1024)) < 20e-3


def test_no_cost_is_negative_or_infinite():
    for name, cost in PRESETS.items():
        assert 0 <= cost.batch_s(decodes(10, 100, num_draws=10)) < math.inf, name


# --- names and files ------------------------------------------------------------------------------


def test_costs_are_found_by_name():
    assert cost_model("fixed:0.25") == fixed(0.25)
    assert cost_model("llama-1b-h100") is PRESETS["llama-1b-h100"]


def test_the_error_of_a_wrong_name_lists_the_right_ones():
    for name in ("fast", "fixed", "fixed:", "fixed:-1", "fixed:nan", "fixed:inf"):
        assert re.match(f"cost={name}: .*instant.*calibrate", error_of(name)), name


def test_a_cost_model_comes_back_from_its_file(tmp_path):
    path = str(tmp_path / "cost.yaml")
    for cost in (CostModel(attention=ATTENTION, head=Curve((1, 2), (1e-5, 3e-12))), COST, INSTANT):
        write_cost(path, CostFile({"model": "m", "threads": 2}, cost))
        assert read_cost(path) == cost == cost_model(path)


def test_a_wrong_file_is_refused_by_the_field_that_is_wrong(tmp_path):
    path = tmp_path / "cost.yaml"
    for text, complaint in (
        ("about: {}\ncost: {host: {batch_s: -1}}", r"batch_s=-1.* `\$.cost.host`"),
        ("about: {}\ncost: {speed: 3}", "unknown field `speed`"),
        ("about: {}\ncost: {attention: {block_rows: 0}}", "block_rows=0"),
        ("about: {}\ncost: {layers: {counts: [2, 1], seconds: [1, 1]}}", "ascend"),
        ("cost: {}", "`about`"),
        ("{", "calibrate"),
    ):
        path.write_text(text)
        assert re.search(f"^cost={path}: .*{complaint}", error_of(str(path)), re.DOTALL), text
    assert re.match(f"cost={tmp_path}/none.yaml: No such file", error_of(f"{tmp_path}/none.yaml"))
    with pytest.raises(ConfigError, match="No such file"):
        write_cost(str(tmp_path / "none" / "cost.yaml"), CostFile({}, INSTANT))


def error_of(name):
    try:
        return f"accepted: {cost_model(name)}"
    except ConfigError as error:
        return str(error)


def test_blocks_without_a_limit_read_a_context_once():
    attention = AttentionCosts(layout_s=1)
    assert attention.batch_s(chunks((1000, 5000))) == pytest.approx(5000)
    assert np.isfinite(attention.batch_s(chunks((1, 1))))
