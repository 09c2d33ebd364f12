"""From measured seconds to the constants of the cost model. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tokasaurus.calibration.cases import Case
from tokasaurus.planner.cost_model import (
    AttentionCosts,
    BatchWork,
    CostModel,
    DrawCosts,
    HostCosts,
)
from tokasaurus.planner.curve import Curve
from tokasaurus.protocol.arrays import Float64Array

__all__ = ["CaseSeconds", "fit_attention", "fit_costs", "least_squares"]


@dataclass(frozen=True)
class CaseSeconds:
    """Lower quartiles over rounds; see ``PartSeconds``.

    Attributes:
        spread: half of the range that holds the middle half of the rounds' sums, as a share of
            their median.
    """

    layers_s: float
    head_s: float
    rest_s: float
    spread: float

    @property
    def total_s(self) -> float:
        return self.layers_s + self.head_s + self.rest_s


def least_squares(causes: Float64Array, seconds: Float64Array) -> Float64Array:
    """The costs of at least 0 that explain seconds best. There are few, so all choices are tried.

    Args:
        causes: [measurements, costs], at most ten costs.
        seconds: [measurements].
    """
    num_costs = causes.shape[1]
    best, least = np.zeros(num_costs), float((seconds**2).sum())
    for count in range(1, num_costs + 1):
        for used in combinations(range(num_costs), count):
            fitted = np.linalg.lstsq(causes[:, used], seconds, rcond=None)[0]
            left = float(((causes[:, used] @ fitted - seconds) ** 2).sum())
            if (fitted >= 0).all() and left < least:
                best, least = np.zeros(num_costs), left
                best[list(used)] = fitted
    return best


_ATTENTION = ("position_s", "pair_s", "layout_s", "state_s", "group_s")
# Rows of a kernel's block; the largest stands for contexts that are read once for all rows.
_BLOCKS = (8, 16, 32, 64, 128, 256, 1 << 30)


def fit_attention(
    pairs: Sequence[tuple[BatchWork, BatchWork]], seconds: Sequence[tuple[float, float]]
) -> AttentionCosts:
    """The costs that explain what context adds, as shares of the time best.

    Args:
        pairs: work with context, and work of as many rows with little. All groups were used.
        seconds: of each.
    """
    with_s, without_s = np.array(seconds).T
    best, least = AttentionCosts(), np.inf
    for block_rows in _BLOCKS:
        units = [AttentionCosts(**{name: 1.0}, block_rows=block_rows) for name in _ATTENTION]
        causes = np.array(
            [[_used_s(unit, work) - _used_s(unit, base) for unit in units] for work, base in pairs]
        )
        costs = least_squares(causes / with_s[:, None], (with_s - without_s) / with_s)
        wrong = (causes @ costs - (with_s - without_s)) / with_s
        if (wrong**2).sum() < 0.999 * least:
            least = float((wrong**2).sum())
            found = dict(zip(_ATTENTION, costs.tolist(), strict=True))
            best = AttentionCosts(**found, block_rows=block_rows)
    return best


def _used_s(costs: AttentionCosts, work: BatchWork) -> float:
    """The seconds of attention if every group is used."""
    return costs.alone_s(work) - float(costs.saved_s(work).sum())


def fit_costs(
    rows: Mapping[Case, CaseSeconds],
    attention: Mapping[tuple[Case, Case], tuple[CaseSeconds, CaseSeconds]],
    draws: Mapping[str, tuple[Case, CaseSeconds]],
) -> CostModel:
    """The cost model that measurements give, without its error.

    Args:
        rows: of ``row_cases``.
        attention: of ``attention_cases``.
        draws: of ``draw_cases``.
    """
    attention_costs = fit_attention(
        [(case.work(), base.work()) for case, base in attention],
        [(each.layers_s, base.layers_s) for each, base in attention.values()],
    )
    host, sampled_s = _fit_rest(rows)
    return CostModel(
        host=host,
        layers=_layers(rows, attention_costs),
        attention=attention_costs,
        head=_curve({case.num_decodes: each.head_s for case, each in rows.items() if each.head_s}),
        draws=_fit_draws(draws, sampled_s),
    )


def _layers(rows: Mapping[Case, CaseSeconds], attention: AttentionCosts) -> Curve:
    """What is left of each case without its attention; means where cases have as many rows."""
    found: dict[int, list[float]] = {}
    for case, each in rows.items():
        left_s = max(each.layers_s - attention.batch_s(case.work()), 0.0)
        found.setdefault(case.num_rows, []).append(left_s)
    return _curve({num_rows: statistics.mean(each) for num_rows, each in found.items()})


def _curve(points: Mapping[int, float]) -> Curve:
    counts = sorted(points)
    return Curve(tuple(map(float, counts)), tuple(points[count] for count in counts))


def _fit_rest(rows: Mapping[Case, CaseSeconds]) -> tuple[HostCosts, float]:
    """The host's costs, and those of a row that draws at a temperature without filters."""
    causes = np.array([[1.0, case.num_sequences, case.num_decodes] for case in rows])
    seconds = np.array([each.rest_s for each in rows.values()])
    batch_s, sequence_s, sampled_s = least_squares(
        causes / seconds[:, None], np.ones(len(seconds))
    ).tolist()
    return HostCosts(batch_s=batch_s, sequence_s=sequence_s), sampled_s


def _fit_draws(draws: Mapping[str, tuple[Case, CaseSeconds]], sampled_s: float) -> DrawCosts:
    """What each kind takes longer than a plain row, added to what that one takes."""
    _, plain = draws["sampled_s"]
    found = {"sampled_s": sampled_s}
    for name, (case, each) in draws.items():
        longer_s = (each.rest_s - plain.rest_s) / case.num_decodes
        if name in ("adjusted_s", "logprobs_s"):  # beside the draw itself
            found[name] = max(longer_s, 0.0)
        elif name != "sampled_s":
            found[name] = max(sampled_s + longer_s, 0.0)
    return DrawCosts(**found)
