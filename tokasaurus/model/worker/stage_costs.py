"""Measures what layers and head cost on this machine, to divide a model into equal stages."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tokasaurus.model.architectures.registry import get_model_cls
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.layers.linear import Linear
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

# Rows of the batch whose products are timed: a usual batch that decodes.
_NUM_ROWS = 64
_REPETITIONS = 5


def choose_stage(ranks: Ranks, config: ModelConfig, place: Placement) -> range:
    """The layers of this rank's stage.

    Rank 0 measures the products of one layer and of the head. The embedding and what else a stage
    does take next to nothing beside them. All stages are made to take about the same time.

    Args:
        ranks: of the replica.
        config: of the whole model.
        place: of the model.
    """
    if ranks.pp_size == 1:
        return range(config.num_layers)
    costs = _measured(config, place) if ranks.rank == 0 else [0.0, 0.0]
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
def _measured(config: ModelConfig, place: Placement) -> list[float]:
    """Seconds of the products of one layer, and of the head."""
    # Memory of its own, which is free again before the weights are read.
    place = replace(place, memory=Region())
    one_layer = replace(config, num_layers=1)
    model = get_model_cls(config.architecture)(one_layer, place)
    weights = Weights(model, model.WEIGHTS, 1)
    fill_all(weights, dummy_tensors(weights.shapes), "random weights")
    layers = [each for each in model.layers.modules() if isinstance(each, Linear)]
    return [_seconds(layers, place), _seconds([model.head], place)]


def _seconds(products: list[Linear], place: Placement) -> float:
    inputs = [
        torch.ones(_NUM_ROWS, each.spec.in_size, dtype=place.dtype, device=place.device)
        for each in products
    ]

    def run() -> None:
        for product, x in zip(products, inputs, strict=True):
            product(x)

    return _median_seconds(run, inputs[0])


def _median_seconds(run: Callable[[], None], some: Tensor) -> float:
    times = []
    for _ in range(_REPETITIONS):
        wait_for_device(some.device)
        started = time.perf_counter()
        run()
        wait_for_device(some.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)
