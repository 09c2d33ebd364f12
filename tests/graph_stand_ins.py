"""CUDA graphs on a machine without CUDA: a recorder of operators, and attention that it can record.

The recorder does what a device does with a graph: it repeats the operators on the same memory, and
runs no Python between them. So a number that Python has read, or memory that was made for one
batch, stays what it was when the graph was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from tokasaurus.model.backend.base import NO_GROUPED_ROWS, HeadNorms, Rotation, SequenceRows
from tokasaurus.model.backend.reference import ReferenceBackend
from tokasaurus.model.backend.reference_operators import norm_and_rotate
from tokasaurus.model.worker.device_graphs import DeviceGraph, DeviceGraphs
from tokasaurus.model.worker.graphed_runner import GraphedRunner, graphed
from tokasaurus.model.worker.worker import Worker
from tokasaurus.rounding import ceil_div

__all__ = ["PaddedBackend", "RecordingGraphs", "RepeatingGraphs", "add_graphs", "launch_recorded"]

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


def add_graphs(
    worker: Worker,
    sizes: tuple[int, ...],
    max_tokens: int = 1 << 20,
    new_graphs: Callable[[GraphRun], DeviceGraphs] | None = None,
) -> GraphRun:
    """Lets a worker that has not warmed up run decodes as recorded graphs."""
    graphs = GraphRun()
    new_graphs = new_graphs or RecordingGraphs
    config = worker._kernels.model
    runner = graphed(
        worker._runner,
        worker._backend,
        worker._model,
        config.hidden_size,
        worker._cache.dtype,
        worker._state.page_table,
        sizes,
        max_tokens,
        lambda: new_graphs(graphs),
    )
    assert isinstance(runner, GraphedRunner)
    worker._runner = worker._controls._runner = runner
    return graphs


class GraphRun:
    """What was recorded and replayed.

    Attributes:
        recorded: the rows of each graph, in order.
        replayed: the same of each replay.
    """

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []


class RecordingGraphs:
    """Implements ``DeviceGraphs`` on the CPU. All its graphs use the same memory."""

    def __init__(self, run: GraphRun | None = None) -> None:
        self._run = run or GraphRun()
        self.memory: list[Tensor] = []

    def record(self, work: Callable[[], Tensor]) -> tuple[DeviceGraph, Tensor]:
        work()
        recorder = _Recorder()
        with recorder:
            result = work()
        self.memory += recorder.made
        self._run.recorded.append(len(result))
        return _Graph(recorder.steps, self, self._run, len(result)), result


class RepeatingGraphs:
    """Implements ``DeviceGraphs`` by doing the work again.

    What torch.compile has compiled does not run while operators are recorded.
    """

    def __init__(self, run: GraphRun) -> None:
        self._run = run

    def record(self, work: Callable[[], Tensor]) -> tuple[DeviceGraph, Tensor]:
        work()
        result = work()
        self._run.recorded.append(len(result))
        return _Repeated(work, result, self._run), result


@dataclass(frozen=True)
class _Repeated:
    work: Callable[[], Tensor]
    result: Tensor
    run: GraphRun

    def replay(self) -> None:
        self.run.replayed.append(len(self.result))
        self.result.copy_(self.work())


@dataclass(frozen=True)
class _Address:
    """Memory that a graph has not made, and does not keep alive."""

    storage: StorageWeakRef
    like: tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, tensor: Tensor) -> _Address:
        like = (tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return cls(StorageWeakRef(tensor.untyped_storage()), like)

    def tensor(self) -> Tensor:
        assert not self.storage.expired(), "the graph reads memory that was freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        dtype, *where = self.like
        return torch.empty(0, dtype=dtype).set_(storage, *where)


@dataclass(frozen=True)
class _Step:
    function: Any
    arguments: list[Any]
    structure: Any
    results: list[Any]


class _Recorder(TorchDispatchMode):
    current: _Recorder | None = None

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self.made: list[Tensor] = []
        self._made: set[int] = set()
        self._others: set[int] = set()

    def __enter__(self):
        _Recorder.current = self
        return super().__enter__()

    def __exit__(self, *error):
        _Recorder.current = None
        return super().__exit__(*error)

    def launch(self, kernel, args, kwargs) -> None:
        flat, structure = tree_flatten((args, kwargs))
        self.steps.append(_Step(kernel, [self._kept(each) for each in flat], structure, []))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        waits = name in _WAITING or (name.startswith("index") and _has_mask(args))
        assert not waits, f"{name} waits for the device, which is recording"
        flat, structure = tree_flatten((args, kwargs or {}))
        arguments = [self._kept(each) for each in flat]
        result = function(*args, **(kwargs or {}))
        results = tree_flatten(result)[0]
        for each in results:
            if isinstance(each, Tensor) and _memory(each) not in self._others | self._made:
                self._made.add(_memory(each))
                self.made.append(each)
        self.steps.append(
            _Step(function, arguments, structure, [self._kept(each) for each in results])
        )
        return result

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or _memory(value) in self._made:
            return value
        self._others.add(_memory(value))
        return _Address.of(value)


class _Graph:
    def __init__(
        self, steps: list[_Step], graphs: RecordingGraphs, run: GraphRun, num_rows: int
    ) -> None:
        self._steps, self._graphs, self._run, self._num_rows = steps, graphs, run, num_rows

    def replay(self) -> None:
        self._run.replayed.append(self._num_rows)
        for tensor in self._graphs.memory:
            # Another graph has used it meanwhile.
            storage = tensor.untyped_storage()
            torch.empty(0, dtype=torch.uint8).set_(storage, 0, (len(storage),), (1,)).fill_(255)
        for step in self._steps:
            args, kwargs = tree_unflatten([_found(each) for each in step.arguments], step.structure)
            returned = step.function(*args, **kwargs)
            results = tree_flatten(returned)[0] if step.results else []
            for old, new in zip(step.results, results, strict=True):
                old = _found(old)
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _found(value: Any) -> Any:
    return value.tensor() if isinstance(value, _Address) else value


def _has_mask(args: tuple[Any, ...]) -> bool:
    indices = tree_flatten(args[1])[0] if len(args) > 1 else []
    return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in indices)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def launch_recorded(run: Callable[..., None]) -> Callable[..., None]:
    """Around the method of Triton's interpreter that runs a kernel: records it, too."""

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        if _Recorder.current is None:
            run(kernel, *args, **kwargs)
        else:
            _Recorder.current.launch(partial(run, kernel), args, kwargs)
            with _disable_current_modes():
                run(kernel, *args, **kwargs)

    return launch


class PaddedBackend(ReferenceBackend):
    """The reference, and attention of decodes whose shapes do not depend on the batch."""

    def graph_plan(self, num_rows: int, page_table: Tensor, max_tokens: int) -> _PaddedPlan:
        return _PaddedPlan(self, num_rows, page_table, max_tokens)


class _PaddedPlan:
    """Implements ``GraphPlan``."""

    def __init__(
        self, backend: PaddedBackend, num_rows: int, page_table: Tensor, max_tokens: int
    ) -> None:
        self._backend, self._num_rows, self._is_filled = backend, num_rows, False
        num_columns = min(ceil_div(max_tokens, backend._cache.page_size), page_table.shape[1])
        self._attention = _PaddedAttention(
            backend, page_table[:, :num_columns], torch.zeros(4, num_rows, dtype=torch.int64)
        )

    def attention(self) -> _PaddedAttention:
        assert self._is_filled, "it has never been filled"
        return self._attention

    def fill(self, rows: SequenceRows | None) -> bool:
        plan = np.zeros((4, self._num_rows), np.int64)
        if rows is not None:
            if len(rows.groups) and self._backend._uses_groups:
                return False
            count = len(rows.slots)
            plan[0, :count], plan[1, :count] = rows.slots, rows.kv_lengths
            plan[2, :count], plan[3, :count] = np.arange(count), 1
            plan[:3, count:] = plan[:3, :1]
        self._attention.plan.copy_(torch.from_numpy(plan))
        self._backend.grouped_rows = NO_GROUPED_ROWS
        self._is_filled = True
        return True


class _PaddedAttention:
    """Rows without a sequence repeat the first one. If there is no sequence, they change nothing.

    Args:
        backend: whose cache and heads these are.
        page_table: [slots, columns].
        plan: [4, rows]: slots, lengths, the row whose key is written, whether there is a sequence.
    """

    def __init__(self, backend: PaddedBackend, page_table: Tensor, plan: Tensor) -> None:
        self._backend, self._page_table, self.plan = backend, page_table, plan

    def attend(
        self, layer: int, heads: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        cache, num_heads = self._backend._cache, self._backend._num_heads
        slots, lengths, sources, exists = self.plan
        query, key, value = norm_and_rotate(heads, num_heads, cache.num_kv_heads, rotation, norms)
        keys, values = cache.keys[layer], cache.values[layer]
        pages = self._page_table[slots].long()
        at = (lengths - 1).clamp(min=0)
        page = pages.gather(1, (at // cache.page_size)[:, None])[:, 0]
        offset = at % cache.page_size
        for tensor, new in ((keys, key), (values, value)):
            new = torch.where(exists[0] > 0, new[sources], tensor[page, :, offset])
            tensor[page, :, offset] = new
        visible = torch.arange(pages.shape[1] * cache.page_size) < lengths[:, None]
        mixed = []
        for tensor in (keys, values):
            # [rows, kv_heads, positions, head_dim]
            found = tensor[pages].transpose(1, 2).flatten(2, 3).float()
            mixed.append(found.where(visible[:, None, :, None], 0.0))
        group = num_heads // cache.num_kv_heads
        grouped = query.float().unflatten(1, (cache.num_kv_heads, group))
        scores = torch.einsum("rkgd,rkld->rkgl", grouped, mixed[0]) * cache.head_dim**-0.5
        shares = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
        return torch.einsum("rkgl,rkld->rkgd", shares, mixed[1]).flatten(1).to(heads.dtype)
