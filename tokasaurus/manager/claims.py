"""Which sequences wait for which cartridge.

A sequence that may run but whose cartridge is not there *claims* it: the cartridge gets pages, is
written, and its pages stay until the sequence has started or given up the claim. Others of the same
cartridge join. Meanwhile the sequence is parked, so the queue behind it goes on::

    queue ──claim──▶ parked ──the cartridge is written──▶ queue ──▶ starts: the claim is over
      ▲                │                                    │
      └────────────────┴──────────── dropped ◀──────────────┘

A claim keeps pages from others, so it can be dropped: for a sequence that comes before it in the
order, or when running sequences need the pages.

Where there is no room for a cartridge, the sequence *steps aside* for a while, and so do others of
this cartridge. So sequences run whose cartridges are there, although they come later, and an engine
does not change cartridges with each request. They are recalled when a cartridge is not used any
more, and when the first of them has waited for long. A sequence that has waited for long does not
step aside again: the queue waits behind it.
"""

from __future__ import annotations

import math

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
        wait_s: how long a sequence may step aside, in seconds of the device.
    """

    def __init__(self, cartridges: Cartridges, wait_s: float) -> None:
        self._cartridges = cartridges
        self._wait_s = wait_s
        self._by_sequence: dict[Sequence, Cartridge] = {}
        self.woken: list[Sequence] = []
        self._aside: dict[Sequence, None] = {}
        # By sequence: when there was no room for its cartridge for the first time.
        self._refused_at: dict[Sequence, float] = {}
        self._refused: set[Cartridge] = set()  # since the last recall
        self._recall_at = math.inf
        self._num_let_go = 0  # of the cartridges, at the last recall

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._by_sequence

    def add(self, sequence: Sequence, cartridge: Cartridge) -> None:
        """A sequence waits for its cartridge; the pages for that are available.

        Harmless if it has claimed it already.
        """
        if sequence not in self._by_sequence:
            self._cartridges.hold(cartridge)
            self._by_sequence[sequence] = cartridge

    def leave(self, sequence: Sequence) -> None:
        """A sequence has started or ended: its claim is over, if it has one."""
        self._refused_at.pop(sequence, None)
        self._aside.pop(sequence, None)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        cartridge = self._by_sequence.pop(sequence, None)
        if cartridge is not None:
            self._cartridges.release(cartridge)

    def drop_behind(self, order: int) -> bool:
        """Drops the last claim, if it comes after this order; returns whether it does."""
        last = self.last()
        if last is None or last.order <= order:
            return False
        self.drop(last)
        return True

    def drop(self, sequence: Sequence) -> None:
        """Takes the claim of a sequence, which begins anew in the queue."""
        if not self._by_sequence[sequence].is_there:
            self.woken.append(sequence)
        num_before = self._cartridges.num_let_go
        self._release(sequence)
        # This makes room for the sequence that wants it, not for those that have stepped aside.
        self._num_let_go += self._cartridges.num_let_go - num_before

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

    # --- no room ----------------------------------------------------------------------------------

    @property
    def is_any_aside(self) -> bool:
        """Whether sequences have stepped aside."""
        return bool(self._aside)

    def aside(self) -> list[Sequence]:
        """The sequences that have stepped aside."""
        return list(self._aside)

    def is_refused(self, cartridge: Cartridge) -> bool:
        """Whether there was no room for a cartridge that is not in use, since the last recall."""
        return cartridge in self._refused and not cartridge.num_holders

    def step_aside(self, sequence: Sequence, cartridge: Cartridge, now: float) -> bool:
        """There is no room for the cartridge of this sequence of the queue.

        Args:
            sequence: that wants it.
            cartridge: its own.
            now: seconds that the device has worked.

        Returns:
            Whether it steps aside: the caller parks it. Otherwise it has waited for long.
        """
        until = self._refused_at.setdefault(sequence, now) + self._wait_s
        if now >= until:
            return False
        self._aside[sequence] = None
        self._refused.add(cartridge)
        self._recall_at = min(self._recall_at, until)
        return True

    def recall_is_due(self, now: float) -> bool:
        """Whether there may be room for one that has stepped aside, or one has waited for long."""
        if not self._aside:
            return False
        return now >= self._recall_at or self._cartridges.num_let_go != self._num_let_go

    def recall(self) -> None:
        """Wakes all that have stepped aside."""
        self.woken += self._aside
        self._aside.clear()
        self._refused.clear()
        self._recall_at = math.inf
        self._num_let_go = self._cartridges.num_let_go

    # --- order ------------------------------------------------------------------------------------

    def last(self) -> Sequence | None:
        """The sequence with a claim that comes last in the order; None if there are no claims."""
        return max(self._by_sequence, key=lambda sequence: sequence.order, default=None)

    def first_order(self) -> int:
        """The order of the first sequence with a claim; more than any order if there are none."""
        return min((sequence.order for sequence in self._by_sequence), default=NO_ORDER)
