"""Recently used cartridges in the memory of the host, where all workers of a machine read them.

A file that is mapped and was read whole is in the page cache of the system, which all processes
share. Under pressure the system may still take its pages, and reads them again from the disk.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import sys
import threading
from collections import OrderedDict
from pathlib import Path

__all__ = ["HostCopies"]

log = logging.getLogger(__name__)

_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14
_PAGE_BYTES = 4096
_STRIDE_BYTES = 64 << 20


class HostCopies:
    """Maps files up to a limit; those not used for longest go first. Any thread may call it.

    Args:
        max_bytes: of all files together. A larger file is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._maps

    @property
    def num_bytes(self) -> int:
        """Of all files that are kept."""
        with self._lock:
            return self._sum()

    def touch(self, digest: str) -> bool:
        """Makes a file the one used last; whether it is kept."""
        with self._lock:
            if digest in self._maps:
                self._maps.move_to_end(digest)
            return digest in self._maps

    def keep(self, digest: str, path: Path) -> None:
        """Reads a file into memory, and lets others go to make room; blocks."""
        if self.touch(digest):
            return
        try:
            with open(path, "rb") as file:
                num_bytes = file.seek(0, 2)
                if not 0 < num_bytes <= self._max_bytes:
                    return
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            log.warning("%s is not kept in memory: %s", path, error.strerror)
            return
        _populate(mapped)
        with self._lock:
            self._maps[digest] = mapped
            while self._sum() > self._max_bytes:
                self._maps.popitem(last=False)

    def drop(self, digest: str) -> None:
        """Lets a file go."""
        with self._lock:
            self._maps.pop(digest, None)

    def clear(self) -> None:
        with self._lock:
            self._maps.clear()

    def _sum(self) -> int:
        return sum(len(each) for each in self._maps.values())


def _populate(mapped: mmap.mmap) -> None:
    """Reads each page of a file."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # older systems do not know it
            mapped.madvise(_POPULATE_READ)
            return
    for start in range(0, len(mapped), _STRIDE_BYTES):
        mapped[start : start + _STRIDE_BYTES : _PAGE_BYTES]
