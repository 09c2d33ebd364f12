"""The element-wise kernels in Triton, interpreted, against their definition."""

from __future__ import annotations

import pytest
import torch
from rows import named

from tokasaurus.model.backend.base import DEFAULT_OPTIONS
from tokasaurus.model.backend.reference_operators import REFERENCE_OPERATORS
from tokasaurus.model.backend.triton.backend import TritonBackend, is_interpreted

pytestmark = pytest.mark.triton

# Rows and size: powers of two and others, and more columns than a program has.
SHAPES = [(1, 576), (2, 16), (7, 8), (5, 3), (0, 64), (9, 1030), (3, 2048)]
DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def operators():
    assert is_interpreted(), "these tests need TRITON_INTERPRET=1: run `make test-cuda`"
    return TritonBackend.operators(DEFAULT_OPTIONS)


def check_close(output, expected):
    """A sum in another order may round a result to the number beside, and seldom does."""
    assert output.dtype == expected.dtype
    assert output.is_contiguous()
    if output.dtype == torch.float32:
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=2e-6)
        return
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=2 * torch.finfo(output.dtype).eps)
    assert not output.numel() or (output != expected).float().mean() <= 0.02


def test_rms_norm_is_that_of_the_reference(operators):
    torch.manual_seed(0)
    for dtype in DTYPES:
        for num_rows, size in SHAPES:
            wide = torch.randn(num_rows, 2 * size).to(dtype)
            weight = (torch.rand(size) + 0.5).to(dtype)
            for x in (wide[:, size:], wide[:, :size].contiguous(), wide.view(num_rows, 2, size)):
                with named((dtype, num_rows, size, x.stride())):
                    output = operators.rms_norm(x, weight, 1e-5)
                    assert output.shape == x.shape
                    check_close(output, REFERENCE_OPERATORS.rms_norm(x, weight, 1e-5))


def test_add_rms_norm_changes_the_stream_and_norms_the_sum(operators):
    torch.manual_seed(0)
    for dtype in DTYPES:
        for num_rows, size in SHAPES:
            stream = torch.randn(num_rows, size).to(dtype)
            added = torch.randn(num_rows, size + 5).to(dtype)[:, :size]
            weight = (torch.rand(size) + 0.5).to(dtype)
            expected_stream = stream.clone()
            expected = REFERENCE_OPERATORS.add_rms_norm(expected_stream, added, weight, 1e-5)
            with named((dtype, num_rows, size)):
                output = operators.add_rms_norm(stream, added, weight, 1e-5)
                assert torch.equal(stream, expected_stream)
                check_close(output, expected)


def test_silu_multiply_is_that_of_the_reference(operators):
    torch.manual_seed(0)
    for dtype in DTYPES:
        for num_rows, size in SHAPES:
            gate_up = (torch.randn(num_rows, 2 * size) * 4).to(dtype)
            with named((dtype, num_rows, size)):
                output = operators.silu_multiply(gate_up)
                check_close(output, REFERENCE_OPERATORS.silu_multiply(gate_up))


def test_silu_saturates_and_passes_nan_on(operators):
    for dtype in DTYPES:
        gate = torch.tensor([-3e4, -100.0, -88.5, 88.5, 100.0, 3e4, torch.nan, 0.0], dtype=dtype)
        gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
        with named(dtype):
            output = operators.silu_multiply(gate_up)
            expected = REFERENCE_OPERATORS.silu_multiply(gate_up)
            torch.testing.assert_close(output, expected, equal_nan=True, atol=1e-30, rtol=1e-6)
