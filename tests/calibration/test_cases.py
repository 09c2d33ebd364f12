"""The batches that are measured are what they say, and sequences keep to their own pages."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tokasaurus.calibration.cases import (
    Case,
    Limits,
    attention_cases,
    draw_cases,
    held_out_cases,
    row_cases,
)
from tokasaurus.planner.cost_model import AttentionCosts, CostModel, DrawCosts, HostCosts
from tokasaurus.planner.curve import Curve
from tokasaurus.planner.lengths import DrawnLengths
from tokasaurus.planner.simulated_device import SimulatedDevice
from tokasaurus.rounding import ceil_div

LIMITS = Limits(
    max_rows=2048, max_sequences=256, max_length=4096, max_positions=65536, page_size=16
)
COST = CostModel(
    host=HostCosts(batch_s=1e-3, sequence_s=1e-5),
    layers=Curve((1, 8, 64), (1e-3, 2e-3, 9e-3)),
    attention=AttentionCosts(
        position_s=3e-7, pair_s=1e-7, layout_s=5e-7, block_rows=32, state_s=1e-6, group_s=1e-5
    ),
    head=Curve.roofline(1e-3, 1e-4),
    draws=DrawCosts(greedy_s=1e-5, sampled_s=2e-5, top_k_s=3e-5, top_p_s=4e-5, logprobs_s=5e-5),
)


def all_cases(limits):
    cases = [*row_cases(limits), *draw_cases(limits).values(), *held_out_cases(limits)]
    return cases + [case for pair in attention_cases(limits) for case in pair]


@pytest.mark.parametrize("limits", [LIMITS, Limits(64, 8, 300, 4096, 64)], ids=["large", "small"])
def test_a_case_asks_of_a_device_what_it_says(limits):
    cases = all_cases(limits)
    assert len(cases) > 10
    for case in cases:
        never = DrawnLengths(np.array([1 << 40]))
        device = SimulatedDevice(COST, never, 512, limits.page_size)
        device.run(case.entering(limits.page_size))
        timed = msgspec.structs.replace(case.timed(limits.page_size), number=1)
        draw_s = case.num_decodes * COST.draws.of(case.sampling, case.num_logprobs)
        expected = COST.batch_s(case.work()._replace(draw_s=draw_s))
        assert device.run(timed).device_s == pytest.approx(expected), case.name


def test_only_a_prefix_is_shared_and_pages_suffice_for_two_batches():
    for case in all_cases(LIMITS):
        batch = case.entering(LIMITS.page_size)
        tables = {}
        for slot, column, page in zip(
            batch.table_slots.tolist(),
            batch.table_columns.tolist(),
            batch.table_pages.tolist(),
            strict=True,
        ):
            tables.setdefault(slot, []).append(page)
            assert len(tables[slot]) == column + 1, case.name
        shared = case.prefix // LIMITS.page_size
        own = [page for pages in tables.values() for page in pages[shared:]]
        assert len({tuple(pages[:shared]) for pages in tables.values()}) == 1, case.name
        pages = own + next(iter(tables.values()))[:shared]
        assert sorted(pages) == list(range(case.num_pages(LIMITS.page_size))), case.name
        decoding = list(tables.values())[: case.num_decodes]
        needed = ceil_div(case.length + 1, LIMITS.page_size)
        assert all(len(pages) == needed for pages in decoding), case.name


def test_cases_keep_to_the_limits_of_the_engine():
    for case in all_cases(Limits(40, 12, 600, 3000, 16)):
        assert case.num_rows <= 40, case.name
        assert case.num_sequences <= 12, case.name
        assert case.length < 600, case.name
        assert case.num_pages(16) * 16 <= 3000, case.name


def test_what_context_adds_is_measured_with_as_many_rows():
    pairs = attention_cases(LIMITS)
    assert len(pairs) > 12
    for case, base in pairs:
        assert case.num_rows == base.num_rows, case.name
        attention = COST.attention
        assert attention.batch_s(base.work()) < 0.5 * attention.batch_s(case.work()), case.name


def test_batches_that_check_the_result_are_in_no_fit():
    fitted = {*row_cases(LIMITS), *(case for pair in attention_cases(LIMITS) for case in pair)}
    assert not fitted & set(held_out_cases(LIMITS))
    assert len(held_out_cases(LIMITS)) > 5


def test_a_case_has_a_name_that_tells_it_from_others():
    cases = set(row_cases(LIMITS)) | set(held_out_cases(LIMITS))
    assert len({case.name for case in cases}) == len(cases)
    assert Case(num_decodes=3, length=40, prefix=16).name == "3 decode at 40, 16 shared"
