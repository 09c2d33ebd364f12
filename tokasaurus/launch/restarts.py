"""Whether a replica that has ended is started again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

__all__ = ["WITHIN_S", "Restarts"]

WITHIN_S = 600.0
"""The time in which restarts of a replica are counted, in seconds."""

_MOST_IN_VAIN = 2


class Restarts:
    """Counts the ends of replicas.

    Args:
        most: how often a replica starts again within ``WITHIN_S``.
        clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._times: dict[int, deque[float]] = {}  # of restarts, by replica
        self._ready: set[int] = set()
        self._in_vain: dict[int, int] = {}  # starts in a row that did not make it ready, by replica

    def ready(self, replica: int) -> None:
        """The replica is able to work."""
        self._ready.add(replica)
        self._in_vain[replica] = 0

    def ended(self, replica: int) -> str | None:
        """The replica has ended, and is started again unless there is a reason against it.

        Returns:
            Why it is not started again; None if it is.
        """
        if not self._most:
            return "replica_restarts=0"
        if replica not in self._ready:
            self._in_vain[replica] = self._in_vain.get(replica, 0) + 1
        self._ready.discard(replica)
        if self._in_vain[replica] >= _MOST_IN_VAIN:
            return f"{_MOST_IN_VAIN} starts in a row have not made it ready"
        now = self._clock()
        times = self._times.setdefault(replica, deque())
        while times and now - times[0] > WITHIN_S:
            times.popleft()
        if len(times) >= self._most:
            minutes = round(WITHIN_S / 60)
            return f"it was started again {len(times)} times in {minutes} minutes"
        times.append(now)
        return None
