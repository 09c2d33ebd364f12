"""The file that ``toka tune`` writes: flags in YAML, which ``config=`` reads."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tokasaurus.errors import ConfigError

__all__ = ["check_tuned", "write_tuned"]

_WIDTH = 96


def check_tuned(path: Path) -> None:
    """Raises ConfigError if the file cannot be written, before the minutes that a search takes."""
    if path.is_dir():
        raise ConfigError(f"out={path}: Is a directory; set another file with out=")
    partial = _partial(path)
    try:
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def write_tuned(path: Path, flags: Mapping[str, Any], comments: Sequence[str]) -> None:
    """Writes the file whole, or not at all.

    Args:
        path: of the file, which is replaced.
        flags: of an engine.
        comments: lines before them.

    Raises:
        ConfigError: it cannot be written.
    """
    lines = [line for each in comments for line in textwrap.wrap(each, _WIDTH)]
    text = "".join(f"# {line}\n" for line in lines)
    text += yaml.safe_dump(dict(flags), sort_keys=False, allow_unicode=True)
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from None


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"out={path}: {error.strerror}; set another file with out=")
