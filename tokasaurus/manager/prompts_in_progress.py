"""Who is computing which page of a prompt right now, so that nobody computes it a second time.

A prompt that is being fed claims the first page of it that is not yet in the prefix cache, under the ids
up to that page's end. Whoever would have to compute the same page next waits for the claim to move on::

    A  [system prompt    |question A]     claims page 0, as far as its chunks have not filled it
    B  [system prompt    |question B]     waits; looks again as soon as A's next pages can be found

Knows nothing of where pages are, nor of who may run.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from tokasaurus.manager.sequence import Sequence

__all__ = ["PromptsInProgress"]

_NOBODY: Rows[Sequence] = ()


@dataclass(eq=False, slots=True)
class _Claim:
    sequence: Sequence
    key: bytes
    waiting: list[Sequence] = field(default_factory=list)


class PromptsInProgress:
    """Claims by page, one for each prompt at most, and those that wait for each.

    Args:
        page_size: tokens.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._by_key: dict[bytes, _Claim] = {}
        self._by_sequence: dict[Sequence, _Claim] = {}

    def enter(self, sequence: Sequence, num_pages: int) -> bool:
        """A sequence is about to feed its prompt.

        Args:
            sequence: whose prompt it is.
            num_pages: its leading pages that can be found.

        Returns:
            Whether it may. If not, a sequence that goes before it computes the same page: it waits, and
            is among those that ``advance`` or ``leave`` returns for the other one.
        """
        key = self._key(sequence, num_pages)
        if key is None:
            return True
        other = self._by_key.get(key)
        if other is None:
            self._claim(sequence, key)
        elif other.sequence.order < sequence.order:
            other.waiting.append(sequence)
            return False
        return True  # what goes first waits for nobody

    def advance(self, sequence: Sequence, num_pages: int) -> Rows[Sequence]:
        """So many leading pages of its prompt can be found now; returns who waited for them."""
        claim = self._by_sequence.get(sequence)
        key = self._key(sequence, num_pages)
        if claim is not None and claim.key == key:
            return _NOBODY
        woken = self.leave(sequence)
        if key is not None and key not in self._by_key:
            self._claim(sequence, key)
        return woken

    def leave(self, sequence: Sequence) -> Rows[Sequence]:
        """The sequence feeds its prompt no more; returns who waited for it."""
        claim = self._by_sequence.pop(sequence, None)
        if claim is None:
            return _NOBODY
        del self._by_key[claim.key]
        return claim.waiting

    def __len__(self) -> int:
        return len(self._by_sequence)

    def waiting(self) -> list[Sequence]:
        """All that wait, those that have ended in the meantime included."""
        return [sequence for claim in self._by_sequence.values() for sequence in claim.waiting]

    def _claim(self, sequence: Sequence, key: bytes) -> None:
        self._by_key[key] = self._by_sequence[sequence] = _Claim(sequence, key)

    def _key(self, sequence: Sequence, num_pages: int) -> bytes | None:
        end = (num_pages + 1) * self._page_size
        ids = sequence.prompt_ids
        return ids[:end].tobytes() if end <= len(ids) else None
