"""An engine as its keeper sees it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field

from tokasaurus.launch.keeping.notes import Begin, End, EngineLink
from tokasaurus.launch.process import how_it_ended

__all__ = ["EngineProcess", "start_engine"]


@dataclass(eq=False)
class EngineProcess:
    """One engine.

    Attributes:
        number: from 1.
        added_words: of its command line, by restarts.
        process: of its supervisor.
        link: the keeper's end.
        started_at: as ``time.monotonic`` counts.
        timeout_s: its ``restart_timeout_s``; None until it reads notes.
        serves: it answers clients.
        reason: why it cannot serve, as it has said before its end.
    """

    number: int
    added_words: tuple[str, ...]
    process: subprocess.Popen[bytes]
    link: EngineLink
    started_at: float = field(default_factory=time.monotonic)
    timeout_s: float | None = None
    serves: bool = False
    reason: str | None = None

    def end(self) -> None:
        """Lets it drain; the second time, ends it at once."""
        if self.timeout_s is not None:
            self.link.send(End())
        else:  # it loads code, or looks for the model, and has nothing to save
            self.process.kill()

    def reap(self) -> int:
        """Waits for the end of a process whose end of the link is closed; returns its status."""
        self.link.close()
        return self.process.wait()

    @property
    def how_it_ended(self) -> str:
        """Why an engine that has ended did not serve, or no longer does."""
        return self.reason or how_it_ended(self.process)


def start_engine(begin: Begin) -> EngineProcess:
    """Starts an engine in an interpreter of its own, which finds the package as it is now."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "tokasaurus.launch.keeping.engine_program", str(theirs.fileno())],
        pass_fds=[theirs.fileno(), begin.listener_fd],
    )
    theirs.close()
    link = EngineLink(ours)
    link.send(begin)
    return EngineProcess(begin.number, begin.added_words, process, link)
