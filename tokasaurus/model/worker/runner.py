"""Runs the model on planned batches: the seam between the worker and the way of running it.

A runner owns how the layers are called. It knows nothing of numbers of batches, sampling or
results.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.backend.base import Attention, Backend
from tokasaurus.model.worker.slot_state import PlannedBatch

__all__ = ["EagerRunner", "LayersRunner", "Runner"]


class Runner(Protocol):
    """Runs one batch after the other.

    The page table and the last tokens of ``SlotState`` stay at their addresses as long as the
    worker lives; the weights and the KV cache until ``addresses_changed`` is called. So a runner
    may record kernels that read them. The ids and positions of a batch are new tensors: a runner
    that replays recorded kernels copies them into its own buffers.
    """

    def run(self, planned: PlannedBatch) -> Tensor:
        """Enqueues the layers, and does not wait for them.

        Returns:
            Hidden states of all rows, [rows, hidden]; of the last stage, after the last norm, and
            read before the next batch runs. Those of other stages are a tensor of their own, which
            is on its way to the next stage while later batches run.
        """
        ...

    def warmed_up(self) -> None:
        """The batches of the warm-up have run: nothing needs to be compiled from now on."""
        ...

    @property
    def num_recompiles(self) -> int:
        """Graphs that were compiled after the warm-up, while requests waited."""
        ...

    def addresses_changed(self) -> None:
        """Weights or KV cache will lie at other addresses when the next batch runs.

        They are the same tensor objects. Called when the device is idle: after memory was
        released, which is allocated again before the next batch, and after an update of weights,
        which a linear method may lay out anew. A runner with recorded kernels drops them here,
        with their memory, and records them anew before it replays the next batch. So does a runner
        that keeps addresses or views of storage.
        """
        ...


class LayersRunner(Runner, Protocol):
    """A runner whose layers can be called apart from a batch, to record them."""

    def call_layers(self, inputs: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """Enqueues the layers, and does not wait for them.

        Args:
            inputs: as in ``PlannedBatch``.
            positions: [rows] int64.
            attention: of these rows.

        Returns:
            [rows, hidden].
        """
        ...


class EagerRunner:
    """Implements ``LayersRunner``: calls the model's layers anew for each batch.

    Args:
        model: the layers.
        backend: their attention.
    """

    def __init__(self, model: LlamaModel, backend: Backend) -> None:
        self._model = model
        self._backend = backend

    def run(self, planned: PlannedBatch) -> Tensor:
        # A batch may consist of changes to the tables, without any row.
        if not planned.num_rows:
            return torch.empty(0, 0, device=planned.inputs.device)
        attention = self._backend.plan(planned.sequences)
        return self.call_layers(planned.inputs, planned.positions, attention)

    def call_layers(self, inputs: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        hidden: Tensor = self._model(inputs, positions, attention)
        return hidden

    @property
    def num_recompiles(self) -> int:
        return 0

    def warmed_up(self) -> None:
        """Does nothing: there is nothing to compile."""

    def addresses_changed(self) -> None:
        """Does nothing: the layers find each tensor as they run."""
