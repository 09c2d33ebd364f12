"""Which sequences wait for which cartridge.

A sequence that may run but whose cartridge is not there *claims* it: the cartridge gets pages, is
written, and its pages stay until the sequence has started or given up the claim. Others of the same
cartridge join. Meanwhile the sequence is parked, so the queue behind it goes on::

    queue ──claim──▶ parked ──the cartridge is written──▶ queue ──▶ starts: the claim is over
      ▲                │                                    │
      └────────────────┴──────────── dropped ◀──────────────┘

A claim keeps pages from others, so it can be dropped: for a sequence that comes before it in the
order, or when running sequences need the pages.
"""

from __future__ import annotations

from tokasaurus.manager.kv.cartridges import Cartridge, Cartridges
from tokasaurus.manager.order import NO_ORDER
from tokasaurus.manager.sequence import Sequence

__all__ = ["Claims"]


class Claims:
    """Claims by sequence, one for each at most.

    Attributes:
        woken: sequences that may go back to the queue; the caller takes them out.

    Args:
        cartridges: of the replica.
    """

    def __init__(self, cartridges: Cartridges) -> None:
        self._cartridges = cartridges
        self._by_sequence: dict[Sequence, Cartridge] = {}
        self.woken: list[Sequence] = []

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._by_sequence

    def add(self, sequence: Sequence, cartridge: Cartridge) -> None:
        """A sequence waits for its cartridge; the pages for that are available."""
        self._cartridges.hold(cartridge)
        self._by_sequence[sequence] = cartridge

    def leave(self, sequence: Sequence) -> None:
        """A sequence has started or ended: its claim is over, if it has one."""
        cartridge = self._by_sequence.pop(sequence, None)
        if cartridge is not None:
            self._cartridges.release(cartridge)

    def drop(self, sequence: Sequence) -> None:
        """Takes the claim of a sequence, which begins anew in the queue."""
        if not self._by_sequence[sequence].is_there:
            self.woken.append(sequence)
        self.leave(sequence)

    def drop_all(self) -> None:
        """Takes all claims."""
        for sequence in self.sequences():
            self.drop(sequence)

    def is_written(self, cartridge: Cartridge) -> None:
        """Wakes those that waited for a cartridge, which is there now. They keep their claims."""
        self.woken += [each for each, its in self._by_sequence.items() if its is cartridge]

    def sequences(self) -> list[Sequence]:
        """All sequences with a claim."""
        return list(self._by_sequence)

    def last(self) -> Sequence | None:
        """The sequence with a claim that comes last in the order; None if there are no claims."""
        return max(self._by_sequence, key=lambda sequence: sequence.order, default=None)

    def first_order(self) -> int:
        """The order of the first sequence with a claim; more than any order if there are none."""
        return min((sequence.order for sequence in self._by_sequence), default=NO_ORDER)
