"""The files of a batch on a cluster: blocks of requests, and one result file for each block.

::

    in_dir/a.jsonl     rows 1 to 256      ──▶  out_dir/a-000000001-DIGEST.jsonl
                       rows 257 to 300    ──▶  out_dir/a-000000257-DIGEST.jsonl
    in_dir/b.parquet   rows 1 to 9        ──▶  out_dir/b-000000001-DIGEST.parquet

A result file is there once its block is answered, whole. The digest is that of the block's rows, so
its existence says that these rows are done. The directories may be anywhere that pyarrow reaches.
"""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import msgspec

from tokasaurus.batch.lines import BadLine, Line, Request
from tokasaurus.batch.tables import is_parquet, load_pyarrow, requests_in, write_table
from tokasaurus.batch.validation import checked_lines
from tokasaurus.errors import ConfigError

__all__ = ["BLOCK_ROWS", "Block", "Directory", "blocks_of", "claim", "input_files", "write_result"]

BLOCK_ROWS = 256
_BLOCK_BYTES = 8 << 20
_SUFFIXES = (".jsonl", ".parquet")
_UNFINISHED = ".unfinished"
_CLAIM = "_toka-batch.json"
_WHOLE_STORES = ("s3", "gcs", "abfs")  # an object there appears when all of it is written
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Directory:
    """A directory on a file system of pyarrow."""

    system: Any
    path: str

    @staticmethod
    def at(name: str) -> Directory:
        """The directory with a path or URL. Raises ConfigError if the URL is wrong."""
        load_pyarrow()
        from pyarrow import ArrowException
        from pyarrow.fs import FileSystem

        if "://" not in name:
            name = Path(name).absolute().as_uri()
        try:
            return Directory(*FileSystem.from_uri(name))
        except (ArrowException, OSError, ValueError) as error:
            raise ConfigError(f"{name}: this URL cannot be used: {error}") from None

    def child(self, name: str) -> str:
        """The path of a file in the directory."""
        return f"{self.path.rstrip('/')}/{name}"

    def files(self) -> dict[str, int]:
        """The size of each file in it and below, by its name from here. Empty if it is missing.

        Raises:
            ConfigError: the directory cannot be read.
        """
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self.path, allow_not_found=True, recursive=True)
        try:
            found = self.system.get_file_info(selector)
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error}") from None
        start = len(self.path.rstrip("/")) + 1
        return {each.path[start:]: each.size for each in found if each.type == FileType.File}

    def exists(self, name: str) -> bool:
        """Whether it has a file of this name."""
        from pyarrow.fs import FileType

        return bool(self.system.get_file_info(self.child(name)).type == FileType.File)

    def open(self, name: str) -> BinaryIO:
        """Opens a file for reading."""
        file = self.system.open_input_file(self.child(name))
        # pyarrow's own readline has no limit.
        return cast(BinaryIO, io.BufferedReader(file, _BUFFER_BYTES))

    def write(self, name: str, content: bytes) -> None:
        """Writes a file so that it is there whole, or not at all."""
        path = self.child(name)
        above = str(PurePosixPath(path).parent)
        if self.system.type_name in _WHOLE_STORES:
            with self.system.open_output_stream(path) as file:
                file.write(content)
            return
        self.system.create_dir(above, recursive=True)
        new = f"{above}/.{PurePosixPath(path).name}.{secrets.token_hex(4)}{_UNFINISHED}"
        if self.system.type_name != "local":
            with self.system.open_output_stream(new) as file:
                file.write(content)
            self.system.move(new, path)
            return
        with Path(new).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        _flush_directory(above)


def _flush_directory(path: str) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def input_files(source: Directory) -> dict[str, int]:
    """The files of requests and their sizes. Names that begin with ``.`` or ``_`` are left out.

    Raises:
        ConfigError: there is none, or a file that is neither JSONL nor Parquet.
    """
    files = {
        name: size
        for name, size in sorted(source.files().items())
        if not any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)
    }
    for name in files:
        if PurePosixPath(name).suffix.lower() not in _SUFFIXES:
            raise ConfigError(
                f"{source.child(name)} is neither {' nor '.join(_SUFFIXES)}; move it away, or give"
                " it a name that begins with _"
            )
    if not files:
        raise ConfigError(f"{source.path} has no files that end with {' or '.join(_SUFFIXES)}")
    return files


def claim(target: Directory, model: str) -> None:
    """Makes a directory that of a run's results, or checks that it is. Cleans what a kill left.

    Raises:
        ConfigError: it has other files, or results of another model.
    """
    files = target.files()
    if _CLAIM in files:
        with target.open(_CLAIM) as file:
            begun_with = msgspec.json.decode(file.read())["model"]
        if begun_with != model:
            raise ConfigError(
                f"{target.path} was begun with model={begun_with}, not {model}; continue with that,"
                " or choose another directory"
            )
    elif files:
        raise ConfigError(f"{target.path} has files already; choose another directory")
    else:
        target.write(_CLAIM, msgspec.json.encode({"model": model}))
    for name in files:
        if name.endswith(_UNFINISHED):
            target.system.delete_file(target.child(name))


@dataclass(frozen=True)
class Block:
    """Some lines of one file.

    Attributes:
        name: of its result file.
        lines: in their order.
        num_bytes: about what they take of the input file.
    """

    name: str
    lines: tuple[Line, ...]
    num_bytes: float


def blocks_of(
    source: Directory, name: str, urls: Collection[str], num_rows: int = BLOCK_ROWS
) -> Iterator[Block]:
    """Divides a file of requests into blocks, as it is read.

    Args:
        source: the directory.
        name: of the file in it.
        urls: the urls that requests may have.
        num_rows: of a block; the last one may have fewer.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = PurePosixPath(name)
    stem, suffix = str(path.with_suffix("")), path.suffix
    with source.open(name) as file:
        row_bytes = _row_bytes(file, path) if is_parquet(path) else None
        lines: list[Line] = []
        num_bytes = begun = 0

        def block() -> Block:
            digest = blake2b(digest_size=12)
            for line in lines:
                digest.update(json.dumps(_content(line)).encode() + b"\n")
            result = f"{stem}-{lines[0].line:09}-{digest.hexdigest()}{suffix}"
            read = file.tell() - begun if row_bytes is None else row_bytes * len(lines)
            return Block(result, tuple(lines), read)

        for line in checked_lines(requests_in(file, path), None, urls):
            lines.append(line)
            num_bytes += line.num_bytes if isinstance(line, Request) else 0
            if len(lines) >= num_rows or num_bytes >= _BLOCK_BYTES:
                yield block()
                lines, num_bytes, begun = [], 0, file.tell()
        if lines:
            yield block()


def _row_bytes(file: BinaryIO, path: PurePosixPath) -> float:
    """How much of a table's file a row takes."""
    pyarrow, parquet = load_pyarrow()
    try:
        num_rows = parquet.read_metadata(file).num_rows
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from None
    return file.seek(0, os.SEEK_END) / max(1, int(num_rows))


def _content(line: Line) -> tuple[Any, ...]:
    if isinstance(line, BadLine):
        return line.line, line.custom_id, line.code, line.message
    return line.line, line.custom_id, line.url, line.body


def write_result(target: Directory, block: Block, lines: list[bytes]) -> None:
    """Writes the result lines of a block, in the format of its input."""
    if is_parquet(PurePosixPath(block.name)):
        table = io.BytesIO()
        write_table(lines, table)
        target.write(block.name, table.getvalue())
    else:
        target.write(block.name, b"".join(lines))
