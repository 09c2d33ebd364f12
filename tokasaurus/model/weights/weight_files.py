"""Safetensors files as a source of (name, tensor), checked whole before a tensor is read."""

from __future__ import annotations

import contextlib
import logging
import mmap
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from tokasaurus.errors import ModelError
from tokasaurus.model.checkpoint_headers import EMBEDDING, HEAD, heads_differ, usual_names
from tokasaurus.model.weights.weights import Weights
from tokasaurus.rounding import round_up
from tokasaurus.safetensors_file import FileStamp, SafetensorsFile, TensorEntry

__all__ = ["WeightFiles", "read_tensors"]

log = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 3.0
_SHA256 = re.compile("[0-9a-fA-F]{64}")

# The format's dtypes that torch has.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class WeightFiles:
    """Files that together have every tensor of a model. A context manager, which closes them.

    They stay open between ``check`` and ``tensors``. So what was checked is what is read, even if
    other files take their names.

    Args:
        paths: of the files.
        source: what they are, for errors.

    Raises:
        ModelError: a file cannot be read, or it is damaged; names the file.
    """

    def __init__(self, paths: Sequence[Path], source: str) -> None:
        self.source = source
        self._paths = tuple(paths)
        with contextlib.ExitStack() as opened:
            self._files = [opened.enter_context(SafetensorsFile(path)) for path in paths]
            self._opened = opened.pop_all()
        self._names = usual_names([name for file in self._files for name in file.tensors])

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    def reopened(self) -> WeightFiles:
        """The same files, after these were closed.

        Raises:
            ModelError: one of them does not exist any more, or has changed.
        """
        again = WeightFiles(self._paths, self.source)
        for before, now in zip(self._files, again._files, strict=True):
            if before.stamp != now.stamp:
                again._opened.close()
                raise ModelError(f"{now.path} is not the file that was read before")
        return again

    def check(self, weights: Weights) -> None:
        """Checks that the files have the tensors of a model, and reads none of them.

        Raises:
            ModelError: names the file and the tensor that is wrong, or those that are missing,
                unknown or in the files twice.
        """
        owners: dict[str, Path] = {}
        for file in self._files:
            for name, entry in file.tensors.items():
                if name in owners:
                    raise ModelError(
                        f"tensor {name} is in {owners[name]} and in {file.path}; keep one of them"
                    )
                owners[name] = file.path
                if weights.uses(self._names[name]):
                    _check_entry(weights, self._names[name], entry, file.path)
        weights.check_names([self._names[name] for name in owners], self.source)
        if weights.has_tied_head and heads_differ(self._files):
            raise ModelError(
                f"{self.source} has a {HEAD} that differs from {EMBEDDING}, and this model shares "
                "one tensor between them; start an engine with these weights instead"
            )

    def check_sums(self, checksums: Sequence[str]) -> None:
        """Reads the files whole and compares them with their checksums.

        Args:
            checksums: SHA-256 of each file in hexadecimal, in the order of the files.

        Raises:
            ModelError: one differs; names the file. Or their number is not that of the files.
        """
        if len(checksums) != len(self._files):
            raise ModelError(
                f"{self.source} has {len(checksums)} checksums for {len(self._files)} files; "
                "send one for each file, or none"
            )
        progress = _Progress("checking weights", self._num_bytes)
        for file, expected in zip(self._files, checksums, strict=True):
            if not _SHA256.fullmatch(expected):
                raise ModelError(
                    f"{expected!r}, the checksum of {file.path}, is not a SHA-256 in hexadecimal"
                )
            actual = file.sha256(progress.add)
            if actual != expected.lower():
                raise ModelError(
                    f"{file.path} has SHA-256 {actual}, not {expected.lower()}; write it again, "
                    "or send the checksum of what it is to contain"
                )

    def check_unchanged(self) -> None:
        """Raises ModelError if a file has been written to since it was opened."""
        for file in self._files:
            file.check_unchanged()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Reads all tensors. Each stays readable as long as it is kept.

        Raises:
            ModelError: a file has been written to since it was opened.
        """
        progress = _Progress("loading weights", self._num_bytes)
        for file in self._files:
            for name, tensor in read_tensors(file):
                yield self._names[name], tensor
                progress.add(tensor.numel() * tensor.element_size())

    def stamps(self) -> list[tuple[Path, FileStamp]]:
        """The files, and what tells each from another one that takes its path later."""
        return [(file.path, file.stamp) for file in self._files]

    @property
    def num_files(self) -> int:
        return len(self._files)

    @property
    def _num_bytes(self) -> int:
        return sum(file.stamp.num_bytes for file in self._files)


def read_tensors(file: SafetensorsFile) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file by name, in the order of their bytes.

    A tensor's bytes come from the disk when they are used. They are used before the next tensor is
    asked for: then it is checked that the file has not changed, and the process gives back the
    memory of the bytes. They come from the disk again where they are used later.

    Raises:
        ModelError: the file has been written to since it was opened.
    """
    buffer = file.buffer()
    for name, entry in file.tensors.items():
        if entry.dtype in _DTYPES:
            file.check_unchanged()
            yield name, _tensor(buffer, entry)
            _give_back(buffer, entry)
    file.check_unchanged()


def _give_back(buffer: mmap.mmap, entry: TensorEntry) -> None:
    """Drops the whole pages of a tensor, so that a process never holds a file's weights twice."""
    first = round_up(entry.start, mmap.PAGESIZE)
    end = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end and hasattr(mmap, "MADV_DONTNEED"):
        buffer.madvise(mmap.MADV_DONTNEED, first, end - first)


def _tensor(buffer: object, entry: TensorEntry) -> Tensor:
    dtype = _DTYPES[entry.dtype]
    if entry.end == entry.start:
        return torch.empty(entry.shape, dtype=dtype)
    count = (entry.end - entry.start) // dtype.itemsize
    flat: Tensor = torch.frombuffer(buffer, dtype=dtype, count=count, offset=entry.start)
    return flat.view(entry.shape)


def _check_entry(weights: Weights, name: str, entry: TensorEntry, path: Path) -> None:
    dtype = _DTYPES.get(entry.dtype)
    try:
        if dtype is None:
            raise ModelError(
                f"tensor {name} is {entry.dtype}: quantized checkpoints are not supported"
            )
        weights.check(name, entry.shape, dtype)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


class _Progress:
    """Logs how far a long task is, every few seconds."""

    def __init__(self, task: str, total_bytes: int) -> None:
        self._task, self._total_bytes = task, total_bytes
        self._done_bytes, self._reported_at = 0, time.perf_counter()

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        now = time.perf_counter()
        if now - self._reported_at > _PROGRESS_INTERVAL_S:
            self._reported_at = now
            done, total = self._done_bytes / 1e9, self._total_bytes / 1e9
            log.info("%s: %.1f of %.1f GB", self._task, done, total)
