"""The probe finds kernels whose results depend on the batch, and tiles mend what they can."""

from __future__ import annotations

import pytest
import torch
from rows import named
from worker_driver import worker_config

from tokasaurus.errors import ConfigError
from tokasaurus.model.linear_methods.plain import PlainLinear
from tokasaurus.model.linear_methods.tiled import TiledLinear
from tokasaurus.model.probe import NUM_ROWS, counts_of, dependent_counts
from tokasaurus.model.worker import determinism
from tokasaurus.model.worker.worker import Worker

COUNTS = counts_of(1, is_first=True)
ROWS = torch.randn(NUM_ROWS, 24, generator=torch.Generator().manual_seed(0))
# The last bit of some number.
BIT = 2.0**-20


def found(kernel):
    return dependent_counts(lambda ids: kernel(ROWS[ids]), COUNTS, seed=0)


def on_one_number_of_rows(x):
    return x + BIT * (len(x) == 97)


def on_a_row_that_is_alone(x):
    return x + BIT * (len(x) == 1)


def on_the_position(x):
    return x + BIT * (torch.arange(len(x)) == 63)[:, None]


def on_the_neighbour(x):
    return x + BIT * (x.roll(1, 0)[:, :1] > 1)


def on_the_largest_of_the_batch(x):
    return (x / x.abs().max()) * x.abs().max()


def test_each_kind_of_dependence_is_found():
    assert found(on_one_number_of_rows) == [97]
    assert found(on_a_row_that_is_alone) == [1]
    for kernel in (on_the_position, on_the_neighbour, on_the_largest_of_the_batch):
        with named(kernel.__name__):
            assert found(kernel)


def test_one_row_that_differs_in_one_place_is_found():
    """Whichever row it is, a batch has it alone."""
    for row in (0, 17, 63):

        def kernel(x, row=row):
            is_it = (x == ROWS[row]).all(1, keepdim=True)
            return x + BIT * (is_it & (len(x) == 1))

        with named(row):
            assert found(kernel) == [1]


def test_a_kernel_that_treats_every_row_alike_passes():
    assert not found(lambda x: (x * 3).exp())
    assert not found(lambda x: x * torch.nan)


def test_all_numbers_of_rows_up_to_64_are_tried_of_every_product():
    assert counts_of(1 << 30, is_first=True) == list(range(1, 65))
    assert COUNTS[-1] == 513


class CountingLinear:
    """Records the numbers of rows that it is called with."""

    def __init__(self):
        self.counts = []

    def apply(self, x):
        self.counts.append(len(x))
        return x * 2


def test_tiles_call_their_method_with_fixed_numbers_of_rows():
    rows = (
        (2, None, 1, [2]),
        (2, None, 70, [70]),
        (16, 16, 1, [16]),
        (16, 16, 33, [16, 16, 16]),
        (64, 64, 64, [64]),
    )
    for least, tile, count, expected in rows:
        method = CountingLinear()
        x = torch.randn(count, 3)
        with named((least, tile, count)):
            assert torch.equal(TiledLinear(method, least, tile).apply(x), x * 2)
            assert method.counts == expected


@pytest.fixture
def worker_of(checkpoint, monkeypatch):
    """Makes a worker of a tiny model, with nothing known from other workers."""
    monkeypatch.setattr(determinism, "_known", {})
    return lambda **fields: Worker(worker_config(checkpoint("llama", tied=True), **fields))


def test_a_worker_says_whether_it_is_deterministic_and_why(worker_of):
    for fields, expected, reason in (
        ({}, True, "deterministic: 5 kinds of products"),
        ({"deterministic": True}, True, "deterministic: 5 kinds of products"),
        ({"deterministic": False}, False, "deterministic=F"),
        ({"attention": "reference"}, False, "attention=reference lets"),
    ):
        with named(fields):
            worker = worker_of(**fields)
            assert worker.is_deterministic is expected
            assert reason in worker.determinism_reason


def test_determinism_that_cannot_be_is_refused(worker_of):
    with pytest.raises(ConfigError, match="deterministic=T: attention=reference"):
        worker_of(deterministic=True, attention="reference")


def test_a_product_that_depends_on_the_number_of_rows_runs_on_tiles_if_the_user_asks(
    worker_of, monkeypatch
):
    multiply = PlainLinear.apply

    def dependent(self, x):
        return multiply(self, x) + BIT * (len(x) != 16)

    monkeypatch.setattr(PlainLinear, "apply", dependent)
    off = worker_of(linear="plain")
    assert not off.is_deterministic
    assert "PlainLinear depends on the number of rows" in off.determinism_reason
    on = worker_of(linear="plain", deterministic=True)
    assert on.is_deterministic
    assert "16 rows each" in on.determinism_reason


def test_a_product_that_no_tiles_mend_is_refused(worker_of, monkeypatch):
    multiply = PlainLinear.apply

    def dependent(self, x):
        return multiply(self, x) + BIT * torch.arange(len(x))[:, None]

    monkeypatch.setattr(PlainLinear, "apply", dependent)
    with pytest.raises(ConfigError, match=r"deterministic=T: the product .* on fixed tiles too"):
        worker_of(linear="plain", deterministic=True)
