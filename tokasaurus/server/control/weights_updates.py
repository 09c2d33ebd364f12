"""New weights that a client sends in buckets: they wait in files until the client commits them.

There is one unfinished update at a time::

    open ──commit──▶ committing ──▶ committed, until other weights replace it
     ▲ └──delete, an hour without a bucket──▶ gone
     └──── the engine refuses ────┘

The files of committed weights stay, since the engine reads them again after it released its memory.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import os
import re
import secrets
import shutil
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tokasaurus.errors import Conflict, EngineError, NotFound, RequestError, StorageFull

__all__ = ["CHECKSUM_HEADER", "MAX_BUCKETS", "WeightsUpdate", "WeightsUpdates"]

CHECKSUM_HEADER = "X-Checksum-SHA256"
MAX_BUCKETS = 10_000

_EXPIRY_S = 3600.0
_WRITE_BYTES = 1 << 20  # written at once
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True)
class _Bucket:
    path: Path
    num_bytes: int
    sha256: str


@dataclass
class WeightsUpdate:
    """One update.

    Attributes:
        id: its name.
        label: of the new version; None is its number.
        created_at: Unix time, in seconds.
        expires_at: when an open update is dropped unless another bucket comes.
        status: "open", "committing" or "committed".
        version: of the weights, once they are committed.
        error: why the engine refused the latest commit.
        request_id: of the request that began it, which may come again if its answer was lost.
    """

    id: str
    directory: Path
    label: str | None
    created_at: int
    expires_at: int = 0
    status: str = "open"
    version: int | None = None
    error: str | None = None
    request_id: str | None = None
    buckets: dict[int, _Bucket] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """What a client is told."""
        return {
            "id": self.id,
            "object": "weights.update",
            "status": self.status,
            "created_at": self.created_at,
            "expires_at": self.expires_at if self.status == "open" else None,
            "weight_version": self.label,
            "weights_version": self.version,
            "error": self.error,
            "buckets": [self.described_bucket(number) for number in sorted(self.buckets)],
        }

    def in_words_of_client(self, reason: str) -> str:
        """An error of the engine that names buckets by their numbers, and not by their files."""
        for number, bucket in self.buckets.items():
            reason = reason.replace(str(bucket.path), f"bucket {number}")
        return reason

    def described_bucket(self, number: int) -> dict[str, Any]:
        bucket = self.buckets[number]
        return {"index": number, "bytes": bucket.num_bytes, "sha256": bucket.sha256}


class WeightsUpdates:
    """The updates of one engine. All methods belong to the event loop's thread.

    Args:
        parent: where to make a private directory when the first update begins; None is the system's
            directory for temporary files.
    """

    def __init__(self, parent: Path | None = None) -> None:
        self._parent = parent
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._unfinished: WeightsUpdate | None = None
        self._committed: WeightsUpdate | None = None
        self._expiry: asyncio.TimerHandle | None = None

    def begin(
        self, label: str | None, request_id: str | None = None, *, replace: bool = False
    ) -> WeightsUpdate:
        """Begins an update, or finds the one that this request began.

        Args:
            label: of the new version; None is its number.
            request_id: of the request.
            replace: drop another update that is open.

        Raises:
            Conflict: another one is unfinished.
        """
        if self._unfinished is not None:
            if request_id is not None and self._unfinished.request_id == request_id:
                return self._unfinished
            if replace and self._unfinished.status == "open":
                self._drop(self._unfinished)
        if self._unfinished is not None:
            raise Conflict(
                f"the update {self._unfinished.id} is unfinished; commit it, or delete it"
            )
        try:
            if self._home is None:
                self._home = tempfile.TemporaryDirectory(prefix="weights-", dir=self._parent)
            update_id = f"wu_{secrets.token_hex(12)}"
            directory = Path(self._home.name) / update_id
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise _disk_error(error) from None
        self._unfinished = WeightsUpdate(
            update_id, directory, label, int(time.time()), request_id=request_id
        )
        self._touch(self._unfinished)
        return self._unfinished

    def find(self, update_id: str) -> WeightsUpdate:
        """An update. Raises NotFound if there was none, or it is gone."""
        for update in (self._unfinished, self._committed):
            if update is not None and update.id == update_id:
                return update
        raise NotFound(f"there is no update {update_id!r}")

    async def receive(
        self, update_id: str, number: int, sha256: str | None, pieces: AsyncIterator[bytes]
    ) -> dict[str, Any]:
        """Stores a bucket, in place of an earlier one with the same number.

        Args:
            update_id: of an open update.
            number: of the bucket.
            sha256: of its bytes, in hexadecimal.
            pieces: of a safetensors file.

        Raises:
            RequestError: the bytes are something else, and nothing has changed.
            Conflict: the update is not open.
            EngineError: the disk fails.
        """
        update = self._open(update_id)
        if sha256 is None or not _SHA256.fullmatch(sha256):
            raise RequestError(
                f"{CHECKSUM_HEADER} must be the SHA-256 of the body: 64 hexadecimal digits",
                CHECKSUM_HEADER,
            )
        part = update.directory / f"{secrets.token_hex(8)}.part"
        try:
            with part.open("xb") as file:
                found, num_bytes = await _write(file, pieces)
            _check_bucket(part, num_bytes, found, sha256.lower())
            self._open(update_id)  # raises if it was committed or deleted meanwhile
            path = update.directory / f"{number:05}.safetensors"
            part.rename(path)
        except OSError as error:
            self._open(update_id)  # its files are gone if it was deleted meanwhile
            raise _disk_error(error) from None
        finally:
            part.unlink(missing_ok=True)
        update.buckets[number] = _Bucket(path, num_bytes, found)
        self._touch(update)
        return update.described_bucket(number)

    def commit(self, update_id: str, num_buckets: int) -> WeightsUpdate:
        """Closes an update for its commit.

        Raises:
            Conflict: it is not open, or does not have the buckets 0 to ``num_buckets - 1``.
        """
        update = self._open(update_id)
        missing = [number for number in range(num_buckets) if number not in update.buckets]
        if missing or len(update.buckets) != num_buckets:
            said = f"bucket {missing[0]} is missing" if missing else "there are more"
            raise Conflict(
                f"num_buckets is {num_buckets}, and the update has {len(update.buckets)} buckets:"
                f" {said}",
                "num_buckets",
            )
        update.status, update.error = "committing", None
        self._cancel_expiry()
        return update

    def succeeded(self, update: WeightsUpdate, version: int) -> None:
        """The engine runs the weights of an update, which replace those committed before."""
        self.replaced()
        update.status, update.version = "committed", version
        self._committed, self._unfinished = update, None

    def refused(self, update: WeightsUpdate, reason: str) -> None:
        """The engine refused an update, which is open again."""
        update.status, update.error = "open", update.in_words_of_client(reason)
        self._touch(update)

    def replaced(self) -> None:
        """The engine runs other weights than those committed last, whose files go."""
        if self._committed is not None:
            _remove(self._committed)
            self._committed = None

    def delete(self, update_id: str) -> None:
        """Drops an open update. Raises Conflict if it is not open."""
        self._drop(self._open(update_id))

    def _open(self, update_id: str) -> WeightsUpdate:
        update = self.find(update_id)
        if update.status != "open":
            raise Conflict(f"the update {update_id} is {update.status}")
        return update

    def _drop(self, update: WeightsUpdate) -> None:
        self._cancel_expiry()
        self._unfinished = None
        _remove(update)

    def _touch(self, update: WeightsUpdate) -> None:
        self._cancel_expiry()
        update.expires_at = int(time.time() + _EXPIRY_S)
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(_EXPIRY_S, self._drop, update)

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None


async def _write(file: BinaryIO, pieces: AsyncIterator[bytes]) -> tuple[str, int]:
    """Writes pieces to a file; returns their SHA-256 in hexadecimal and their size."""
    digest, num_bytes = hashlib.sha256(), 0
    waiting: list[bytes] = []
    num_waiting = 0

    def flush(some: Sequence[bytes]) -> None:
        for piece in some:
            digest.update(piece)
        file.writelines(some)

    async for piece in pieces:
        waiting.append(piece)
        num_waiting += len(piece)
        if num_waiting >= _WRITE_BYTES:
            await asyncio.to_thread(flush, waiting)
            num_bytes, num_waiting, waiting = num_bytes + num_waiting, 0, []
    await asyncio.to_thread(flush, waiting)
    return digest.hexdigest(), num_bytes + num_waiting


def _check_bucket(path: Path, num_bytes: int, found: str, expected: str) -> None:
    if not hmac.compare_digest(found, expected):
        raise RequestError(
            f"the {num_bytes} bytes of the body have the SHA-256 {found}, not {expected}",
            CHECKSUM_HEADER,
        )
    with path.open("rb") as file:
        start = file.read(9)
    # The length of a JSON object, then the object, then the tensors.
    length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    if not (start[8:] == b"{" and 2 <= length <= num_bytes - 8):
        raise RequestError("the body is not a safetensors file")


def _remove(update: WeightsUpdate) -> None:
    shutil.rmtree(update.directory, ignore_errors=True)


def _disk_error(error: OSError) -> EngineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull("the disk has no room for the weights, and nothing of this is kept")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return EngineError(f"the server cannot store weights: {reason}")
