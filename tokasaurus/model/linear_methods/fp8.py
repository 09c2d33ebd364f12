"""Weights in e4m3, and activations that are quantized row by row, multiplied by torch.

Each output of the weight has a scale, which makes its largest magnitude 448, and so has each row of
activations. A result is the sum of products of numbers in e4m3, times both scales. On CUDA, tensor
cores multiply e4m3 and add in fp32. Elsewhere the numbers are widened, and the sums are those of
fp32: that is for tests and for small models, since it saves memory and no time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tokasaurus.model.capability import why_too_old
from tokasaurus.model.float8 import E4M3, LARGEST, to_e4m3
from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec
from tokasaurus.model.placement import Placement

__all__ = ["Fp8Linear", "quantized_rows", "why_not"]

# Numbers of a weight that are quantized, or widened, at once.
_BLOCK_SIZE = 1 << 22

# Of a row of zeros, whose scale must not be 0.
_LEAST = 1e-12

# Tensor cores take sizes that are multiples of this.
_MULTIPLE = 16

_OLDEST = (8, 9)
"""The compute capability of the first devices whose tensor cores multiply e4m3."""


def quantized_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers in e4m3, [rows, size], and the scale of each row, [rows, 1] fp32."""
    scales = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=_LEAST) / LARGEST
    return to_e4m3(rows.float() / scales), scales


class Fp8Linear(LinearMethod):
    """Multiplies by a weight in e4m3.

    Args:
        spec: the product.
        place: dtype of activations and results, and the device.
    """

    def __init__(self, spec: LinearSpec, place: Placement) -> None:
        self._spec, self._dtype, self._memory = spec, place.dtype, place.memory
        self._weight = place.memory.empty((spec.out_size, spec.in_size), E4M3, place.device)
        self._scales = place.memory.empty((1, spec.out_size), torch.float32, place.device)
        self._bias = place.empty(spec.out_size) if spec.bias else None
        is_whole = spec.in_size % _MULTIPLE == spec.out_size % _MULTIPLE == 0
        self._uses_tensor_cores = place.device.type == "cuda" and is_whole

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        rows = self._spec.rows(part)
        if kind == "bias":
            assert self._bias is not None
            self._bias[rows].copy_(tensor)
            return
        # In blocks, since each is widened on the way.
        first = rows.start
        for block in torch.split(tensor, max(_BLOCK_SIZE // self._spec.in_size, 1)):
            numbers, scales = quantized_rows(block.to(self._weight.device))
            some = slice(first, first + len(block))
            self._weight[some].view(torch.uint8).copy_(numbers.view(torch.uint8))
            self._scales[0, some].copy_(scales[:, 0])
            first += len(block)

    def finish(self) -> None:
        """Does nothing: each tensor is in its place."""

    def release(self) -> None:
        self._memory.release(*self._tensors())

    def restore(self) -> None:
        self._memory.restore(*self._tensors())

    def apply(self, x: Tensor) -> Tensor:
        numbers, scales = quantized_rows(x)
        if self._uses_tensor_cores:
            y = torch._scaled_mm(
                numbers, self._weight.t(), scales, self._scales, out_dtype=self._dtype
            )
            return y if self._bias is None else y + self._bias
        # In blocks, since each is widened.
        wide, size = numbers.float(), max(_BLOCK_SIZE // self._spec.in_size, 1)
        sums = [F.linear(wide, block.float()) for block in torch.split(self._weight, size)]
        y = torch.cat(sums, dim=1) * scales * self._scales
        return (y if self._bias is None else y + self._bias.float()).to(self._dtype)

    def rows(self, ids: Tensor) -> Tensor:
        chosen = self._weight.view(torch.uint8).index_select(0, ids).view(E4M3)
        return (chosen.float() * self._scales[0].index_select(0, ids)[:, None]).to(self._dtype)

    def _tensors(self) -> list[Tensor]:
        tensors = [self._weight, self._scales]
        return tensors if self._bias is None else [*tensors, self._bias]


def why_not(place: Placement) -> str | None:
    """Why products cannot be in e4m3 on this device, in this dtype; None if they can."""
    if place.device.type != "cuda":
        return None
    if place.dtype != torch.bfloat16:
        return f"on CUDA its results are in bf16, not in {place.dtype}; set dtype=bfloat16"
    return why_too_old(_OLDEST, "products in e4m3 need", place.device)
