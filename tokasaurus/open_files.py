"""How many files, and so connections, this process may have open."""

from __future__ import annotations

import contextlib
import math
import resource

__all__ = ["allow_many_files", "num_files_allowed"]


def allow_many_files() -> float:
    """Raises the limit of files: each connection is one, and the usual limit is a thousand.

    Returns:
        The limit now.
    """
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS names a limit that it refuses
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return num_files_allowed()


def num_files_allowed() -> float:
    """How many files this process may have open at once; infinite without a limit."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if allowed == resource.RLIM_INFINITY else allowed
