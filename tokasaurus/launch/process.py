"""Processes and their ends. This module imports nothing heavy."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import NoReturn, Protocol

__all__ = ["Process", "end_process", "how_it_ended"]


class Process(Protocol):
    """A process that has been started, here or elsewhere.

    Attributes:
        pid: on this machine; None elsewhere.
    """

    @property
    def pid(self) -> int | None: ...

    def kill(self) -> None:
        """Ends it at once, if it has not ended."""

    def wait(self) -> int | None:
        """Waits for its end.

        Returns:
            The exit status, less than 0 for a signal; None if the process cannot be seen any more.
        """


def how_it_ended(process: Process) -> str:
    """Waits for the end of a process, and says how it came."""
    status = process.wait()
    if status is None:
        return "lost the connection"
    if status >= 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    hint = "; perhaps the system ran out of memory" if status == -signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def end_process(status: int) -> NoReturn:
    """Ends this process, whose work is done.

    Python would first take millions of objects apart one by one, which can take seconds on a busy
    machine, while whoever has seen the end of this process's socket waits for the process.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
