"""One safetensors file: its header, its bytes, and whether it is still what was opened. No torch.

The file stays open, so that what was checked is what is read, even if another file takes its name::

    8 bytes              N bytes                        the rest
    │ N, little endian │ JSON: name to dtype, shape   │ tensors, one after the other │
                         and data_offsets in the rest

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, TypeVar

from tokasaurus.errors import ModelError

__all__ = ["FileStamp", "SafetensorsFile", "TensorEntry"]

T = TypeVar("T", bound="SafetensorsFile")

_LENGTH_BYTES = 8
# The limit of the safetensors library.
_MAX_HEADER_BYTES = 100_000_000
_BLOCK_BYTES = 1 << 22
# The limit of torch.
_MAX_DIMENSIONS = 64
# Of the dtypes that have whole bytes.
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class TensorEntry(NamedTuple):
    """One tensor of the header.

    Attributes:
        dtype: in the format's words, such as "BF16".
        shape: of the tensor.
        start: the offset of its first byte in the file.
        end: the offset behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class FileStamp(NamedTuple):
    """Tells a file from the one that was written to the same path later."""

    num_bytes: int
    modified_ns: int


class SafetensorsFile:
    """An open file, whose header has been checked. A context manager, which closes it.

    Args:
        path: of a regular file.

    Attributes:
        path: as it was given.
        stamp: of the file when it was opened.
        tensors: by name, in the order of their bytes.
        metadata: texts by name that its writer added; what is no text is left out.

    Raises:
        ModelError: the file cannot be read, or it is damaged; names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # To open a pipe would wait for its writer.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ModelError(f"{path} is not a file; name each safetensors file")
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        try:
            self.stamp = self._present_stamp()
            self.tensors, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives the file back. A buffer that is still in use stays valid."""
        self._file.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def buffer(self) -> mmap.mmap:
        """The whole file, read from the disk as it is used. To write to it changes no file."""
        return mmap.mmap(self._file.fileno(), self.stamp.num_bytes, access=mmap.ACCESS_COPY)

    def has_equal_bytes(self, entry: TensorEntry, other: SafetensorsFile, its: TensorEntry) -> bool:
        """Whether two tensors begin with the same bytes, as far as both of them go.

        Args:
            entry: of this file.
            other: the file of the other tensor, or this one.
            its: the other tensor's entry.
        """
        length = min(entry.end - entry.start, its.end - its.start)
        mine, theirs = self.buffer(), other.buffer()
        for done in range(0, length, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, length - done)
            here, there = entry.start + done, its.start + done
            if mine[here : here + size] != theirs[there : there + size]:
                return False
        return True

    def sha256(self, report: Callable[[int], None]) -> str:
        """Reads the whole file.

        Args:
            report: is called with the number of bytes that were read since the last call.

        Returns:
            64 hexadecimal digits in lower case.

        Raises:
            ModelError: the file cannot be read.
        """
        digest = hashlib.sha256()
        try:
            for block in self._blocks():
                digest.update(block)
                report(len(block))
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return digest.hexdigest()

    def tensor_sha256s(
        self, report: Callable[[int], None]
    ) -> Iterator[tuple[str, TensorEntry, str]]:
        """Reads every tensor: its name, its entry, and the SHA-256 of its bytes in hexadecimal.

        Args:
            report: as for ``sha256``.

        Raises:
            ModelError: the file cannot be read, or has been written to since it was opened.
        """
        view = memoryview(bytearray(_BLOCK_BYTES))
        for name, entry in self.tensors.items():
            digest = hashlib.sha256()
            try:
                self._file.seek(entry.start)
                left = entry.end - entry.start
                while left:
                    count = self._file.readinto(view[:left])  # type: ignore[attr-defined]
                    if not count:
                        raise OSError("it ends too early")
                    digest.update(view[:count])
                    report(count)
                    left -= count
            except OSError as error:
                raise _unreadable(self.path, error) from error
            yield name, entry, digest.hexdigest()
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raises ModelError if the file has been written to since it was opened."""
        if self._present_stamp() != self.stamp:
            raise ModelError(
                f"{self.path} has changed while it was read; write new weights to a new file"
            )

    def _blocks(self) -> Iterator[memoryview]:
        view = memoryview(bytearray(_BLOCK_BYTES))
        self._file.seek(0)
        while count := self._file.readinto(view):  # type: ignore[attr-defined]
            yield view[:count]

    def _present_stamp(self) -> FileStamp:
        status = os.fstat(self._file.fileno())
        return FileStamp(status.st_size, status.st_mtime_ns)

    def _read_header(self) -> tuple[dict[str, TensorEntry], dict[str, str]]:
        try:
            start = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
            data_start = _LENGTH_BYTES + start
            if start > _MAX_HEADER_BYTES or data_start > self.stamp.num_bytes:
                raise ValueError("its header is longer than the file, or than allowed")
            fields = json.loads(self._file.read(start), object_pairs_hook=_without_duplicates)
            if not isinstance(fields, dict):
                raise ValueError("its header is not a JSON object")
            metadata = _texts(fields.pop("__metadata__", None))
            return _entries(fields, data_start, self.stamp.num_bytes), metadata
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(
                f"{self.path} is damaged or incomplete ({error}); download or write it again"
            ) from error


def _unreadable(path: Path, error: OSError | ValueError) -> ModelError:
    return ModelError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header names {twice} twice")
    return fields


def _texts(fields: object) -> dict[str, str]:
    if not isinstance(fields, dict):
        return {}
    return {name: value for name, value in fields.items() if isinstance(value, str)}


def _entries(
    fields: Mapping[str, object], data_start: int, file_bytes: int
) -> dict[str, TensorEntry]:
    """The tensors of a header in the order of their bytes, which follow one another."""
    entries = {name: _entry(name, value, data_start) for name, value in fields.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].end))
    end = data_start
    for name, entry in ordered:
        if entry.start != end:
            raise ValueError(f"tensor {name} begins at byte {entry.start} instead of {end}")
        end = entry.end
        if end > file_bytes:
            raise ValueError(f"it has {file_bytes} bytes, and tensor {name} ends at byte {end}")
    if end < file_bytes:
        raise ValueError(f"its tensors end at byte {end} of {file_bytes}")
    return dict(ordered)


def _is_shape(sizes: list[object]) -> bool:
    """Whether torch could have a tensor of these sizes; if so, their product is soon computed."""
    are_sizes = all(type(size) is int and 0 <= size < 1 << 63 for size in sizes)
    return are_sizes and len(sizes) <= _MAX_DIMENSIONS


def _entry(name: str, value: object, data_start: int) -> TensorEntry:
    match value:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [int(start), int(end)],
        } if 0 <= start <= end and _is_shape(shape):
            item_bytes = _ITEM_BYTES.get(dtype)
            if item_bytes is not None and end - start != prod(shape) * item_bytes:
                raise ValueError(f"tensor {name} of {shape} has {end - start} bytes of {dtype}")
            return TensorEntry(dtype, tuple(shape), data_start + start, data_start + end)
    raise ValueError(f"its header does not describe tensor {name}")
