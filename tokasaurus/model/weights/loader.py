"""Builds a model and fills it from a source of (name, tensor), one tensor after the other.

The model's tensors are allocated first, and each is copied to its place as it is read, so loading
needs no second copy of the weights.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from tokasaurus.checkpoint_files import checkpoint_files
from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.architectures.registry import get_model_cls
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.linear_methods.registry import choose_linear
from tokasaurus.model.placement import Placement
from tokasaurus.model.weights.dummy import dummy_tensors
from tokasaurus.model.weights.weight_files import WeightFiles
from tokasaurus.model.weights.weights import Weights

__all__ = ["fill_all", "load_model"]

log = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    config: ModelConfig,
    place: Placement,
    load_format: str = "auto",
    stage: range | None = None,
) -> tuple[LlamaModel, Weights, WeightFiles | None]:
    """Builds the model of ``config`` and fills it.

    Args:
        path: the directory with ``model.safetensors``, or with shards and their index.
        config: of the same directory.
        place: the dtype to convert to, and the device.
        load_format: "auto" reads the checkpoint; "dummy" makes random weights and reads no file.
        stage: the numbers of the layers to build; None builds the whole model.

    Returns:
        The model, its weights, which can be filled anew, and the files that they came from, which
        are closed; None if they are random.

    Raises:
        ModelError: names the file or the tensor, and a remedy where there is one.
        ConfigError: the linear method of ``place`` cannot run here.
    """
    started = time.perf_counter()
    place = choose_linear(place)
    # The files are looked at first: if one is missing or damaged, no memory is allocated.
    files = _open_checkpoint(Path(path)) if load_format == "auto" else None
    with files or contextlib.nullcontext():
        model = get_model_cls(config.architecture)(config, place, stage)
        weights = Weights(model, model.WEIGHTS, config.num_layers, stage)
        if files is None:
            fill_all(weights, dummy_tensors(weights.shapes), "random weights")
        else:
            files.check(weights)
            fill_all(weights, files.tensors(), files.source)
    log.info(
        "loaded %s parameters of %s in %.1f s%s",
        _readable(weights.num_parameters),
        config.architecture,
        time.perf_counter() - started,
        ", random ones" if files is None else "",
    )
    return model, weights, files


def fill_all(weights: Weights, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Fills a model's weights, all of them.

    Args:
        weights: to fill.
        tensors: by the checkpoint's names, in any order.
        source: where they come from, for errors.

    Raises:
        ModelError: names the tensors that are wrong, unknown or missing.
    """
    names: dict[str, None] = {}
    for name, tensor in tensors:
        names[name] = None
        if weights.uses(name):
            weights.fill(name, tensor)
    weights.check_names(names, source)
    weights.finish()


def _open_checkpoint(directory: Path) -> WeightFiles:
    return WeightFiles(checkpoint_files(directory), f"the checkpoint in {directory}")


def _readable(count: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return str(count)
