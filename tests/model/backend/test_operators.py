"""The compiled operators against their definition, in every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from rows import named

from tokasaurus.model.backend.cpu.operators import CompiledOperators
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS
from tokasaurus.model.instruction_sets import usable_sets

SETS = [instructions.name for instructions in usable_sets()]
# Rows and size; sizes with and without a rest behind the last whole vector.
SHAPES = [(1, 576), (2, 16), (7, 8), (5, 3), (33, 100), (300, 640)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=SETS)
def compiled(request):
    return CompiledOperators(request.param)


def check_close(output, expected):
    """A sum in another order may round one in many results to the number beside."""
    assert output.dtype == expected.dtype
    assert output.is_contiguous()
    if output.dtype == torch.float32:
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=2e-6)
        return
    tolerance = 2 * torch.finfo(output.dtype).eps
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=tolerance)
    assert (output != expected).float().mean() <= 0.01


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request, monkeypatch):
    """The largest shape has work for two."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def test_rms_norm_is_that_of_the_reference(compiled, threads):
    torch.manual_seed(0)
    for dtype in DTYPES:
        for num_rows, size in SHAPES:
            wide = torch.randn(num_rows, 2 * size).to(dtype)
            weight = (torch.rand(size) + 0.5).to(dtype)
            for x in (wide[:, size:], wide[:, :size].contiguous(), wide.view(num_rows, 2, size)):
                with named((dtype, num_rows, size, x.stride())):
                    output = compiled.rms_norm(x, weight, 1e-5)
                    assert output.shape == x.shape
                    check_close(output, REFERENCE_OPERATORS.rms_norm(x, weight, 1e-5))


def test_add_rms_norm_changes_the_stream_and_norms_the_sum(compiled, threads):
    torch.manual_seed(0)
    for dtype in DTYPES:
        for num_rows, size in SHAPES:
            stream = torch.randn(num_rows, size).to(dtype)
            added = torch.randn(num_rows, size + 5).to(dtype)[:, :size]
            weight = (torch.rand(size) + 0.5).to(dtype)
            expected_stream = stream.clone()
            expected = REFERENCE_OPERATORS.add_rms_norm(expected_stream, added, weight, 1e-5)
            with named((dtype, num_rows, size)):
                output = compiled.add_rms_norm(stream, added, weight, 1e-5)
                assert torch.equal(stream, expected_stream)
                check_close(output, expected)


def test_silu_multiply_is_that_of_the_reference(compiled, threads):
    torch.manual_seed(0)
    for dtype in DTYPES:
        for num_rows, size in SHAPES:
            gate_up = (torch.randn(num_rows, 2 * size) * 4).to(dtype)
            with named((dtype, num_rows, size)):
                output = compiled.silu_multiply(gate_up)
                check_close(output, REFERENCE_OPERATORS.silu_multiply(gate_up))


def test_silu_saturates_and_passes_nan_on(compiled):
    for dtype in DTYPES:
        gate = torch.tensor([-3e4, -100.0, -88.5, 88.5, 100.0, 3e4, torch.nan, 0.0], dtype=dtype)
        gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
        with named(dtype):
            output = compiled.silu_multiply(gate_up)
            expected = REFERENCE_OPERATORS.silu_multiply(gate_up)
            torch.testing.assert_close(output, expected, equal_nan=True, atol=1e-30, rtol=1e-6)


def test_every_number_of_half_precision_is_read_and_written_exactly(compiled):
    """Added to 0, each stays what it is; the smallest, denormal ones do not count."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        numbers = bits.view(dtype)
        kept = numbers[numbers.isfinite() & (numbers.abs() >= torch.finfo(dtype).tiny)]
        zeros = torch.zeros(1, len(kept), dtype=dtype)
        with named(dtype):
            compiled.add_rms_norm(zeros, kept[None], kept, 1.0)
            assert torch.equal(zeros[0], kept)


def test_sums_round_to_the_nearest_and_ties_to_even(compiled):
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        left = (torch.randn(1, 4096) * torch.logspace(-3, 3, 4096)).to(dtype)
        right = (torch.randn(1, 4096) * torch.logspace(3, -3, 4096)).to(dtype)
        expected = left + right
        with named(dtype):
            compiled.add_rms_norm(left, right, left[0].clone(), 1e-5)
            assert torch.equal(left, expected)
