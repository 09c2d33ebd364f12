"""The safetensors files of a model's directory. No torch.

Owns the errors about files that are not there.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokasaurus.errors import ModelError
from tokasaurus.listing import listing

__all__ = ["checkpoint_files"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def checkpoint_files(directory: Path) -> list[Path]:
    """Lists the files that together have every tensor of a checkpoint.

    Args:
        directory: has ``model.safetensors``, or shards and their index.

    Raises:
        ModelError: names the directory or the file, and a remedy where there is one.
    """
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
