"""What the matrix products of a run take alone: a bound for an engine with these products."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokasaurus.launch.embedded import EmbeddedEngine
from tokasaurus.model.layers.linear import Linear
from tokasaurus.protocol.messages import ForwardBatch, ToWorker

if TYPE_CHECKING:
    from tokasaurus import LLM
    from tokasaurus.model.worker.pending import Pending

__all__ = ["RecordedBatches"]


class RecordedBatches:
    """Remembers how many rows each batch of an engine had, and replays the products.

    Args:
        llm: the engine. From now on it calls this before each batch.
    """

    def __init__(self, llm: LLM) -> None:
        assert isinstance(llm._engine, EmbeddedEngine)
        worker = llm._engine._worker
        assert worker is not None
        layers = [each for each in worker._model.modules() if isinstance(each, Linear)]
        self._head = worker._model.head
        self._layers = [each for each in layers if each is not self._head]
        self._dtype = worker._cache.keys[0].dtype
        # Rows of the layers, and of the head.
        self._batches: list[tuple[int, int]] = []
        self._submit = worker.submit
        worker.submit = self._record  # type: ignore[method-assign]

    def clear(self) -> None:
        """Forgets all batches."""
        self._batches.clear()

    @torch.inference_mode()
    def replay(self, rounds: int) -> float:
        """Seconds of the products of all batches, the median of several rounds."""
        seconds = []
        inputs: dict[tuple[int, int], Tensor] = {}
        for _ in range(rounds + 1):
            started = time.perf_counter()
            for num_rows, num_drawn in self._batches:
                for layer in self._layers:
                    self._multiply(layer, num_rows, inputs)
                if num_drawn:
                    self._multiply(self._head, num_drawn, inputs)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])  # the first has made the inputs

    def _record(self, message: ToWorker) -> Pending:
        if isinstance(message, ForwardBatch):
            num_decodes = len(message.decode_slots)
            num_rows = num_decodes + len(message.prefill_ids)
            if num_rows:
                self._batches.append((num_rows, num_decodes + len(message.draw_slots)))
        return self._submit(message)

    def _multiply(
        self, layer: Linear, num_rows: int, inputs: dict[tuple[int, int], Tensor]
    ) -> None:
        shape = num_rows, layer.spec.in_size
        if shape not in inputs:
            inputs[shape] = torch.randn(shape).to(self._dtype)
        layer(inputs[shape])
