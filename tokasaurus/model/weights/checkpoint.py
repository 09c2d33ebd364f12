"""A checkpoint's safetensors files as a source of (name, tensor).

Owns the errors about a checkpoint's files.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokasaurus.errors import ModelError
from tokasaurus.model.weights.weights import listing

__all__ = ["checkpoint_tensors"]

log = logging.getLogger(__name__)

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PROGRESS_INTERVAL_S = 3.0
_FILES_SHOWN = 5


def checkpoint_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Reads a checkpoint tensor by tensor.

    Args:
        directory: has ``model.safetensors``, or shards and their index.

    Raises:
        ModelError: names the file, and a remedy where there is one.
    """
    return _tensors(_checkpoint_files(directory))


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
    found = f"only {', '.join(others[:_FILES_SHOWN])}" if others else "no weights at all"
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
            f"{listing(absent)}; download it again"
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
