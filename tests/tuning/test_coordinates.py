"""Searches along coordinates, on functions whose maximum is known."""

from __future__ import annotations

import itertools
import random

from tokasaurus.tuning.coordinates import Coordinate, climb

SIZES = Coordinate([{"size": each} for each in range(10)])
WIDTHS = Coordinate([{"width": each} for each in range(7)])
LAYOUTS = Coordinate([{"layout": each} for each in "abcd"], ordered=False)
ALL = (SIZES, WIDTHS, LAYOUTS)


class Measured:
    """Counts what is asked."""

    def __init__(self, function, budget=1 << 30):
        self.points = []
        self._function, self._budget = function, budget

    def __call__(self, point):
        if len(self.points) == self._budget:
            return None
        self.points.append(dict(point))
        return self._function(point)


def test_a_function_with_one_maximum_is_climbed_from_anywhere():
    for seed in range(30):
        chance = random.Random(seed)
        size, width, layout = chance.randrange(10), chance.randrange(7), chance.choice("abcd")

        def rate(point, size=size, width=width, layout=layout):
            off = abs(point["size"] - size) + abs(point["width"] - width)
            return 100 - 5 * off - 20 * (point["layout"] != layout)

        measured = Measured(rate)
        start = {
            "size": chance.randrange(10),
            "width": chance.randrange(7),
            "layout": chance.choice("abcd"),
        }
        best, ended = climb(start, ALL, measured, 1.0)
        assert (dict(best), ended) == ({"size": size, "width": width, "layout": layout}, True), seed
        keys = [tuple(sorted(point.items())) for point in measured.points]
        assert len(keys) == len(set(keys)) < 10 * 7 * 4 / 4, seed


def test_the_way_back_from_a_faster_end_of_a_coordinate_is_not_tried():
    measured = Measured(lambda point: 100 + point["size"])
    best, ended = climb({"size": 8}, [SIZES], measured, 1.0)
    assert (best, ended) == ({"size": 9}, True)
    assert [point["size"] for point in measured.points] == [8, 9]


def test_a_coordinate_is_tried_again_after_another_has_changed():
    # Only with the layout b is a larger size faster.
    def rate(point):
        return 10 + (point["layout"] == "b") * (1 + point["size"])

    best, _ = climb({"size": 0, "width": 0, "layout": "a"}, ALL, Measured(rate), 1.0)
    assert (best["size"], best["layout"]) == (9, "b")


def test_a_small_gain_counts_as_chance():
    rates = itertools.count(1000)  # every measurement is a little faster than the one before
    best, ended = climb({"size": 5, "width": 3, "layout": "a"}, ALL, lambda _: next(rates), 1.03)
    assert best == {"size": 5, "width": 3, "layout": "a"}
    assert ended


def test_what_does_not_run_is_passed_by():
    def rate(point):
        return 0 if point["layout"] in "bc" else 50 + point["size"] * (point["layout"] == "d")

    best, _ = climb({"size": 9, "width": 0, "layout": "a"}, ALL, Measured(rate), 1.0)
    assert best["layout"] == "d"


def test_a_spent_budget_ends_the_search_with_the_best_so_far():
    def rate(point):
        return 100 + point["size"]

    for budget in range(12):
        measured = Measured(rate, budget)
        best, ended = climb({"size": 2, "width": 0, "layout": "a"}, ALL, measured, 1.0)
        assert not ended, budget
        assert best["size"] == min(max(2, budget + 1), 9), budget


def test_a_value_that_is_no_option_is_a_place_to_start_from():
    best, _ = climb({"size": 77, "width": 0, "layout": "a"}, ALL, lambda p: 100 - p["size"], 1.0)
    assert best["size"] == 0
