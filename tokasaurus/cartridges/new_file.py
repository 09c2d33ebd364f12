"""A new file that takes its name only when it is complete and on the disk."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tokasaurus.errors import EngineError, StorageFull

__all__ = ["disk_error", "new_file", "put_in_place"]

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_NAME_LENGTH = 64


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """An empty file beside the target, and its path. It is removed, unless it was put in place.

    Raises:
        StorageFull, EngineError: it cannot be made.
    """
    name = f".{target.name[:_MAX_NAME_LENGTH]}.{secrets.token_hex(8)}.part"
    path = target.with_name(name)
    try:
        file = open(path, "x+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise disk_error(error) from error
    try:
        with file:
            yield file, path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def put_in_place(file: BinaryIO, path: Path, target: Path) -> None:
    """Gives a new file the target's name, and waits until both are on the disk.

    Raises:
        StorageFull, EngineError: the disk refuses it.
    """
    try:
        os.fsync(file.fileno())
        os.replace(path, target)
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise disk_error(error) from error


def disk_error(error: OSError) -> EngineError:
    """The error that a client gets."""
    reason = error.strerror or str(error)
    log.error("a cartridge cannot be stored: %s", reason)
    if error.errno in _FULL:
        return StorageFull(
            f"the cartridge cannot be stored: {reason}; delete others, or give the disk more room"
        )
    return EngineError(f"the cartridge cannot be stored: {reason}")
