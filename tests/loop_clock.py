"""The clock of an event loop, which tests move, so that time limits end without any wait."""

from __future__ import annotations

import asyncio
import time


class LoopClock:
    """Shows the time that really passes, and what a test adds to it.

    Args:
        loop: any thread may move its clock.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ahead_s = 0.0
        loop.time = lambda: time.monotonic() + self._ahead_s  # type: ignore[method-assign]

    def advance(self, seconds: float) -> None:
        """Time limits that are over by then end in the loop's next turn."""
        self._ahead_s += seconds
        self._loop.call_soon_threadsafe(lambda: None)  # it may be waiting
