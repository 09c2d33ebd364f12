"""The element-wise kernels between the products of a layer, in Triton. A program does a row.

They round where ``reference_operators.py`` does.
"""

import triton
import triton.language as tl

__all__ = ["add_rms_norm", "rms_norm", "silu_multiply"]


@triton.jit
def rms_norm(
    x,  # [rows, SIZE]
    weight,  # [SIZE]
    output,  # [rows, SIZE], written
    stride,  # of rows of x
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_there = d < SIZE
    numbers = tl.load(x + row * stride + d, mask=is_there, other=0.0)
    normed = _normed(numbers.to(tl.float32), weight, d, is_there, eps, numbers.dtype, SIZE)
    tl.store(output + row * SIZE + d, normed, mask=is_there)


@triton.jit
def add_rms_norm(
    stream,  # [rows, SIZE], changed
    added,  # [rows, SIZE]
    weight,  # [SIZE]
    output,  # [rows, SIZE], written
    added_stride,  # of its rows
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    is_there = d < SIZE
    before = tl.load(stream + row * SIZE + d, mask=is_there, other=0.0)
    more = tl.load(added + row * added_stride + d, mask=is_there, other=0.0)
    # The norm is that of the rounded sum.
    after = (before.to(tl.float32) + more.to(tl.float32)).to(before.dtype)
    tl.store(stream + row * SIZE + d, after, mask=is_there)
    normed = _normed(after.to(tl.float32), weight, d, is_there, eps, before.dtype, SIZE)
    tl.store(output + row * SIZE + d, normed, mask=is_there)


@triton.jit
def _normed(numbers, weight, d, is_there, eps, dtype: tl.constexpr, SIZE: tl.constexpr):
    scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, axis=0) / SIZE + eps)
    quotient = (numbers * scale).to(dtype).to(tl.float32)
    factor = tl.load(weight + d, mask=is_there, other=0.0).to(tl.float32)
    return (factor * quotient).to(dtype)


@triton.jit
def silu_multiply(
    gate_up,  # [rows, 2 * SIZE]
    output,  # [rows, SIZE], written
    stride,  # of rows of gate_up
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = d < SIZE
    gate = tl.load(gate_up + row * stride + d, mask=is_there, other=0.0)
    up = tl.load(gate_up + row * stride + SIZE + d, mask=is_there, other=0.0)
    wide = gate.to(tl.float32)
    # silu is rounded before it is multiplied.
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(output + row * SIZE + d, (silu * up.to(tl.float32)).to(gate.dtype), mask=is_there)
