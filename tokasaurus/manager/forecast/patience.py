"""When to ask the forecast again after it refused the head of the queue.

A refusal stays right until something happens, with one exception: time alone may make room. A
sequence that starts later has fewer pages when the use of the others peaks, one page for every
``page_size`` steps. So the head is asked about again after ``page_size`` steps, then after twice as
many, and so on. It is asked about at once when pages come free or another sequence becomes the
head.
"""

from __future__ import annotations

from tokasaurus.manager.sequence import Sequence

__all__ = ["Patience"]

_LONGEST_WAIT = 64  # steps


class Patience:
    """Remembers the sequence that was refused last, and when it may be asked about again.

    Args:
        page_size: tokens.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._wait = page_size  # steps, after the next refusal
        self._refused: Sequence | None = None
        self._retry_at = 0

    def is_over(self, head: Sequence | None, step: int) -> bool:
        """Whether asking is worth its time.

        Args:
            head: of the queue.
            step: the present one.
        """
        return self._refused is None or head is not self._refused or step >= self._retry_at

    def refuse(self, sequence: Sequence, step: int) -> None:
        """There was no room for this sequence."""
        self._refused = sequence
        self._retry_at = step + self._wait
        self._wait = min(2 * self._wait, _LONGEST_WAIT)

    def forget(self) -> None:
        """The forecast is asked now: what it said before does not matter any more."""
        self._refused = None

    def pages_come_free(self) -> None:
        """There may be room, and later refusals begin with the shortest wait again."""
        self._refused = None
        self._wait = self._page_size
