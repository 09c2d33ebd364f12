"""The private directory of an engine, and those that killed engines have left.

An engine holds a lock on the file ``owner`` of its directory as long as it lives, and the system
releases the lock however the engine ends. A directory without that file is not touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["own_directories", "own_directory", "remove_directory", "sweep"]

_PREFIX = "tokasaurus-"
_OWNER = "owner"


def own_directory() -> tuple[str, BinaryIO]:
    """Makes a directory that no other user can read.

    Returns:
        Its path, and the file that holds the lock until it is closed or this process ends.
    """
    directory = tempfile.mkdtemp(prefix=_PREFIX)
    made = Path(directory, "new")
    file = made.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    made.rename(Path(directory, _OWNER))  # locked before another engine can find it
    return directory, file


def remove_directory(directory: str, owner: BinaryIO) -> None:
    """Deletes what ``own_directory`` has made."""
    shutil.rmtree(directory, ignore_errors=True)
    owner.close()


def sweep() -> None:
    """Deletes this user's directories whose engines are gone."""
    for directory in own_directories():
        with contextlib.suppress(OSError):
            _delete_unless_owned(directory)


def own_directories() -> Iterator[Path]:
    """This user's directories of engines, those of this machine that are gone among them."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = directory.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
                yield directory


def _delete_unless_owned(directory: Path) -> None:
    """Raises OSError if the directory has an owner, or is something else."""
    descriptor = os.open(directory / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)
