"""Runs batches of decodes as graphs of the device, and other batches as usual.

A graph has a fixed number of rows. A batch is copied to the first rows of its tensors, and runs as
the smallest graph that has room for it::

    graphs of 16, 32 and 48 rows         tensors of 48 rows, whose beginnings all graphs read

    batch of 20 decodes  ->  graph of 32: 20 rows │ 12 rows without a sequence
    batch of 60 decodes  ->  as usual
    20 decodes, a chunk  ->  as usual

A graph contains the layers, with their attention. What the rows draw comes after it, so every
feature of sampling is there for every batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokasaurus.errors import EngineError
from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.backend.base import Backend, GraphPlan, SequenceRows
from tokasaurus.model.worker.device_graphs import DeviceGraph, DeviceGraphs
from tokasaurus.model.worker.runner import LayersRunner, Runner
from tokasaurus.model.worker.slot_state import PlannedBatch

__all__ = ["GraphedRunner", "graphed"]

log = logging.getLogger(__name__)


def graphed(
    runner: LayersRunner,
    backend: Backend,
    model: LlamaModel,
    hidden_size: int,
    dtype: torch.dtype,
    page_table: Tensor,
    sizes: Sequence[int],
    max_tokens: int,
    new_graphs: Callable[[], DeviceGraphs],
) -> Runner:
    """A runner with graphs; the given one if the backend has none.

    Args:
        runner: of all other batches.
        backend: its attention.
        model: the layers, which may be a stage of a pipeline.
        hidden_size: of the model.
        dtype: of hidden states.
        page_table: as for ``GraphedRunner``, as the next three are.
        sizes: at least one.
        max_tokens: of a sequence.
        new_graphs: makes the device's graphs.
    """
    if backend.graph_plan(sizes[0], page_table, max_tokens) is None:
        log.warning("attention=%s has no CUDA graphs: all batches run without", backend.name)
        return runner
    shape = (sizes[-1],) if model.is_first else (sizes[-1], hidden_size)
    inputs = torch.zeros(
        shape, dtype=torch.int64 if model.is_first else dtype, device=page_table.device
    )
    return GraphedRunner(
        runner,
        backend,
        inputs,
        page_table,
        sizes,
        max_tokens,
        new_graphs,
        is_last=model.is_last,
    )


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A graph, and the tensors that are its own.

    Attributes:
        num_rows: that it has room for.
        plan: of its attention.
        graph: of the layers.
        hidden: [rows, hidden], what the layers return.
    """

    num_rows: int
    plan: GraphPlan
    graph: DeviceGraph
    hidden: Tensor


class GraphedRunner:
    """Implements ``Runner``.

    Graphs are recorded at the end of the warm-up, the largest first, so that smaller ones find room
    in its memory. After a change of addresses they are recorded again when a batch needs one.

    Args:
        runner: of all other batches; its layers are recorded.
        backend: their attention.
        inputs: [rows of the largest graph] int64 for ids, or [rows, hidden] for a later stage of a
            pipeline: room for the inputs of a batch.
        page_table: [slots, columns] int32, that of every batch.
        sizes: of the graphs, in rows, ascending.
        max_tokens: of a sequence in a graph.
        new_graphs: makes the device's graphs.
        is_last: the stage is the last one.
    """

    def __init__(
        self,
        runner: LayersRunner,
        backend: Backend,
        inputs: Tensor,
        page_table: Tensor,
        sizes: Sequence[int],
        max_tokens: int,
        new_graphs: Callable[[], DeviceGraphs],
        *,
        is_last: bool = True,
    ) -> None:
        self._runner, self._backend = runner, backend
        self._inputs, self._page_table = inputs, page_table
        self._positions = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        self._sizes, self._max_tokens = tuple(sizes), max_tokens
        self._new_graphs, self._is_last = new_graphs, is_last
        self._recorded: list[_Recorded] = []
        self._is_warm = False

    def run(self, planned: PlannedBatch) -> Tensor:
        recorded = self._graph_of(planned.sequences, planned.num_rows)
        if recorded is None:
            return self._runner.run(planned)
        num_rows = planned.num_rows
        self._inputs[:num_rows].copy_(planned.inputs)
        self._positions[:num_rows].copy_(planned.positions)
        recorded.graph.replay()
        hidden = recorded.hidden[:num_rows]
        # Those of other stages are still on their way when the next batch runs.
        return hidden if self._is_last else hidden.clone()

    def warmed_up(self) -> None:
        self._is_warm = True
        if not self._recorded:
            self._record()
        self._runner.warmed_up()

    @property
    def num_recompiles(self) -> int:
        return self._runner.num_recompiles

    def addresses_changed(self) -> None:
        self._recorded.clear()
        self._runner.addresses_changed()

    def _graph_of(self, rows: SequenceRows, num_rows: int) -> _Recorded | None:
        """A graph that is planned for these rows; None if they run as usual."""
        if not (self._is_warm and 0 < num_rows <= self._sizes[-1]):
            return None
        if rows.num_decodes < num_rows or rows.most_tokens() > self._max_tokens:
            return None
        if not self._recorded:
            self._record()
        recorded = next(each for each in self._recorded if each.num_rows >= num_rows)
        return recorded if recorded.plan.fill(rows) else None

    @torch.inference_mode()
    def _record(self) -> None:
        started = time.perf_counter()
        graphs = self._new_graphs()
        try:
            for num_rows in reversed(self._sizes):
                self._recorded.insert(0, self._record_one(graphs, num_rows))
        except Exception as error:
            raise EngineError(
                f"batches cannot run as CUDA graphs ({type(error).__name__}: {error}); set"
                " use_cudagraphs=F"
            ) from error
        log.info(
            "recorded %d CUDA graphs of %d to %d rows in %.1f s",
            len(self._sizes),
            self._sizes[0],
            self._sizes[-1],
            time.perf_counter() - started,
        )

    def _record_one(self, graphs: DeviceGraphs, num_rows: int) -> _Recorded:
        plan = self._backend.graph_plan(num_rows, self._page_table, self._max_tokens)
        assert plan is not None  # the worker has asked
        # The layers run without any sequence now: pages may be in use.
        plan.fill(None)
        inputs, positions = self._inputs[:num_rows], self._positions[:num_rows]
        graph, hidden = graphs.record(
            lambda: self._runner.call_layers(inputs, positions, plan.attention())
        )
        return _Recorded(num_rows, plan, graph, hidden)
