"""Which sequence is computing which page of a prompt right now, so that no page is computed twice.

A sequence that feeds its prompt, or comes first in the queue, claims the first page of the prompt
that is not yet in the prefix cache, under its namespace and the ids up to the end of that page. A
sequence that would have to compute the same page next waits for the claim to move on::

    A  [system prompt    |question A]     claims page 0, as far as its chunks have not filled it
    B  [system prompt    |question B]     waits; looks again as soon as A's next pages can be found

Knows nothing of where pages are, nor of which sequences may run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from tokasaurus.manager.sequence import Sequence

__all__ = ["PromptsInProgress"]


_Key: TypeAlias = tuple[int, bytes]  # namespace, ids


@dataclass(eq=False, slots=True)
class _Claim:
    sequence: Sequence
    key: _Key
    waiting: list[Sequence] = field(default_factory=list)


class PromptsInProgress:
    """Claims by page, one for each prompt at most, and those that wait for each.

    Args:
        page_size: tokens.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._by_key: dict[_Key, _Claim] = {}
        self._by_sequence: dict[Sequence, _Claim] = {}
        self.woken: list[Sequence] = []  # the caller takes them out and lets them go on

    def enter(self, namespace: int, sequence: Sequence, num_pages: int) -> bool:
        """Claims the next page of a sequence that is about to feed its prompt, or will be soon.

        Args:
            namespace: of the pages.
            sequence: that feeds it.
            num_pages: leading pages of its prompt that can be found.

        Returns:
            Whether it may feed the prompt. If not, a sequence that goes before it computes the same
            page: it waits, and is among the ``woken`` as soon as the other one is done with the
            page.
        """
        key = self._key(namespace, sequence, num_pages)
        other = None if key is None else self._by_key.get(key)
        if other is not None and other.sequence.order < sequence.order:
            self.leave(sequence)
            other.waiting.append(sequence)
            return False
        self._claim(sequence, key)
        return True

    def advance(self, namespace: int, sequence: Sequence, num_pages: int) -> None:
        """Moves the claim behind ``num_pages`` pages that can be found now; wakes what waited."""
        self._claim(sequence, self._key(namespace, sequence, num_pages))

    def leave(self, sequence: Sequence) -> None:
        """Drops the claim of a sequence, if it has one; wakes those that waited for it."""
        claim = self._by_sequence.pop(sequence, None)
        if claim is not None:
            del self._by_key[claim.key]
            self.woken += claim.waiting

    def sequences(self) -> list[Sequence]:
        """All sequences that claim a page."""
        return list(self._by_sequence)

    def waiting(self) -> list[Sequence]:
        """All sequences that wait, including those that have ended in the meantime."""
        return [sequence for claim in self._by_sequence.values() for sequence in claim.waiting]

    def _claim(self, sequence: Sequence, key: _Key | None) -> None:
        claim = self._by_sequence.get(sequence)
        if claim is not None and claim.key == key:
            return
        self.leave(sequence)
        if key is None:
            return
        other = self._by_key.get(key)
        if other is None:
            self._by_key[key] = self._by_sequence[sequence] = _Claim(sequence, key)
        elif sequence.order < other.sequence.order:  # it goes first, and the others wait for it
            del self._by_sequence[other.sequence]
            other.sequence = sequence
            self._by_sequence[sequence] = other

    def _key(self, namespace: int, sequence: Sequence, num_pages: int) -> _Key | None:
        end = (num_pages + 1) * self._page_size
        ids = sequence.prompt_ids
        return (namespace, ids[:end].tobytes()) if end <= len(ids) else None
