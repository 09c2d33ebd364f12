"""The store's directory: which names mean which versions, and the versions' files.

::

    cartridge_dir/.store/names/SHA256        a record in JSON, named by the digest of source and id
                         versions/DIGEST     the file of a version, which never changes
                         incoming/...        what is being fetched and read
                         lock

A version that no name means any more is deleted once nothing uses it. Several engines may share a
directory: a change of names and versions holds the lock, and a version in use has a shared lock of
its own. So no engine deletes a file that another one uses. What a killed engine has left behind in
``incoming`` is deleted when the next one begins.

Every method blocks on the disk. Any thread may call any of them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tokasaurus.cartridges.specification import CartridgeMetadata
from tokasaurus.errors import EngineError, RequestError, StorageFull

__all__ = ["Index", "NameRecord", "storage_error"]

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FIELD = "cartridges"
_DISK_SHARE = 0.1
_SUFFIX, _PART, _LOCK = ".safetensors", ".part", "lock"


class NameRecord(msgspec.Struct, frozen=True):
    """What a name means.

    Attributes:
        source: of the cartridge.
        id: as lists show it.
        key: the digest of source and id, which the record is found by.
        version: of the source, for comparison; "" if it cannot tell versions apart.
        metadata: of the version, as the companion beside this name says.
        num_bytes: of the file.
        found_at: when it was fetched, in seconds since 1970.
        is_upload: whether it was uploaded, so that no source has it.
    """

    source: str
    id: str
    key: str
    version: str
    metadata: CartridgeMetadata
    num_bytes: int
    found_at: float
    is_upload: bool = False


@dataclass
class _Pin:
    """A version that this process uses; its file is open, with a shared lock."""

    file: int
    count: int = 0


class Index:
    """Names and versions below a directory, which is made by the first change.

    Args:
        directory: the store's own.
        max_bytes: of all versions; None for a tenth of the disk.

    Attributes:
        has_leftovers: whether a version that nothing names was in use when it was to be deleted.
    """

    def __init__(self, directory: Path, max_bytes: int | None) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._pins: dict[str, _Pin] = {}
        self._lock = threading.RLock()
        self._is_ready = False
        self.has_leftovers = False

    def close(self) -> None:
        """Gives up all pins."""
        with self._lock:
            for pin in self._pins.values():
                os.close(pin.file)
            self._pins.clear()

    # --- names ------------------------------------------------------------------------------------

    @staticmethod
    def key(source: str, cartridge_id: str) -> str:
        """What a record is found by."""
        return hashlib.sha256(f"{source}\n{cartridge_id}".encode()).hexdigest()

    def find(self, key: str) -> NameRecord | None:
        """The record of a name."""
        path = self._names / key
        try:
            return msgspec.json.decode(path.read_bytes(), type=NameRecord)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            log.warning("%s is ignored, since it is damaged: %s", path, error)
            return None

    def records(self) -> list[NameRecord]:
        """All names, the oldest version first."""
        try:
            keys = [path.name for path in self._names.iterdir() if not path.suffix]
        except FileNotFoundError:
            return []
        found = (self.find(key) for key in keys)
        return sorted((each for each in found if each), key=lambda each: each.found_at)

    def commit(self, record: NameRecord, file: Path, *, is_named: bool = True) -> None:
        """Takes a version's file, and lets the name mean it.

        Args:
            record: of the name.
            file: below ``incoming``, complete and on the disk.
            is_named: False leaves the name as it is.

        Raises:
            RequestError: the store has no room for it.
            OSError: the disk is full, or fails.
        """
        with self._locked():
            target = self.path(record.metadata.digest)
            if not target.exists():
                self._make_room(record)
                file.chmod(0o600)
                os.replace(file, target)
                _sync_directory(target.parent)
            _note_use(target)
            if is_named:
                _replace(self._names / record.key, msgspec.json.encode(record))
            # The version that the name meant before may have been its last name.
            self._drop_unnamed(but=record.metadata.digest)

    def remove(self, key: str, digest: str | None = None) -> None:
        """Forgets a name; its version goes, too, if nothing names or uses it.

        Args:
            key: of the name.
            digest: the version that it must mean, or the name stays; None for any.
        """
        with self._locked():
            record = self.find(key)
            if digest is None or (record is not None and record.metadata.digest == digest):
                (self._names / key).unlink(missing_ok=True)
                self._drop_unnamed()

    # --- versions ---------------------------------------------------------------------------------

    @property
    def num_bytes(self) -> int:
        """Of all versions' files; 0 where the directory cannot be read."""
        try:
            return sum(entry.stat().st_size for entry in os.scandir(self._versions))
        except OSError:
            return 0

    def path(self, digest: str) -> Path:
        return self._versions / f"{digest}{_SUFFIX}"

    def pin(self, digest: str) -> bool:
        """Keeps a version until ``unpin``, which is called as often; False if it has gone."""
        with self._lock:
            pin = self._pins.get(digest)
            if pin is None:
                try:
                    file = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    return False
                fcntl.flock(file, fcntl.LOCK_SH)
                if os.fstat(file).st_nlink == 0:  # deleted meanwhile
                    os.close(file)
                    return False
                pin = self._pins[digest] = _Pin(file)
            pin.count += 1
            _note_use(self.path(digest))
            return True

    def unpin(self, digest: str) -> bool:
        """Undoes one ``pin``; whether it was the last one."""
        with self._lock:
            pin = self._pins.get(digest)
            if pin is None:
                raise ValueError(f"version {digest} is not in use")
            pin.count -= 1
            if pin.count:
                return False
            os.close(pin.file)
            del self._pins[digest]
            return True

    def drop_unnamed(self) -> None:
        """Deletes the versions that nothing names or uses."""
        with self._locked():
            self._drop_unnamed()

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Path]:
        """A directory that is deleted at the end, or when the next engine begins."""
        path = self._incoming / secrets.token_hex(16)
        with self._locked():
            path.mkdir(mode=0o700)
            file = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(file)

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _names(self) -> Path:
        return self._directory / "names"

    @property
    def _versions(self) -> Path:
        return self._directory / "versions"

    @property
    def _incoming(self) -> Path:
        return self._directory / "incoming"

    def _prepare(self) -> None:
        with self._lock:
            if self._is_ready:
                return
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in (self._names, self._versions, self._incoming):
                path.mkdir(mode=0o700, exist_ok=True)
            self._is_ready = True
        with self._locked():
            for path in self._incoming.iterdir():
                _delete_unused(path / _LOCK)
                if not (path / _LOCK).exists():
                    shutil.rmtree(path, ignore_errors=True)
            for path in self._names.glob(f"*{_PART}"):
                path.unlink(missing_ok=True)
            self._drop_unnamed()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Excludes other threads and other engines."""
        self._prepare()
        with self._lock:
            file = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
            finally:
                os.close(file)

    def _drop_unnamed(self, but: str | None = None) -> None:
        named = {record.metadata.digest for record in self.records()} | {but}
        self.has_leftovers = False
        for path in self._versions.iterdir():
            if path.name.removesuffix(_SUFFIX) not in named and not _delete_unused(path):
                self.has_leftovers = True

    def _make_room(self, record: NameRecord) -> None:
        """Lets copies of local files and downloads go, those not used for longest first."""
        limit = self._max_bytes
        if limit is None:
            # A file system that does not know its size says 0.
            limit = int(shutil.disk_usage(self._directory).total * _DISK_SHARE) or None
        if limit is None:
            return
        versions = {path: path.stat() for path in self._versions.iterdir()}
        stored = sum(each.st_size for each in versions.values())
        names: dict[str, list[NameRecord]] = {}
        for each in self.records():
            names.setdefault(each.metadata.digest, []).append(each)
        for path in sorted(versions, key=lambda path: versions[path].st_atime_ns):
            if stored + record.num_bytes <= limit:
                return
            owners = names.get(path.name.removesuffix(_SUFFIX), [])
            if any(owner.is_upload for owner in owners) or not _delete_unused(path):
                continue
            for owner in owners:
                (self._names / owner.key).unlink(missing_ok=True)
            stored -= versions[path].st_size
            log.info("%s was deleted to make room for another cartridge", path)
        if stored + record.num_bytes > limit:
            raise RequestError(
                f"cartridge {record.id!r} of source {record.source!r} has {record.num_bytes} bytes,"
                f" and {stored} bytes of cartridges are in use or uploaded; together that is more"
                f" than max_stored_cartridge_bytes={limit}: delete cartridges, or raise it",
                _FIELD,
            )


def storage_error(error: OSError, directory: Path) -> EngineError:
    """The error that a client gets for one of the store's directory."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        log.error("%s has no room for a cartridge: %s", directory, reason)
        return StorageFull(
            f"the cartridge cannot be stored: {reason}; delete cartridges, or give cartridge_dir of"
            " the engine more room"
        )
    log.error("%s cannot be used for cartridges", directory, exc_info=error)
    return EngineError(
        f"the engine cannot use {directory}: {reason}; name another directory with cartridge_dir"
    )


def _note_use(path: Path) -> None:
    """The time of access of a version's file is that of its last use.

    That of its last change stays: a worker that reads the file looks whether it does.
    """
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _delete_unused(path: Path) -> bool:
    """Deletes a file unless a process holds its lock; whether it is gone."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(file)


def _replace(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees either what it was, or all of it."""
    part = path.with_suffix(_PART)
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
