"""Finds the safetensors files of a checkpoint on the engine's machine."""

from __future__ import annotations

import json
from pathlib import Path

from tokasaurus.errors import RequestError

__all__ = ["weight_files"]

_INDEX = "model.safetensors.index.json"


def weight_files(model_path: str) -> list[str]:
    """The files that together have every tensor.

    Args:
        model_path: a directory, or one safetensors file.

    Raises:
        RequestError: there are no such files; names the field ``model_path``.
    """
    path = Path(model_path).expanduser()
    try:
        if path.is_file() and path.suffix == ".safetensors":
            return [str(path.resolve())]
        if not path.is_dir():
            raise _wrong(model_path, "is not a directory on the engine's machine")
        return [str(each.resolve()) for each in _of_directory(path)]
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise _wrong(model_path, f"cannot be read: {error}") from None


def _of_directory(path: Path) -> list[Path]:
    index = path / _INDEX
    if not index.is_file():
        found = sorted(path.glob("*.safetensors"))
        if not found:
            raise _wrong(str(path), "holds no safetensors file")
        return found
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (KeyError, AttributeError, TypeError):
        raise _wrong(str(path), f"has a {_INDEX} without a weight_map") from None
    outside = next((name for name in names if Path(name).name != name), None)
    if outside is not None:
        raise _wrong(str(path), f"has a {_INDEX} that names {outside!r}, which is not a file in it")
    return [path / name for name in names]


def _wrong(path: str, reason: str) -> RequestError:
    return RequestError(f"model_path {path!r} {reason}", "model_path")
