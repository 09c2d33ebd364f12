"""Launches the element-wise kernels. Importing this imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from tokasaurus.model.backend.triton import operator_kernels
from tokasaurus.model.backend.triton.shapes import power_of_2
from tokasaurus.rounding import ceil_div

__all__ = ["TRITON_OPERATORS", "TritonOperators"]

# Columns of a program of ``silu_multiply``.
_COLUMNS = 1024


class TritonOperators:
    """Implements ``Operators``."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        num_rows, size = rows.shape
        output = torch.empty((num_rows, size), dtype=x.dtype, device=x.device)
        if num_rows:
            block = power_of_2(size)
            operator_kernels.rms_norm[num_rows,](
                rows,
                weight,
                output,
                rows.stride(0),
                eps,
                SIZE=size,
                BLOCK=block,
                num_warps=_warps(block),
            )
        return output.view(x.shape)

    def add_rms_norm(self, stream: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_rows, size = stream.shape
        output = torch.empty_like(stream)
        if num_rows:
            block = power_of_2(size)
            operator_kernels.add_rms_norm[num_rows,](
                stream,
                added,
                weight,
                output,
                added.stride(0),
                eps,
                SIZE=size,
                BLOCK=block,
                num_warps=_warps(block),
            )
        return output

    def silu_multiply(self, gate_up: Tensor) -> Tensor:
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        output = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
        if num_rows:
            block = min(power_of_2(size), _COLUMNS)
            operator_kernels.silu_multiply[num_rows, ceil_div(size, block)](
                gate_up,
                output,
                gate_up.stride(0),
                SIZE=size,
                BLOCK=block,
                num_warps=4,
            )
        return output


TRITON_OPERATORS = TritonOperators()


def _warps(block: int) -> int:
    """So that a thread has at least four numbers of a row, and at most 16 while there is room."""
    return min(max(block // 512, 1), 16)
