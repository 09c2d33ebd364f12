"""Constants are found again from the times that they give."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tokasaurus.calibration.cases import (
    Limits,
    attention_cases,
    draw_cases,
    held_out_cases,
    row_cases,
)
from tokasaurus.calibration.fitting import CaseSeconds, fit_costs, least_squares
from tokasaurus.planner.cost_model import AttentionCosts, CostModel, DrawCosts, HostCosts
from tokasaurus.planner.curve import Curve

LIMITS = Limits(
    max_rows=2048, max_sequences=256, max_length=4096, max_positions=65536, page_size=16
)
COST = CostModel(
    host=HostCosts(batch_s=7e-4, sequence_s=2e-6),
    layers=Curve((1, 32, 64, 2048), (5e-3, 6e-3, 2e-2, 6e-1)),
    attention=AttentionCosts(
        position_s=7e-7, pair_s=1e-7, layout_s=1.5e-6, block_rows=32, state_s=2e-6, group_s=5e-5
    ),
    head=Curve((1, 64, 256), (1e-3, 5e-3, 2e-2)),
    draws=DrawCosts(
        greedy_s=4e-6,
        sampled_s=2e-5,
        top_k_s=1e-5,
        top_p_s=4e-5,
        adjusted_s=3e-6,
        logprobs_s=5e-5,
    ),
)


def seconds(case, cost=COST, noise=0.0, chance=None):
    """What a worker would measure, where every group is used."""
    work = case.work()
    parts = cost.parts(work)
    attention = cost.attention
    attention_s = attention.alone_s(work)
    if case.prefix:
        attention_s -= attention.saved_s(work).sum()
    drawn = case.num_decodes * cost.draws.of(case.sampling, case.num_logprobs)
    values = [parts.layers_s + attention_s, parts.head_s, parts.host_s + drawn]
    if chance is not None:
        values = [value * (1 + noise * chance.standard_normal()) for value in values]
    return CaseSeconds(*values, spread=0.0)


def fitted(**noise):
    return fit_costs(
        {case: seconds(case, **noise) for case in row_cases(LIMITS)},
        {
            (case, base): (seconds(case, **noise), seconds(base, **noise))
            for case, base in attention_cases(LIMITS)
        },
        {name: (case, seconds(case, **noise)) for name, case in draw_cases(LIMITS).items()},
    )


def test_exact_times_give_the_constants_that_made_them():
    found = fitted()
    for part in ("host", "attention", "draws"):
        for name, value in msgspec.structs.asdict(getattr(COST, part)).items():
            assert getattr(getattr(found, part), name) == pytest.approx(value, rel=1e-6), name
    for count in (1, 7, 48, 100, 500, 3000):
        # Between measured points a curve is straight, and this one bends at measured points.
        assert found.layers(count) == pytest.approx(COST.layers(count), rel=1e-6), count
        assert found.head(min(count, 256)) == pytest.approx(COST.head(min(count, 256))), count


def test_times_with_noise_give_predictions_that_are_as_good():
    found = fitted(noise=0.03, chance=np.random.default_rng(0))
    for case in held_out_cases(LIMITS):
        draw_s = case.num_decodes * found.draws.of(case.sampling, -1)
        predicted = found.batch_s(case.work()._replace(draw_s=draw_s))
        true_s = case.num_decodes * COST.draws.of(case.sampling, -1)
        expected = COST.batch_s(case.work()._replace(draw_s=true_s))
        assert predicted == pytest.approx(expected, rel=0.08), case.name


def test_costs_that_times_contradict_are_zero_and_none_is_negative():
    faster_with_context = {
        (case, base): (
            changed(seconds(case), layers_s=0.9 * seconds(base).layers_s),
            seconds(base),
        )
        for case, base in attention_cases(LIMITS)
    }
    found = fit_costs(
        {case: seconds(case) for case in row_cases(LIMITS)},
        faster_with_context,
        {name: (case, seconds(case)) for name, case in draw_cases(LIMITS).items()},
    )
    assert found.attention.position_s == found.attention.pair_s == 0


def changed(each, **changes):
    """A copy of measured seconds with changes."""
    values = {name: getattr(each, name) for name in ("layers_s", "head_s", "rest_s", "spread")}
    return CaseSeconds(**{**values, **changes})


def test_no_change_of_costs_of_at_least_zero_explains_times_better():
    """The conditions of Karush, Kuhn and Tucker."""
    chance = np.random.default_rng(5)
    num_zeros = 0
    for number in range(40):
        causes = np.abs(chance.standard_normal((12, 4)))
        times = causes @ chance.standard_normal(4) + 0.3 * chance.standard_normal(12)
        found = least_squares(causes, times)
        slopes = causes.T @ (causes @ found - times)
        assert (found >= 0).all(), number
        assert (slopes > -1e-9).all(), number
        assert np.abs(slopes[found > 0]).max(initial=0.0) < 1e-9, number
        num_zeros += int((found == 0).sum())
    assert num_zeros > 10
