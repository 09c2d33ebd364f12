"""The files of a directory, or of a pattern, that ``toka-batch`` answers one by one."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokasaurus.errors import ConfigError

__all__ = ["Part", "Shard", "find_shards", "names_several", "read_part"]

_SUFFIXES = (".jsonl", ".parquet")
_PART = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        name: its path below the directory, or below the part of the pattern without wildcards.
        source: of its requests.
        target: of their answers.
    """

    name: str
    source: Path
    target: Path


@dataclass(frozen=True)
class Part:
    """Every ``count``-th shard, beginning with number ``index``, which counts from 0."""

    index: int
    count: int


def read_part(text: str) -> Part:
    """Reads "I/N". Raises ConfigError."""
    found = _PART.fullmatch(text)
    if found is None or int(found[1]) >= int(found[2]):
        raise ConfigError(
            f"part={text}: expected I/N, such as 0/16: the machine's number, from 0, and the number"
            " of machines"
        )
    return Part(int(found[1]), int(found[2]))


def names_several(source: str) -> bool:
    """Whether an input is a directory or a pattern rather than a file."""
    path = Path(source)
    return path.is_dir() or (glob.has_magic(source) and not path.exists())


def find_shards(source: str, target: Path, part: Part | None = None) -> list[Shard]:
    """The files of an input, in the order of their names.

    In a directory, names that begin with ``.`` or ``_`` are left out.

    Args:
        source: a directory, or a pattern with ``*``, ``?``, ``[...]``, or ``**`` for directories
            of any depth.
        target: the directory of the answers.
        part: the shards to take; None takes all.

    Raises:
        ConfigError: there are none, or one is neither JSONL nor Parquet. Or the answers would be
            among the requests.
    """
    base, paths = _in_directory(Path(source)) if Path(source).is_dir() else _matching(source)
    inside = target.resolve()
    for path in paths:
        if path.suffix.lower() not in _SUFFIXES:
            raise ConfigError(
                f"{path} is neither {' nor '.join(_SUFFIXES)}; move it away, or give it a name that"
                " begins with _"
            )
        if inside in path.resolve().parents:
            raise ConfigError(f"{path} is in {target}, where the answers go; choose another output")
    if not paths:
        raise ConfigError(f"{source} has no files that end with {' or '.join(_SUFFIXES)}")
    if base.resolve() in (inside, *inside.parents) and Path(source).is_dir():
        raise ConfigError(f"{target} is in {source}, whose files are requests; choose another")
    names = [path.relative_to(base).as_posix() for path in paths]
    shards = [Shard(name, base / name, target / name) for name in names]
    return shards if part is None else shards[part.index :: part.count]


def _in_directory(base: Path) -> tuple[Path, Sequence[Path]]:
    files = (path for path in base.rglob("*") if path.is_file())
    return base, sorted(path for path in files if not _is_hidden(path.relative_to(base)))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _matching(pattern: str) -> tuple[Path, Sequence[Path]]:
    base = Path(pattern)
    while glob.has_magic(str(base)):
        base = base.parent
    found = map(Path, glob.glob(pattern, recursive=True))
    return base, sorted(path for path in found if path.is_file())
