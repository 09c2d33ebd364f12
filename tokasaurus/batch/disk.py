"""Errors for clients when the disk is full or fails."""

from __future__ import annotations

import errno
import logging
import sqlite3

from tokasaurus.errors import EngineError, StorageFull

__all__ = ["disk_error"]

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SQLITE_FULL = "database or disk is full"  # its code is an attribute from Python 3.11 on only


def disk_error(error: OSError | sqlite3.Error) -> EngineError:
    """The error that a client gets for one of the store or of a file in it."""
    if isinstance(error, OSError):
        reason, is_full = error.strerror or str(error), error.errno in _NO_ROOM
    else:
        reason, is_full = str(error), str(error) == _SQLITE_FULL
    if is_full:
        log.error("a request failed because data_dir has no room: %s", reason)
        return StorageFull(
            f"this cannot be stored: {reason}; the server has no room for it. Delete files, or ask"
            " its operator for more"
        )
    log.error("a request failed with data_dir", exc_info=error)
    return EngineError(f"the server cannot use its data_dir: {reason}")
