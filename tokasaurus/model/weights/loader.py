"""Builds a model and fills it from a source of (name, tensor), one tensor after the other.

The model's tensors are allocated first, and each is copied to its place as it is read, so loading
needs no second copy of the weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from tokasaurus.errors import ModelError
from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.architectures.registry import get_model_cls
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.linear_methods.registry import check_linear
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.checkpoint import checkpoint_tensors
from tokasaurus.model.weights.dummy import dummy_tensors
from tokasaurus.model.weights.weights import Weights, listing

__all__ = ["load_model"]

log = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    config: ModelConfig,
    place: Placement,
    load_format: str = "auto",
    stage: range | None = None,
) -> tuple[LlamaModel, Weights]:
    """Builds the model of ``config`` and fills it.

    Args:
        path: the directory with ``model.safetensors``, or with shards and their index.
        config: of the same directory.
        place: the dtype to convert to, and the device.
        load_format: "auto" reads the checkpoint; "dummy" makes random weights and reads no file.
        stage: the numbers of the layers to build; None builds the whole model.

    Returns:
        The model, and its weights, which can be filled anew.

    Raises:
        ModelError: names the file or the tensor, and a remedy where there is one.
        ConfigError: the linear method of ``place`` cannot run here.
    """
    started = time.perf_counter()
    check_linear(place)
    # The files are looked at first: if one is missing, no memory is allocated.
    tensors = checkpoint_tensors(Path(path)) if load_format == "auto" else None
    model = get_model_cls(config.architecture)(config, place, stage)
    weights = Weights(model, model.WEIGHTS, config.num_layers, stage)
    fill_all(weights, tensors or dummy_tensors(weights.shapes), f"the checkpoint in {path}")
    log.info(
        "loaded %s parameters of %s in %.1f s%s",
        _readable(weights.num_parameters),
        config.architecture,
        time.perf_counter() - started,
        ", random ones" if load_format == "dummy" else "",
    )
    return model, weights


def fill_all(weights: Weights, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Fills a model's weights, all of them.

    Args:
        weights: to fill.
        tensors: by the checkpoint's names, in any order.
        source: where they come from, for errors.

    Raises:
        ModelError: names the tensors that are wrong, unknown or missing.
    """
    unknown: list[str] = []
    for name, tensor in tensors:
        if weights.uses(name):
            weights.fill(name, tensor)
        elif not weights.ignores(name):
            unknown.append(name)
    if unknown:
        raise ModelError(
            f"{source} has tensors that this architecture does not use: {listing(unknown)}"
        )
    if missing := weights.missing():
        raise ModelError(f"{source} lacks tensors: {listing(missing)}")
    weights.finish()


def _readable(count: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return str(count)
