"""Runs large batches so that products overlap with what ranks exchange, and others as usual."""

from __future__ import annotations

from torch import Tensor

from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.backend.base import Backend
from tokasaurus.model.parallel.async_tp import Overlap
from tokasaurus.model.worker.runner import Runner
from tokasaurus.model.worker.slot_state import PlannedBatch

__all__ = ["OverlappedRunner"]


class OverlappedRunner:
    """Implements ``Runner``.

    Args:
        runner: of all other batches.
        model: the layers, whose linear methods overlap.
        backend: their attention.
        overlap: of the ranks.
    """

    def __init__(
        self, runner: Runner, model: LlamaModel, backend: Backend, overlap: Overlap
    ) -> None:
        self._runner, self._model, self._backend = runner, model, backend
        self._overlap = overlap

    def run(self, planned: PlannedBatch) -> Tensor:
        num_rows = planned.num_rows
        if not num_rows or not self._overlap.covers(num_rows):
            return self._runner.run(planned)
        attention = self._backend.plan(planned.sequences)
        stream, rotation = self._model.enter(planned.inputs, planned.positions)
        with self._overlap.dealing(num_rows):
            stream = self._overlap.own(stream)
            update = self._model.run_layers(stream, rotation, attention)
            return self._overlap.whole(self._model.leave(stream, update))

    @property
    def num_recompiles(self) -> int:
        return self._runner.num_recompiles

    def warmed_up(self) -> None:
        self._runner.warmed_up()

    def addresses_changed(self) -> None:
        self._runner.addresses_changed()
