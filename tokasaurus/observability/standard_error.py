"""Standard error of a process whose log has a format: what others write there becomes log lines."""

from __future__ import annotations

import io
import logging
import threading
from typing import TextIO

__all__ = ["LoggedOutput"]

_log = logging.getLogger("stderr")


class LoggedOutput(io.TextIOBase):
    """Takes the place of ``sys.stderr``, and logs each line as a warning.

    Of what a line writes over itself, as progress bars do, only the last state counts.

    Args:
        stream: standard error itself, which log lines go to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._begun = ""  # a line without its end
        self._lock = threading.Lock()
        self._local = threading.local()

    def write(self, text: str) -> int:
        if getattr(self._local, "is_logging", False):  # logging complains of a line of its own
            return self.stream.write(text)
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            self._begun = self._begun[self._begun.rfind("\r", 0, -1) + 1 :]
        self._local.is_logging = True
        try:
            for line in lines:
                shown = line.rstrip().rpartition("\r")[2]
                if shown:
                    _log.warning("%s", shown)
        finally:
            self._local.is_logging = False
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding
