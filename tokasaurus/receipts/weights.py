"""The digest of a model's weights: of its tensors, however they are dealt out to files. No torch.

Two checkpoints have the same digest if their tensors have the same names, dtypes, shapes and bytes.
Metadata, the order of tensors and their distribution over files do not count, nor does a head that
repeats the embedding.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokasaurus.errors import ModelError
from tokasaurus.receipts.form import digest
from tokasaurus.safetensors_file import FileStamp, SafetensorsFile

__all__ = ["RANDOM", "NoDigest", "StampedFile", "WeightsDigest", "stamped", "weights_digest"]

log = logging.getLogger(__name__)

_PROGRESS_INTERVAL_S = 3.0
_LAYER = re.compile(r"(.*\blayers\.\d+)\.")
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
# Of the digest of a part, which only has to tell which part differs.
_PART_DIGITS = 16


class NoDigest(Exception):
    """The digest of weights cannot be computed; says why."""


@dataclass(frozen=True)
class StampedFile:
    """A file, and what tells it from another one that takes its path later."""

    path: str
    stamp: FileStamp


@dataclass(frozen=True)
class WeightsDigest:
    """The digest of all weights.

    Attributes:
        digest: of all.
        parts: a short digest of each layer, and of each tensor outside layers.
    """

    digest: str
    parts: Mapping[str, str]


RANDOM = WeightsDigest("random", {})
"""Stands for random weights, which follow from the model's configuration."""


def stamped(paths: Iterable[str]) -> list[StampedFile]:
    """These files as they are now. A file that is not there gets a stamp that fits no file."""
    files = []
    for path in paths:
        try:
            status = Path(path).stat()
            stamp = FileStamp(status.st_size, status.st_mtime_ns)
        except OSError:
            stamp = FileStamp(-1, -1)
        files.append(StampedFile(path, stamp))
    return files


def weights_digest(files: Sequence[StampedFile]) -> WeightsDigest:
    """Reads files whole.

    Args:
        files: as they were when the engine read them; none if its weights are random.

    Raises:
        NoDigest: the files are gone, or are not those that the engine read.
    """
    if not files:
        return RANDOM
    with contextlib.ExitStack() as opened:
        try:
            sources = [opened.enter_context(SafetensorsFile(Path(file.path))) for file in files]
        except ModelError as error:
            raise NoDigest(f"the files that the weights came from are not there: {error}") from None
        for file, source in zip(files, sources, strict=True):
            if source.stamp != file.stamp:
                raise NoDigest(f"{file.path} has changed since the engine read it")
        progress = _Progress(sum(file.stamp.num_bytes for file in files))
        try:
            tensors = _tensors(sources, progress.add)
        except ModelError as error:
            raise NoDigest(str(error)) from None
        progress.end()
    return _combined(tensors)


def _tensors(files: Sequence[SafetensorsFile], report: Callable[[int], None]) -> dict[str, str]:
    """A line about each tensor, by name: its dtype, shape and SHA-256."""
    lines = {
        name: f"{entry.dtype} {list(entry.shape)} {sha256}"
        for file in files
        for name, entry, sha256 in file.tensor_sha256s(report)
    }
    if _HEAD in lines and lines[_HEAD] in (lines.get(f"model.{_EMBEDDING}"), lines.get(_EMBEDDING)):
        del lines[_HEAD]
    return lines


def _combined(tensors: Mapping[str, str]) -> WeightsDigest:
    parts: dict[str, dict[str, str]] = {}
    for name, line in tensors.items():
        layer = _LAYER.match(name)
        parts.setdefault(layer[1] if layer else name, {})[name] = line
    return WeightsDigest(
        digest(tensors), {part: digest(lines)[:_PART_DIGITS] for part, lines in parts.items()}
    )


class _Progress:
    """Logs how far the reading is, every few seconds."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes, self._done_bytes = total_bytes, 0
        self._started = self._reported_at = time.perf_counter()

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        now = time.perf_counter()
        if now - self._reported_at > _PROGRESS_INTERVAL_S:
            self._reported_at = now
            log.info(
                "digest of the weights for receipts: %.1f of %.1f GB",
                self._done_bytes / 1e9,
                self._total_bytes / 1e9,
            )

    def end(self) -> None:
        log.info(
            "digest of the weights for receipts: read %.1f GB in %.1f s",
            self._done_bytes / 1e9,
            time.perf_counter() - self._started,
        )
