"""The safetensors files of a model's directory. No torch.

Owns the choice between one file and shards, and the errors about files that are not there.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import NamedTuple

from tokasaurus.errors import ModelError
from tokasaurus.listing import listing
from tokasaurus.safetensors_file import SafetensorsFile, TensorEntry

__all__ = ["checkpoint_files"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"


def checkpoint_files(directory: Path) -> list[Path]:
    """Lists the files that together have every tensor of a checkpoint.

    Of a single file and shards with an index, the complete one counts. Both may be there if they
    have the same tensors.

    Args:
        directory: has ``model.safetensors``, or shards and their index.

    Raises:
        ModelError: names the directory or the file, and a remedy where there is one.
    """
    index, single = directory / _INDEX, directory / _SINGLE
    if not index.exists():
        return [single] if single.exists() else _refuse(directory)
    if not single.exists():
        return _shards(index)
    try:
        shards = _shards(index)
        chosen = shards if single in shards else _complete_one(single, shards)
    except ModelError:
        # The index is stale. Errors of the single file are the loader's to report.
        return [single]
    if chosen is not None:
        return chosen
    raise ModelError(
        f"{directory} has two checkpoints that differ: {_SINGLE}, and the shards of {_INDEX}; "
        f"delete or rename {_SINGLE} to load the shards, or {_INDEX} to load {_SINGLE}"
    )


def _refuse(directory: Path) -> list[Path]:
    others = sorted(
        entry.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors")
        for entry in directory.glob(pattern)
    )
    found = f"only {listing(others)}" if others else "no weights at all"
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


def _complete_one(single: Path, shards: list[Path]) -> list[Path] | None:
    """The files of the complete one of two checkpoints; None if both are and they differ.

    Raises:
        ModelError: a shard is damaged.
    """
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(SafetensorsFile(path)) for path in shards]
        sharded = {
            name: _Place(file, entry) for file in files for name, entry in file.tensors.items()
        }
        try:
            file = opened.enter_context(SafetensorsFile(single))
        except ModelError:
            return shards  # the writing of the single file was cut off
        alone = {name: _Place(file, entry) for name, entry in file.tensors.items()}
        # A tied head may be left out, as it is a copy of the embedding.
        needed = sharded.keys() - {_HEAD}
        if alone.keys() < needed:
            return shards
        common = alone.keys() & sharded.keys()
        if common - {_HEAD} != needed or alone.keys() - {_HEAD} != needed:
            return None
        if not all(_are_equal(alone[name], sharded[name]) for name in common):
            return None
        return [single] if len(alone) > len(sharded) else shards


class _Place(NamedTuple):
    """Where a tensor's bytes are."""

    file: SafetensorsFile
    entry: TensorEntry


def _are_equal(one: _Place, other: _Place) -> bool:
    same_kind = (one.entry.dtype, one.entry.shape) == (other.entry.dtype, other.entry.shape)
    return same_kind and one.file.has_equal_bytes(one.entry, other.file, other.entry)
