"""Which runner runs the layers: as flags, the device and the backend allow."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.model.backend.base import Backend
from tokasaurus.model.backend.cpu.compiled import CompiledBackend
from tokasaurus.model.worker.device_graphs import CudaGraphs
from tokasaurus.model.worker.graphed_runner import graphed
from tokasaurus.model.worker.loading import Kernels, LoadedModel
from tokasaurus.model.worker.overlapped_runner import OverlappedRunner
from tokasaurus.model.worker.recorded_runner import RecordedRunner
from tokasaurus.model.worker.runner import EagerRunner, LayersRunner, Runner

__all__ = ["make_runner"]


def make_runner(
    config: WorkerConfig,
    kernels: Kernels,
    loaded: LoadedModel,
    backend: Backend,
    page_table: Tensor,
) -> Runner:
    """A runner of the layers.

    Args:
        config: the worker's.
        kernels: as chosen.
        loaded: the layers.
        backend: their attention.
        page_table: of all slots, which stays at its address.
    """
    runner: Runner
    if not config.torch_compile and isinstance(backend, CompiledBackend):
        runner = RecordedRunner(loaded.model, backend, config.max_tokens_per_forward)
    else:
        layers = _layers_runner(config, kernels, loaded, backend)
        runner = _with_graphs(config, kernels, loaded, backend, page_table, layers)
    if loaded.overlap is not None:
        runner = OverlappedRunner(runner, loaded.model, backend, loaded.overlap)
    return runner


def _layers_runner(
    config: WorkerConfig, kernels: Kernels, loaded: LoadedModel, backend: Backend
) -> LayersRunner:
    if not config.torch_compile:
        return EagerRunner(loaded.model, backend)
    # To import what compiles takes seconds.
    from tokasaurus.model.worker.compiled_runner import CompiledRunner

    options = json.loads(config.torch_compile_config or "{}")
    heads = kernels.heads
    return CompiledRunner(loaded.model, backend, heads.num_heads, heads.head_dim, options)


def _with_graphs(
    config: WorkerConfig,
    kernels: Kernels,
    loaded: LoadedModel,
    backend: Backend,
    page_table: Tensor,
    runner: LayersRunner,
) -> Runner:
    """Decodes run as graphs, if the device and the backend have them."""
    device: torch.device = page_table.device
    if device.type != "cuda" or not config.cudagraph_sizes:
        return runner
    return graphed(
        runner,
        backend,
        loaded.model,
        kernels.model.hidden_size,
        kernels.place.dtype,
        page_table,
        config.cudagraph_sizes,
        config.cudagraph_max_tokens,
        lambda: CudaGraphs(device),
    )
