from __future__ import annotations

import math

import numpy as np

from tokasaurus.rounding import ceil_div, round_up


def test_numbers_and_arrays_round_up_alike():
    counts = np.arange(100, dtype=np.int32)
    for size in range(1, 9):
        expected = [math.ceil(count / size) for count in range(100)]
        assert [ceil_div(count, size) for count in range(100)] == expected
        assert ceil_div(counts, size).tolist() == expected
        assert ceil_div(counts, size).dtype == np.int32
        assert round_up(counts, size).tolist() == [each * size for each in expected]


def test_sizes_may_be_arrays():
    counts, sizes = np.array([0, 5, 6, 7]), np.array([3, 5, 5, 2])
    assert ceil_div(counts, sizes).tolist() == [0, 1, 2, 4]
