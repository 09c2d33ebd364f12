"""Finds stop strings in text that arrives in pieces, and never lets any part of one out.

::

    text so far   "... the answer is 12\\n\\nQ"          stop string "\\n\\nQuestion"
                   ───────── released ─────┴─ held ─┘     its prefix "\\n\\nQ" is held back
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStringSearch"]


class StopStringSearch:
    """Searches one sample's text.

    Of the stop strings in the text, the one that ends first wins; of those that end together, the
    longest. The text ends where the winner begins.

    Args:
        strings: the stop strings; none empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted(strings, key=len, reverse=True)
        self._longest = max((len(string) for string in strings), default=0)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """Takes the next piece; returns what may be shown now. Sets ``found`` at a stop string."""
        if self.found is not None:
            return ""
        if not self._strings:
            return piece
        text = self._held + piece
        begin = self._first(text)
        if begin is not None:
            self._held = ""
            return text[:begin]
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The sample ended without a stop string: releases what was held back."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> int | None:
        best: tuple[int, int] | None = (
            None  # (end, begin); the held text holds no whole stop string
        )
        for string in self._strings:
            begin = text.find(string)
            if begin >= 0 and (best is None or (begin + len(string), begin) < best):
                best = (begin + len(string), begin)
                self.found = string
        return None if best is None else best[1]

    def _partial(self, text: str) -> int:
        """Length of the longest end of the text with which some stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(len(s) > length and s.startswith(tail) for s in self._strings):
                return length
        return 0
