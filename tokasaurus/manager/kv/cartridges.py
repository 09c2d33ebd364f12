"""Registered cartridges: the pseudo ids that stand for them, and the pages that hold them.

A cartridge is a trained KV cache of N positions that come before a prompt. Each registration gets N
*pseudo ids*: negative numbers that were never used before. A request that names the cartridge has
them in front of its prompt, so every length, position and key of the prefix cache follows from one
array of ids. A token behind a cartridge of N tokens has the position N + its index in the prompt.

With pages of 4, a cartridge of 10 tokens, and the prompt t u v w behind it::

    ids     -1 -2 -3 -4   -5 -6 -7 -8   -9 -10                 pinned: pages 7 3 9
    pages   [    7    ]   [    3    ]   [    9    ]
            in the prefix cache         the tail, outside

    ids     -1 -2 -3 -4   -5 -6 -7 -8   -9 -10 t u   v w       the sequence's table: 7 3 5 8
    pages   [    7    ]   [    3    ]   [    5    ]  [   8
            shared                      a copy of 9, made before the pass that feeds t

A cartridge has pages only from when a sequence needs it until it is evicted::

    registered ──hold──▶ has pages, written by a control ──done──▶ is there
        ▲                                                             │ ▲
        └───────────────── evicted, or could not be written ──────────┘ │
                           hold, release: in use or idle ◀──────────────┘

The pages have one more holder than the sequences that share them: a *pin*. Full pages are in the
prefix cache under the pseudo ids, and so are the pages of text behind them. The ids are unique, so
no page crosses over to another cartridge, to another version of this one, or to a request without
it. Evicted pages may be given out while they are still being written: what is written to them next
comes later in the stream of batches and controls.

Knows nothing of sequences, nor of who writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tokasaurus.manager.kv.allocator import PageAllocator, Pin
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import CartridgeState
from tokasaurus.rounding import ceil_div

__all__ = ["Cartridge", "Cartridges", "Tally"]

_LOWEST_ID = -(1 << 31)
_NOT_SENT = -1


@dataclass(slots=True)
class Tally:
    """What is counted of cartridges; ``CartridgeState`` describes it."""

    num_requests: int = 0
    num_hits: int = 0
    num_loads: int = 0
    num_evictions: int = 0

    def add(self, other: Tally) -> None:
        """Counts what another has counted, too."""
        self.num_requests += other.num_requests
        self.num_hits += other.num_hits
        self.num_loads += other.num_loads
        self.num_evictions += other.num_evictions


@dataclass(eq=False, slots=True, kw_only=True)
class Cartridge(Pin):
    """One version of a cartridge.

    Attributes:
        name: under which requests name it.
        paths: of its files.
        ids: [tokens] pseudo ids.
        num_pages: that it takes. The last one may not be full.
        num_full_pages: of these, those that are full.
        num_holders: sequences that hold its pages, or wait for them.
        num_users: requests that name it and have not ended.
        idle_since: when the last of them ended, or when it was registered.
        tally: what happened to it.
    """

    name: str
    paths: tuple[str, ...]
    ids: Int32Array
    num_pages: int
    num_full_pages: int
    idle_since: float
    num_holders: int = 0
    num_users: int = 0
    tally: Tally = field(default_factory=Tally)
    _is_written: bool = False
    _written_by: int = _NOT_SENT  # the number of the control that writes it

    @property
    def num_tokens(self) -> int:
        """Positions that it takes."""
        return len(self.ids)

    @property
    def is_there(self) -> bool:
        """Whether sequences can use its pages."""
        return self._is_written

    @property
    def is_being_written(self) -> bool:
        """Whether the control that writes its present pages is in flight."""
        return not self._is_written and self._written_by != _NOT_SENT

    @property
    def num_pinned_pages(self) -> int:
        """Pages of a sequence's positions that it need not take, since they are in use anyway.

        Where nothing uses the cartridge, a sequence needs all its pages. If the last one is not
        full, that is one more than the sequence has positions for: -1 page less.
        """
        return self.num_full_pages if self.num_holders else self.num_full_pages - self.num_pages

    def open(self) -> None:
        """A request names it."""
        self.num_users += 1
        self.tally.num_requests += 1
        self.tally.num_hits += self._is_written

    def close(self, now: float) -> None:
        """A request that names it has ended."""
        self.num_users -= 1
        self.idle_since = now

    def state(self, now: float) -> CartridgeState:
        """What became of it so far."""
        return CartridgeState(
            name=self.name,
            num_tokens=self.num_tokens,
            num_copies=int(self._is_written),
            num_pages=len(self.pages),
            num_users=self.num_users,
            num_requests=self.tally.num_requests,
            num_hits=self.tally.num_hits,
            num_loads=self.tally.num_loads,
            num_evictions=self.tally.num_evictions,
            idle_s=0.0 if self.num_users else now - self.idle_since,
        )

    def written_by(self, control: int) -> None:
        """A control with this number was sent that writes the present pages."""
        self._written_by = control
        self.tally.num_loads += 1

    def is_answered_by(self, control: int) -> bool:
        """Whether this control was to write the pages that it has now."""
        return self.is_being_written and control == self._written_by

    def written(self) -> None:
        """The present pages hold it."""
        self._is_written = True

    def evicted(self) -> None:
        """It has lost its pages."""
        Pin.evicted(self)  # super() does not work in a dataclass with slots
        self.tally.num_evictions += self._is_written
        self._is_written = False
        self._written_by = _NOT_SENT


class Cartridges:
    """The cartridges of one replica, by name.

    Attributes:
        num_let_go: how often one came to be idle.

    Args:
        pages: where their pages come from.
    """

    def __init__(self, pages: PageAllocator) -> None:
        self._pages = pages
        self._next_id = -1
        self._by_name: dict[str, Cartridge] = {}
        # Those that were given pages since ``take_unwritten``.
        self._unwritten: dict[Cartridge, None] = {}
        self.num_let_go = 0
        self._past = Tally()  # of those that were removed

    def find(self, name: str) -> Cartridge | None:
        """The cartridge of that name; None if none is registered."""
        return self._by_name.get(name)

    def all(self) -> list[Cartridge]:
        """All cartridges, in the order in which they were registered."""
        return list(self._by_name.values())

    @property
    def num_ids_left(self) -> int:
        """Pseudo ids that were never used."""
        return self._next_id - _LOWEST_ID + 1

    def tally(self) -> Tally:
        """The counts of all cartridges that ever were registered."""
        total = Tally()
        for tally in [self._past, *(cartridge.tally for cartridge in self._by_name.values())]:
            total.add(tally)
        return total

    def states(self, now: float) -> tuple[CartridgeState, ...]:
        """What became of each so far."""
        return tuple(cartridge.state(now) for cartridge in self._by_name.values())

    def register(self, name: str, paths: tuple[str, ...], num_tokens: int, now: float) -> Cartridge:
        """Gives a cartridge pseudo ids. The name is free, and there are enough ids."""
        page_size = self._pages.page_size
        ids = np.arange(self._next_id, self._next_id - num_tokens, -1, dtype=np.int32)
        self._by_name[name] = cartridge = Cartridge(
            first_id=self._next_id,
            name=name,
            paths=paths,
            ids=ids,
            num_pages=ceil_div(num_tokens, page_size),
            num_full_pages=num_tokens // page_size,
            idle_since=now,
        )
        self._next_id -= num_tokens
        return cartridge

    def remove(self, cartridge: Cartridge) -> tuple[int, int]:
        """Forgets a cartridge that no request names, and frees its pages.

        Returns:
            The number of pages that this frees, with those of text behind it, and of the tokens in
            them.
        """
        self._past.add(cartridge.tally)
        del self._by_name[cartridge.name]
        if not len(cartridge.pages):
            return 0, 0
        num_pages = self._pages.unpin(cartridge)
        num_behind = num_pages - cartridge.num_pages
        return num_pages, cartridge.num_tokens + num_behind * self._pages.page_size

    # --- pages ------------------------------------------------------------------------------------

    def hold(self, cartridge: Cartridge, count: int = 1) -> None:
        """Sequences hold it, or wait for it: its pages stay. It gets pages if it has none.

        Raises:
            ProtocolError: too few pages are available.
        """
        if not cartridge.num_holders:
            if len(cartridge.pages):
                self._pages.keep(cartridge)
            else:
                self._pages.pin(cartridge, cartridge.num_pages)
            if not (cartridge.is_there or cartridge.is_being_written):
                self._unwritten[cartridge] = None
        cartridge.num_holders += count

    def release(self, cartridge: Cartridge, count: int = 1) -> None:
        """Sequences that held it, or waited for it, do not any more."""
        cartridge.num_holders -= count
        if not cartridge.num_holders:
            self._pages.let_go(cartridge)
            self.num_let_go += 1

    def take_unwritten(self) -> list[Cartridge]:
        """The cartridges in use whose pages nothing writes yet; they must be written now."""
        if not self._unwritten:
            return []
        unwritten, self._unwritten = self._unwritten, {}
        return [cartridge for cartridge in unwritten if cartridge.num_holders]

    def finish(self, cartridge: Cartridge, namespace: int) -> None:
        """The pages of a cartridge are written: sequences may share them from now on.

        Args:
            cartridge: that was written.
            namespace: of the prefix cache, where its full pages can be found.
        """
        cartridge.written()
        self._publish(cartridge, namespace)

    def lose(self, cartridge: Cartridge) -> int:
        """Takes the pages of a cartridge that nothing holds, if it has any; returns their number.

        This counts those of text behind it.
        """
        return self._pages.unpin(cartridge) if len(cartridge.pages) else 0

    def publish_all(self, namespace: int) -> None:
        """Makes the full pages of all cartridges findable in another namespace, which is empty.

        A cartridge does not depend on the weights. The text behind it does.
        """
        for cartridge in self._by_name.values():
            if cartridge.is_there:
                self._publish(cartridge, namespace)

    def _publish(self, cartridge: Cartridge, namespace: int) -> None:
        num_full = cartridge.num_full_pages
        if num_full:
            ids = cartridge.ids[: num_full * self._pages.page_size]
            self._pages.publish(namespace, ids, cartridge.pages[:num_full], 0)
