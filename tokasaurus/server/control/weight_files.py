"""Finds the safetensors files of a checkpoint on the engine's machine."""

from __future__ import annotations

from pathlib import Path

from tokasaurus.checkpoint_files import checkpoint_files
from tokasaurus.errors import ModelError, RequestError

__all__ = ["weight_files"]


def weight_files(model_path: str) -> list[str]:
    """The files that together have every tensor.

    Args:
        model_path: a directory with a checkpoint, or with any safetensors files; or one such file.

    Raises:
        RequestError: there are no such files; names the field ``model_path``.
    """
    path = Path(model_path).expanduser()
    try:
        if path.is_file() and path.suffix == ".safetensors":
            return [str(path.resolve())]
        if not path.is_dir():
            raise ModelError(
                f"{model_path} is neither a directory nor a .safetensors file on the engine's"
                " machine"
            )
        return [str(each.resolve()) for each in _of_directory(path)]
    except (OSError, ModelError, ValueError) as error:  # ValueError: this cannot be a path
        raise RequestError(f"model_path: {error}", "model_path") from None


def _of_directory(path: Path) -> list[Path]:
    try:
        return checkpoint_files(path)
    except ModelError:
        shards = sorted(path.glob("*.safetensors"))  # a trainer may write no index
        if not shards or any(path.glob("*.index.json")):
            raise
        return shards
