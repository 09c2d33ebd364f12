"""Weights packed once for oneDNN, the matrix library of the CPU.

``F.linear`` repacks a weight at every call, which costs most where a batch has few rows. The two
operators here are private ones of torch, which its inductor uses when it freezes a model: so they
are probed, and ``why_not`` says what is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokasaurus.model import storage
from tokasaurus.model.linear_methods.base import LinearMethod, LinearSpec
from tokasaurus.model.placement import Placement

__all__ = ["PackedLinear", "why_not"]


class PackedLinear(LinearMethod):
    """Multiplies by a weight in oneDNN's own layout.

    While parts are filled there is a plain weight in place of the packed one. The last part packs
    it. So of a whole model, few weights exist twice at any time.

    Args:
        spec: the product.
        place: dtype of the tensors; the device is the CPU.
        tied: [out, in], the weight of another module, which fills it and keeps it; None if the
            product has its own.
    """

    def __init__(self, spec: LinearSpec, place: Placement, tied: Tensor | None = None) -> None:
        self._spec = spec
        self._place = place
        self._tied = tied
        self._plain: Tensor | None = None
        self._packed: Tensor | None = None
        self._unfilled: set[str] = set()
        self._bias = place.empty(spec.out_size) if spec.bias else None

    def fill(self, part: str, kind: str, tensor: Tensor) -> None:
        rows = self._spec.rows(part)
        if kind == "bias":
            assert self._bias is not None
            self._bias[rows].copy_(tensor)
            return
        if self._plain is None:
            self._packed = None
            self._plain = self._place.empty(self._spec.out_size, self._spec.in_size)
            self._unfilled = set(self._spec.parts)
        self._plain[rows].copy_(tensor)
        self._unfilled.discard(part)
        if not self._unfilled:
            self._pack(self._plain)
            self._plain = None

    def finish(self) -> None:
        if self._tied is not None:
            self._packed = None
            self._pack(self._tied)
        assert self._packed is not None

    def release(self) -> None:
        self._plain = self._packed = None
        if self._bias is not None:
            storage.release(self._bias)

    def restore(self) -> None:
        if self._bias is not None:
            storage.restore(self._bias)

    def apply(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return result

    def _pack(self, weight: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)


def why_not(place: Placement) -> str | None:
    """Why weights of this dtype cannot be packed on this device; None if they can."""
    if place.device.type != "cpu":
        return "it is for device=cpu"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this build of torch has no oneDNN"
    try:
        with torch.inference_mode():
            weight = torch.ones(2, 2, dtype=place.dtype)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            torch.ops.mkldnn._linear_pointwise(weight, packed, None, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        return f"this torch or processor cannot pack {place.dtype}: {error}"
    return None
