"""Runs the model as one graph of torch.compile, for batches of any size.

torch compiles the element-wise work, and fuses it. Attention stays the backend's, and a packed
product its linear method's: both are operators that the graph calls.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tokasaurus.errors import ConfigError
from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.backend.base import Attention, Backend, HeadNorms, Rotation
from tokasaurus.model.worker.slot_state import PlannedBatch

__all__ = ["CompiledRunner"]


# torch counts the graphs of all models of a process together, and refuses more. Each model has two.
_MOST_GRAPHS = 1024


class _Current(threading.local):
    """The attention of the batch that this thread runs: a graph cannot hold it."""

    attention: Attention | None = None


_current = _Current()

_library = torch.library.Library("tokasaurus_attention", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attend(Tensor heads, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, float eps,"
    " int layer, int out_size) -> Tensor"
)


class CompiledRunner:
    """Implements ``LayersRunner``.

    A graph is compiled for batches of one row, and another for all others, whose number of rows is
    a variable. ``warm_up`` compiles both.

    Args:
        model: its layers use the reference operators and opaque linear methods.
        backend: their attention.
        num_heads: query heads.
        head_dim: numbers of a head.
        options: arguments of torch.compile, such as mode or options.

    Raises:
        ConfigError: torch.compile does not know these arguments.
    """

    def __init__(
        self,
        model: LlamaModel,
        backend: Backend,
        num_heads: int,
        head_dim: int,
        options: Mapping[str, Any],
    ) -> None:
        self._backend = backend
        self._is_last = model.is_last
        self._attention = _OpaqueAttention(num_heads * head_dim)
        self._num_expected = 0
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, _MOST_GRAPHS)
        arguments = {"dynamic": True, "fullgraph": True, **options}
        try:
            self._forward = torch.compile(model, **arguments)
        except (TypeError, RuntimeError, ValueError) as error:
            raise ConfigError(f"torch_compile_config={dict(options)!r}: {error}") from error

    def run(self, planned: PlannedBatch) -> Tensor:
        # A batch may consist of changes to the tables, without any row.
        if not planned.num_rows:
            return torch.empty(0, 0, device=planned.inputs.device)
        attention = self._backend.plan(planned.sequences)
        hidden = self.call_layers(planned.inputs, planned.positions, attention)
        # A graph may write its next result to the same place.
        return hidden if self._is_last else hidden.clone()

    def call_layers(self, inputs: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        _current.attention = attention
        hidden: Tensor = self._forward(inputs, positions, self._attention)
        return hidden

    def warmed_up(self) -> None:
        self._num_expected = _num_graphs()

    @property
    def num_recompiles(self) -> int:
        return _num_graphs() - self._num_expected

    def addresses_changed(self) -> None:
        """Does nothing: a graph finds each tensor as it runs."""


class _OpaqueAttention:
    """Implements ``Attention`` by that of the current batch."""

    def __init__(self, out_size: int) -> None:
        self._out_size = out_size

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        query_norm, key_norm, eps = (None, None, 0.0) if norms is None else norms
        result: Tensor = torch.ops.tokasaurus_attention.attend(
            heads, rotation.cos, rotation.sin, query_norm, key_norm, eps, layer, self._out_size
        )
        return result


@torch.library.impl(_library, "attend", "CompositeExplicitAutograd")
def _attend(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    layer: int,
    out_size: int,
) -> Tensor:
    norms = None
    if query_norm is not None and key_norm is not None:
        norms = HeadNorms(query_norm, key_norm, eps)
    assert _current.attention is not None
    return _current.attention.attend(layer, heads, Rotation(cos, sin), norms)


@torch.library.register_fake("tokasaurus_attention::attend", lib=_library)  # type: ignore[untyped-decorator]
def _attend_shape(
    heads: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    layer: int,
    out_size: int,
) -> Tensor:
    return heads.new_empty(heads.shape[0], out_size)


def _num_graphs() -> int:
    """Graphs that torch has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])
