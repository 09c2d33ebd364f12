"""Measures what layers and head cost on this machine, to divide a model into equal stages."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.architectures.registry import get_model_cls
from tokasaurus.model.backend.base import Backend, BackendOptions, SequenceRows
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.kv_cache import KVCache
from tokasaurus.model.parallel.ranks import Ranks
from tokasaurus.model.parallel.stages import divide_layers
from tokasaurus.model.placement import Placement
from tokasaurus.model.storage import Region
from tokasaurus.model.weights.dummy import dummy_tensors
from tokasaurus.model.weights.loader import fill_all
from tokasaurus.model.weights.weights import Weights
from tokasaurus.model.worker.clock import wait_for_device

__all__ = ["choose_stage"]

log = logging.getLogger(__name__)

# A usual batch: sequences that decode, with this number of positions each. Beside them come
# prompts, whose rows pass the layers and not the head. So the head has half as many rows.
_NUM_ROWS, _HEAD_ROWS = 64, 32
_CONTEXT, _PAGE_SIZE = 256, 16
_REPETITIONS = 7


def choose_stage(
    ranks: Ranks,
    config: ModelConfig,
    place: Placement,
    backend: type[Backend],
    options: BackendOptions,
) -> range:
    """The layers of this rank's stage.

    Rank 0 measures a layer and the head. The embedding and what else a stage does take next to
    nothing beside them. All stages are made to take about the same time.

    Args:
        ranks: of the replica.
        config: of the whole model.
        place: of the model.
        backend: of the attention.
        options: of the backend.
    """
    if ranks.pp_size == 1:
        return range(config.num_layers)
    costs = [0.0, 0.0]
    if ranks.rank == 0:
        costs = _measured(config, place, backend, options)
    layer_s, head_s = ranks.of_first(costs)
    stages = divide_layers(config.num_layers, ranks.pp_size, layer_s, 0.0, head_s)
    log.info(
        "stage %d of %d has layers %d to %d; stages have %s layers, where the head takes as long as"
        " %.1f of them",
        ranks.stage,
        ranks.pp_size,
        stages[ranks.stage].start,
        stages[ranks.stage].stop - 1,
        ", ".join(str(len(stage)) for stage in stages),
        head_s / layer_s,
    )
    return stages[ranks.stage]


@torch.inference_mode()
def _measured(
    config: ModelConfig, place: Placement, backend: type[Backend], options: BackendOptions
) -> list[float]:
    """Seconds of one layer, and of the head."""
    # Memory of its own, which is free again before the weights are read.
    place = replace(place, memory=Region())
    model = get_model_cls(config.architecture)(replace(config, num_layers=1), place)
    weights = Weights(model, model.WEIGHTS, 1)
    fill_all(weights, dummy_tensors(weights.shapes), "random weights")
    cache = KVCache.allocate(
        num_layers=1,
        num_pages=_NUM_ROWS * _CONTEXT // _PAGE_SIZE,
        page_size=_PAGE_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=place.dtype,
        device=place.device,
    )
    for tensor in cache.keys + cache.values:
        tensor.zero_()
    attention = backend(cache, config.num_heads, options).plan(_decode_rows(cache))
    positions = torch.full((_NUM_ROWS,), _CONTEXT - 1, device=place.device)
    rotation = model.rotary(positions)
    hidden = torch.ones(_NUM_ROWS, config.hidden_size, dtype=place.dtype, device=place.device)
    return [
        _median_s(lambda: model.run_layers(hidden.clone(), rotation, attention), place.device),
        _median_s(lambda: model.head(hidden[:_HEAD_ROWS]), place.device),
    ]


def _decode_rows(cache: KVCache) -> SequenceRows:
    """A row of each sequence, at the end of its context. Each has pages of its own."""
    pages = torch.arange(cache.num_pages, dtype=torch.int32, device=cache.keys[0].device)
    ones = np.ones(_NUM_ROWS, np.int32)
    return SequenceRows(
        slots=np.arange(_NUM_ROWS, dtype=np.int32),
        query_starts=np.arange(_NUM_ROWS + 1, dtype=np.int32),
        kv_lengths=ones * np.int32(_CONTEXT),
        positions=ones * np.int32(_CONTEXT - 1),
        page_table=pages.view(_NUM_ROWS, -1),
        num_decodes=_NUM_ROWS,
    )


def _median_s(run: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    for _ in range(_REPETITIONS):
        wait_for_device(device)
        started = time.perf_counter()
        run()
        wait_for_device(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
