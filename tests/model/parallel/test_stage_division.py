"""Dividing layers over stages, compared with a search over all divisions."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from rows import each_row

from tokasaurus.errors import ConfigError
from tokasaurus.model.parallel.stages import divide_layers, stage_costs


def all_divisions(num_layers: int, pp_size: int) -> list[list[range]]:
    cuts = itertools.combinations(range(1, num_layers), pp_size - 1)
    return [[range(a, b) for a, b in itertools.pairwise((0, *inner, num_layers))] for inner in cuts]


def test_the_slowest_stage_is_as_fast_as_in_the_best_of_all_divisions():
    costs = [(1.0, 0.0, 0.0), (1.0, 0.3, 2.7), (1.0, 5.0, 0.0), (1.0, 0.0, 9.0), (0.1, 0.25, 0.31)]
    for num_layers, pp_size, cost in itertools.product(range(1, 13), range(1, 9), costs):
        if num_layers < pp_size:
            continue
        found = divide_layers(num_layers, pp_size, *cost)
        # Sorted, so that of divisions with the same maximum the one with a lower next one is best.
        best = min(
            sorted(stage_costs(stages, *cost), reverse=True)
            for stages in all_divisions(num_layers, pp_size)
        )
        costs_found = sorted(stage_costs(found, *cost), reverse=True)
        assert costs_found == pytest.approx(best), (num_layers, pp_size, cost)
        layers = [layer for stage in found for layer in stage]
        assert layers == list(range(num_layers))
        assert all(len(stage) >= 1 for stage in found)


@each_row(
    "arguments, expected",
    [
        ((30, 1), [30]),
        ((32, 4), [8, 8, 8, 8]),
        # The inner stages take what is left over: they hold neither embeddings nor head.
        ((30, 4), [7, 8, 8, 7]),
        # A head that costs as much as three layers.
        ((30, 4, 1.0, 0.0, 3.0), [8, 9, 8, 5]),
        # A head that costs more than all layers together leaves the last stage one.
        ((8, 2, 1.0, 0.0, 100.0), [7, 1]),
        ((3, 3, 1.0, 50.0, 50.0), [1, 1, 1]),
    ],
)
def test_layers_go_where_they_cost_least(arguments, expected):
    assert [len(stage) for stage in divide_layers(*arguments)] == expected


def test_more_stages_than_layers_are_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"pp_size=5: the model has 4 layers.*pp_size=4 or less"):
        divide_layers(4, 5)


@each_row("costs", [(0.0, 0.0, 0.0), (-1.0, 0.0, 0.0), (1.0, float("nan"), 0.0), (1.0, 0.0, -2.0)])
def test_costs_that_are_no_times_are_refused(costs):
    with pytest.raises(ValueError, match="costs must be finite"):
        divide_layers(4, 2, *costs)


def test_a_pipeline_without_stages_is_refused():
    with pytest.raises(ValueError, match="pp_size=0"):
        divide_layers(4, 0)


def test_dividing_layers_loads_no_torch():
    code = "import sys, tokasaurus.model.parallel.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
