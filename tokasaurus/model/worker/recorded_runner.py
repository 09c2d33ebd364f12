"""Runs the layers on a CPU without Python: their kernels' calls are recorded, and then repeated."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.backend.base import Rotation
from tokasaurus.model.backend.cpu.calls import NotRecordable, Recording
from tokasaurus.model.backend.cpu.compiled import CompiledAttention, CompiledBackend
from tokasaurus.model.worker.slot_state import PlannedBatch

__all__ = ["RecordedRunner"]

log = logging.getLogger(__name__)


class RecordedRunner:
    """Implements ``Runner``.

    Args:
        model: the layers. If they do more than call kernels, they are called anew for each batch.
        backend: their attention.
        max_rows: of a batch.
    """

    def __init__(self, model: LlamaModel, backend: CompiledBackend, max_rows: int) -> None:
        self._model, self._backend, self._max_rows = model, backend, max_rows
        self._recorded: _Layers | None = None
        self._is_recordable = True

    def run(self, planned: PlannedBatch) -> Tensor:
        # A batch may consist of changes to the tables, without any row.
        if not planned.num_rows:
            return torch.empty(0, 0)
        attention = self._backend.plan(planned.sequences)
        stream, rotation = self._model.enter(planned.inputs, planned.positions)
        if self._recorded is None and self._is_recordable:
            self._record(stream, rotation, attention)
        if self._recorded is None:
            update = self._model.run_layers(stream, rotation, attention)
        else:
            stream, update = self._recorded.run(stream, rotation, attention)
        return self._model.leave(stream, update)

    def _record(self, stream: Tensor, rotation: Rotation, attention: CompiledAttention) -> None:
        try:
            self._recorded = _Layers(self._model, self._max_rows, stream, rotation, attention)
        except NotRecordable as reason:
            self._is_recordable = False
            log.info("Python calls the kernels of each batch: %s", reason)

    @property
    def num_recompiles(self) -> int:
        return 0

    def warmed_up(self) -> None:
        """Does nothing: there is nothing to compile."""

    def addresses_changed(self) -> None:
        self._recorded = None


class _Layers:
    """A recording of the layers, with its inputs and outputs.

    Args:
        model: the layers.
        max_rows: of a batch.
        stream: of the first batch: its size and dtype are those of all batches.
        rotation: of the first batch.
        attention: of any batch.

    Raises:
        NotRecordable: the layers do more than call kernels.
    """

    def __init__(
        self,
        model: LlamaModel,
        max_rows: int,
        stream: Tensor,
        rotation: Rotation,
        attention: CompiledAttention,
    ) -> None:
        self._recording = Recording(max_rows)
        self._stream = self._recording.buffer(max_rows, stream.shape[1], stream.dtype)
        # [rows, 1, half of a head]
        half = rotation.cos.shape[2]
        self._angles = [
            self._recording.buffer(max_rows, half, angle.dtype)[:, None, :] for angle in rotation
        ]
        with self._recording:
            self._update = model.run_layers(self._stream, Rotation(*self._angles), attention)

    def run(
        self, stream: Tensor, rotation: Rotation, attention: CompiledAttention
    ) -> tuple[Tensor, Tensor]:
        """The stream after the layers, and the last update."""
        num_rows = len(stream)
        self._stream[:num_rows] = stream
        for kept, angle in zip(self._angles, rotation, strict=True):
            kept[:num_rows] = angle
        attention.select()
        self._recording.run(num_rows)
        return self._stream[:num_rows], self._update[:num_rows]
