"""A linear method inside a graph of torch.compile, which cannot look into kernels of ours."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from tokasaurus.model.linear_methods.base import LinearMethod, WrappedLinear

__all__ = ["OpaqueLinear"]

_methods: weakref.WeakValueDictionary[int, OpaqueLinear] = weakref.WeakValueDictionary()

# Operators of torch, which graphs contain whole. A method is named by its number: a graph holds
# numbers and tensors alone.
_library = torch.library.Library("tokasaurus_linear", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "multiply(Tensor x, int method, int out_size) -> Tensor",
    "rows(Tensor ids, int method, int in_size, ScalarType dtype) -> Tensor",
):
    _library.define(_schema)  # type: ignore[no-untyped-call]


class OpaqueLinear(WrappedLinear):
    """Does what another method does, as an operator that torch.compile does not look into.

    Args:
        method: owns the tensors.
        in_size: columns of the weight.
        out_size: rows of the weight.
        dtype: of the tensors.
    """

    def __init__(
        self, method: LinearMethod, in_size: int, out_size: int, dtype: torch.dtype
    ) -> None:
        super().__init__(method)
        self._in_size, self._out_size, self._dtype = in_size, out_size, dtype
        self._number = id(self)
        _methods[self._number] = self

    def apply(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.tokasaurus_linear.multiply(x, self._number, self._out_size)
        return result

    def rows(self, ids: Tensor) -> Tensor:
        result: Tensor = torch.ops.tokasaurus_linear.rows(
            ids, self._number, self._in_size, self._dtype
        )
        return result


@torch.library.impl(_library, "multiply", "CompositeExplicitAutograd")
def _multiply(x: Tensor, method: int, out_size: int) -> Tensor:
    return _methods[method].method.apply(x)


@torch.library.register_fake("tokasaurus_linear::multiply", lib=_library)  # type: ignore[untyped-decorator]
def _multiply_shape(x: Tensor, method: int, out_size: int) -> Tensor:
    return x.new_empty(x.shape[0], out_size)


@torch.library.impl(_library, "rows", "CompositeExplicitAutograd")
def _rows(ids: Tensor, method: int, in_size: int, dtype: torch.dtype) -> Tensor:
    return _methods[method].method.rows(ids)


@torch.library.register_fake("tokasaurus_linear::rows", lib=_library)  # type: ignore[untyped-decorator]
def _rows_shape(ids: Tensor, method: int, in_size: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(ids.shape[0], in_size, dtype=dtype)
