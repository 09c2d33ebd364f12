"""Files on the machine of the engine: paths within the roots, and names in cartridge_dir.

All links are resolved before a path is compared with the roots, and once more when the file is
open. A file is copied before it is read, so that what its owner writes meanwhile does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokasaurus.cartridges.sources.choosing import (
    COMPANION,
    SUFFIXES,
    choose_file,
    companion_of,
)
from tokasaurus.cartridges.sources.source import Fetched, Found, SourceErrors
from tokasaurus.cartridges.sources.transfer import PIECE_BYTES
from tokasaurus.errors import RequestError
from tokasaurus.listing import listing

__all__ = ["LocalSource"]

# When another file takes the place of one.
_REPLACED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_MAX_FILES = 10_000  # of a directory
_MAX_COMPANION_BYTES = 1 << 20
# How long a file may go on changing.
_PATIENCE_S = 5.0
# A file may be written twice within one tick of the clock that file systems use.
_TICK_NS = 50_000_000
_COARSE_TICK_NS = 2_000_000_000


@dataclass(frozen=True)
class _Place:
    """A cartridge's files, with all links resolved."""

    path: Path
    companion: Path | None


class LocalSource:
    """Finds files of this machine.

    Args:
        directory: in which relative ids are looked up.
        roots: directories; what is outside of all of them does not exist for a request.
        own: the store's own directory, which may be within a root.
        max_bytes: of a file.
    """

    def __init__(self, directory: Path, roots: Sequence[Path], own: Path, max_bytes: int) -> None:
        self._directory = directory
        self._roots = tuple(roots)
        self._own = own
        self._max_bytes = max_bytes

    async def find(self, cartridge_id: str) -> Found:
        errors = SourceErrors("local", cartridge_id)
        return await asyncio.to_thread(self._find, cartridge_id, errors)

    def _find(self, cartridge_id: str, errors: SourceErrors) -> Found:
        place = self._locate(cartridge_id, errors)
        try:
            status = place.path.stat()
            version = _version(place)
        except OSError as error:
            raise _unreadable(errors, error) from None

        async def fetch(directory: Path) -> Fetched:
            end = time.monotonic() + _PATIENCE_S
            while time.monotonic() < end:
                await asyncio.sleep(_unsettled_s(place))
                fetched = await asyncio.to_thread(self._copy, cartridge_id, directory, errors)
                if fetched is not None:
                    return fetched
            raise errors.wrong(
                "its file changes while it is read; write it under another name and rename it"
            )

        return Found(version, status.st_size, fetch)

    # --- places -----------------------------------------------------------------------------------

    def _locate(self, cartridge_id: str, errors: SourceErrors) -> _Place:
        looked_for: list[str] = []
        for path in self._candidates(cartridge_id):
            looked_for.append(str(path))
            try:
                resolved = path.resolve()
            except (OSError, RuntimeError, ValueError) as error:
                raise errors.wrong(f"{path} cannot be resolved: {error}; check the id") from None
            self._check_root(resolved, errors)
            try:
                mode = resolved.stat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                raise _unreadable(errors, error) from None
            return self._place(resolved, mode, errors)
        raise errors.wrong(
            f"there is no such file on the engine's machine; looked for {listing(looked_for)};"
            " check the id, or upload the cartridge"
        )

    def _candidates(self, cartridge_id: str) -> Iterator[Path]:
        if Path(cartridge_id).is_absolute():
            yield Path(cartridge_id)
            return
        yield self._directory / cartridge_id
        for suffix in SUFFIXES:
            yield self._directory / f"{cartridge_id}{suffix}"

    def _check_root(self, resolved: Path, errors: SourceErrors) -> None:
        """What lies outside is refused whether it exists or not."""
        is_within = any(resolved.is_relative_to(root.resolve()) for root in self._roots)
        if not is_within or resolved.is_relative_to(self._own.resolve()):
            roots = listing(map(str, self._roots))
            raise errors.wrong(
                f"its path is not within the directories that cartridges may come from ({roots});"
                " move it there, or add its directory to cartridge_roots of the engine"
            )

    def _place(self, resolved: Path, mode: int, errors: SourceErrors) -> _Place:
        if stat.S_ISDIR(mode):
            try:
                names = _file_names(resolved)
            except OSError as error:
                raise _unreadable(errors, error) from None
            name = choose_file(names, errors, "name one of them as the id, with its directory")
            companion = companion_of(name, names)
            return _Place(
                self._within(resolved / name, errors),
                self._within(resolved / companion, errors) if companion else None,
            )
        if not stat.S_ISREG(mode):
            raise errors.wrong(f"{resolved} is not a regular file; name a file or a directory")
        # In a directory such as /tmp, config.yaml is probably of something else.
        beside = resolved.parent / COMPANION
        is_in_root = resolved.parent in [root.resolve() for root in self._roots]
        if is_in_root or not beside.is_file():
            return _Place(resolved, None)
        return _Place(resolved, self._within(beside, errors))

    def _within(self, path: Path, errors: SourceErrors) -> Path:
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError) as error:
            raise errors.wrong(f"{path} cannot be resolved: {error}; check the id") from None
        self._check_root(resolved, errors)
        return resolved

    # --- copies -----------------------------------------------------------------------------------

    def _copy(self, cartridge_id: str, directory: Path, errors: SourceErrors) -> Fetched | None:
        """Copies the files that the id has by now; None if they change meanwhile.

        Raises:
            RequestError: they cannot be read, or are too large.
        """
        place = self._locate(cartridge_id, errors)
        target, companion = directory / f"copy{place.path.suffix}", directory / COMPANION
        try:
            version = _version(place)
            if _unsettled_s(place) > 0:
                return None
            is_whole = self._copy_file(place.path, target, self._max_bytes, errors)
            if place.companion is not None:
                is_whole &= self._copy_file(
                    place.companion, companion, _MAX_COMPANION_BYTES, errors
                )
            is_whole &= version == _version(place)
        except PermissionError as error:
            raise _unreadable(errors, error) from None
        except OSError as error:
            if error.errno in _REPLACED:
                return None
            raise
        return (
            Fetched(target, companion if place.companion else None, version) if is_whole else None
        )

    def _copy_file(self, path: Path, target: Path, max_bytes: int, errors: SourceErrors) -> bool:
        """Whether the path is still that of the file which was copied."""
        # To open a pipe would wait for its writer.
        source = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            before = os.fstat(source)
            if not stat.S_ISREG(before.st_mode):
                raise errors.wrong(f"{path} is not a regular file; name a file or a directory")
            # A directory on the way may have become a link to elsewhere.
            resolved = path.resolve()
            self._check_root(resolved, errors)
            if not os.path.samestat(before, resolved.stat()):
                return False
            if before.st_size > max_bytes:
                raise errors.too_large(before.st_size, max_bytes)
            copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                _copy_bytes(source, copy, before.st_size)
            finally:
                os.close(copy)
        finally:
            os.close(source)
        return True


def _file_names(directory: Path) -> list[str]:
    with os.scandir(directory) as entries:
        return [
            entry.name
            for _, entry in zip(range(_MAX_FILES), entries, strict=False)
            if entry.is_file()
        ]


def _copy_bytes(source: int, target: int, num_bytes: int) -> None:
    done = 0
    while done < num_bytes and (piece := os.read(source, min(PIECE_BYTES, num_bytes - done))):
        view = memoryview(piece)
        while view:
            view = view[os.write(target, view) :]
        done += len(piece)


def _version(place: _Place) -> str:
    """Changes with the files, a tick of the clock after their last change."""
    statuses = [path.stat() for path in (place.path, place.companion) if path is not None]
    return "+".join(
        f"{each.st_dev}:{each.st_ino}:{each.st_size}:{each.st_mtime_ns}:{each.st_ctime_ns}"
        for each in statuses
    )


def _unsettled_s(place: _Place) -> float:
    """Seconds in which the files could still be written without a change of their version."""
    longest, now = 0, time.time_ns()
    for path in (place.path, place.companion):
        with contextlib.suppress(FileNotFoundError):
            if path is not None and (changed := path.stat().st_ctime_ns) <= now:
                tick = _TICK_NS if changed % 1_000_000_000 else _COARSE_TICK_NS
                longest = max(longest, changed + tick - now)
            # Otherwise the clock of a file server is ahead of ours.
    return longest / 1e9


def _unreadable(errors: SourceErrors, error: OSError) -> RequestError:
    return errors.wrong(
        f"{error.filename} cannot be read: {error.strerror}; let the engine's user read it"
    )
