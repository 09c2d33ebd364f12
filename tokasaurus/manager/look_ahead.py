"""How many batches to keep in flight: as few as keep the device busy.

When a sequence stops, every batch in flight beyond the one that runs has computed a token in vain.
With too few batches in flight, the device waits for the manager::

    device    [ batch 7 ][ batch 8 ][ batch 9 ]
                         │ result 7             the manager absorbs it, plans batch 9 and sends it:
    manager              └▶[ turn ]─▶ batch 9   that must take less than the batches behind 7

So the batches that are queued must last for a turn of the manager and for the way through the
channels. The longest recent turn and the shortest recent batch count, since a turn that takes long
comes again.
"""

from __future__ import annotations

import math

__all__ = ["LookAhead"]

_CHANNELS_S = 1e-3  # there and back, with a process to wake on each side
_FADING = 0.97  # of the longest turn or the shortest batch, with each further one


class LookAhead:
    """The number of batches to keep in flight, by measured times.

    Attributes:
        depth: that number.

    Args:
        most: an upper bound of it, and its value until something is measured.
    """

    def __init__(self, most: int) -> None:
        self.depth = most
        self._most = most
        self._turn_s = 0.0
        self._batch_s = math.inf

    def turn_took(self, seconds: float) -> None:
        """Takes the time of a turn, from an event to the last message that followed from it."""
        self._turn_s = max(seconds, _FADING * self._turn_s)
        self._update()

    def batch_took(self, seconds: float) -> None:
        """Takes the time in which the device ran a batch."""
        self._batch_s = min(seconds, self._batch_s / _FADING)

    def _update(self) -> None:
        if self._batch_s == math.inf:
            return
        queued_s = self._turn_s + _CHANNELS_S
        if queued_s >= self._most * self._batch_s:
            self.depth = self._most
        else:
            self.depth = min(self._most, 1 + math.ceil(queued_s / self._batch_s))
