"""How many batches to keep in flight: as few as keep the device busy.

Every batch in flight beyond the one that runs is a token computed in vain when a sequence stops. Too few,
and the device waits for the manager::

    device    [ batch 7 ][ batch 8 ][ batch 9 ]
                         │ result 7            the manager absorbs it, plans batch 9 and sends it: that must
    manager              └▶[ turn ]─▶ batch 9   take less than the batches that are queued behind 7

So the batches that are queued must last for a turn of the manager and for the channels. Both the longest
recent turn and the shortest recent batch count: a turn that does more than others comes again.
"""

from __future__ import annotations

import math

__all__ = ["LookAhead"]

_CHANNELS_S = 1e-3  # there and back, with a process that must be woken on each side
_FADING = 0.97  # of what was longest or shortest, with each turn or batch


class LookAhead:
    """Follows measured times.

    Args:
        most: batches in flight, whatever is measured; also as long as nothing is.
    """

    def __init__(self, most: int) -> None:
        self.depth = most
        self._most = most
        self._turn_s = 0.0
        self._batch_s = math.inf

    def turn_took(self, seconds: float) -> None:
        """The manager was busy for so long, from an event to the last message that followed."""
        self._turn_s = max(seconds, _FADING * self._turn_s)
        self._update()

    def batch_took(self, seconds: float) -> None:
        """The device ran a batch in this time."""
        self._batch_s = min(seconds, self._batch_s / _FADING)

    def _update(self) -> None:
        if self._batch_s == math.inf:
            return
        queued_s = self._turn_s + _CHANNELS_S
        if queued_s >= self._most * self._batch_s:
            self.depth = self._most
        else:
            self.depth = min(self._most, 1 + math.ceil(queued_s / self._batch_s))
