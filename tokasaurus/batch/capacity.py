"""How much of the engine all batches may use at once, and how important each line is.

The limits keep the engine full and the memory small. A line that exceeds a whole limit runs alone.
"""

from __future__ import annotations

import asyncio

__all__ = ["BATCH_PRIORITY", "Capacity"]

BATCH_PRIORITY = 1_000  # lower runs first; requests of clients have 0 unless they say otherwise

# One of this many lines in flight is as important as a request, so that batches never starve.
_ORDINARY_SHARE = 16


class Capacity:
    """Counts what batches have in flight.

    Args:
        max_samples: how many samples may be in flight.
        max_bytes: how many bytes of requests may be in flight.
    """

    def __init__(self, max_samples: int, max_bytes: int) -> None:
        self._limits = (max_samples, max_bytes)
        self._used = (0, 0)
        self._num_lines = 0
        self._num_ordinary = 0
        self._entry = asyncio.Lock()  # first come, first served: batches alternate
        self._freed = asyncio.Event()

    async def take(self, num_samples: int, num_bytes: int) -> int:
        """Waits for room for a line, and returns the line's priority."""
        async with self._entry:
            while self._num_lines and not self._fits(num_samples, num_bytes):
                self._freed.clear()
                await self._freed.wait()
            self._used = (self._used[0] + num_samples, self._used[1] + num_bytes)
            is_ordinary = self._num_ordinary * _ORDINARY_SHARE <= self._num_lines
            self._num_lines += 1
            self._num_ordinary += is_ordinary
            return 0 if is_ordinary else BATCH_PRIORITY

    def give_back(self, num_samples: int, num_bytes: int, priority: int) -> None:
        """Frees what a line took."""
        self._used = (self._used[0] - num_samples, self._used[1] - num_bytes)
        self._num_lines -= 1
        self._num_ordinary -= priority == 0
        self._freed.set()

    @property
    def num_lines(self) -> int:
        """The number of lines in flight."""
        return self._num_lines

    def _fits(self, num_samples: int, num_bytes: int) -> bool:
        return (
            self._used[0] + num_samples <= self._limits[0]
            and self._used[1] + num_bytes <= self._limits[1]
        )
