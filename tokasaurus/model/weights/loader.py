"""Reads a checkpoint's safetensors files into a model, tensor by tensor.

The model's parameters are allocated first, and each tensor is copied to its place as it is read, so
loading needs no second copy of the weights. Owns the errors about a checkpoint's files and tensors.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokasaurus.errors import ModelError
from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.architectures.registry import get_model_cls
from tokasaurus.model.config import ModelConfig
from tokasaurus.model.layers.placement import Placement

__all__ = ["load_model"]

log = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PROGRESS_INTERVAL_S = 3.0
_NAMES_SHOWN = 5

# Tensors that old checkpoints contain and that we compute.
_DERIVED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


@dataclass
class _Target:
    """The destination of one tensor of the checkpoint.

    Attributes:
        place: a view into a parameter.
        is_vocabulary: it has one row per token id, so rows beyond the vocabulary are padding.
        loaded: it has been filled.
    """

    place: Tensor
    is_vocabulary: bool
    loaded: bool = False


def load_model(path: str | Path, config: ModelConfig, place: Placement) -> LlamaModel:
    """Builds the model of ``config`` and fills it.

    Args:
        path: the directory with ``model.safetensors``, or with shards and their index.
        config: of the same directory.
        place: the dtype to convert to, and the device.

    Raises:
        ModelError: names the file or the tensor, and a remedy where there is one.
    """
    started = time.perf_counter()
    files = _checkpoint_files(Path(path))
    model = get_model_cls(config.architecture)(config, place)
    targets = _targets(model, config)
    unknown: list[str] = []
    for name, tensor in _tensors(files):
        target = targets.get(name)
        if target is not None:
            _fill(target, name, tensor)
        # A tied checkpoint may contain the head as a duplicate.
        elif name != "lm_head.weight" and not _DERIVED.search(name):
            unknown.append(name)
    _refuse("has tensors that this architecture does not use", unknown, path)
    missing = [name for name, target in targets.items() if not target.loaded]
    _refuse("lacks tensors", missing, path)
    count = sum(parameter.numel() for parameter in model.parameters())
    log.info(
        "loaded %s parameters of %s in %.1f s",
        _readable(count),
        config.architecture,
        time.perf_counter() - started,
    )
    return model


def _checkpoint_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.exists():
        return _shards(index)
    if (directory / _SINGLE).exists():
        return [directory / _SINGLE]
    others = sorted(
        entry.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors")
        for entry in directory.glob(pattern)
    )
    found = f"only {', '.join(others[:_NAMES_SHOWN])}" if others else "no weights at all"
    raise ModelError(
        f"{directory} has neither {_SINGLE} nor {_INDEX}, {found}; convert it once with "
        "transformers: AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory)"
    )


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} has no readable 'weight_map': {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(
                f"{index}: field 'weight_map' names {name!r}, which is not a file name"
            )
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        raise ModelError(
            f"{index.parent} lacks {len(absent)} of {len(names)} weight files: "
            f"{_listing(absent)}; download it again"
        )
    return [index.parent / name for name in names]


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    total = sum(file.stat().st_size for file in files)
    done, reported = 0, time.perf_counter()
    for file in files:
        try:
            with safe_open(str(file), framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (not a dict)
                    tensor = tensors.get_tensor(name)
                    yield name, tensor
                    done += tensor.numel() * tensor.element_size()
                    if time.perf_counter() - reported > _PROGRESS_INTERVAL_S:
                        reported = time.perf_counter()
                        log.info("loading weights: %.1f of %.1f GB", done / 1e9, total / 1e9)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is damaged or incomplete ({error}); download it again"
            ) from error


def _targets(model: LlamaModel, config: ModelConfig) -> dict[str, _Target]:
    """The destination of each of the checkpoint's tensors, by name."""
    modules = dict(model.named_modules())
    targets: dict[str, _Target] = {}
    for pattern, source_patterns in model.WEIGHTS.items():
        layers = range(config.num_layers) if "{}" in pattern else range(1)
        for layer in layers:
            module = modules.get(pattern.format(layer))
            # A tied model has no head, and most have no norms on queries and keys.
            if module is None:
                continue
            sources = [source.format(layer) for source in source_patterns]
            for kind, parameter in module.named_parameters(recurse=False):
                parts = parameter.split(list(module.parts))
                for source, part in zip(sources, parts, strict=True):
                    vocabulary = len(sources) == 1 and module.parts == (config.vocab_size,)
                    targets[f"{source}.{kind}"] = _Target(part, vocabulary)
    return targets


def _fill(target: _Target, name: str, tensor: Tensor) -> None:
    expected, found = tuple(target.place.shape), tuple(tensor.shape)
    if tensor.dtype not in _FLOATS:
        raise ModelError(
            f"tensor {name} is {tensor.dtype}: quantized checkpoints are not supported"
        )
    if target.is_vocabulary and found[1:] == expected[1:] and found[0] > expected[0]:
        # Padding to a round number of rows. Without these rows their ids cannot be sampled.
        tensor = tensor[: expected[0]]
    elif found != expected:
        raise ModelError(
            f"tensor {name} has shape {list(found)}; config.json asks for {list(expected)}"
        )
    target.place.copy_(tensor)
    target.loaded = True


def _refuse(complaint: str, names: list[str], path: str | Path) -> None:
    if names:
        raise ModelError(f"the checkpoint in {path} {complaint}: {_listing(names)}")


def _listing(names: list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _readable(count: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return str(count)
