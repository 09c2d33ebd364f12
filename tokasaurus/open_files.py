"""How many files, and so connections, this process may have open."""

from __future__ import annotations

import contextlib
import resource

__all__ = ["allow_many_files"]


def allow_many_files() -> None:
    """Raises the limit of files: each connection is one, and the usual limit is a thousand."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names a limit that it refuses
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
