"""Loaded cartridges: the pages that hold them, and the pseudo ids that stand for them.

A cartridge is a trained KV cache of N positions that come before a prompt. Each load gets N *pseudo
ids*: negative numbers that were never used before. A request that names the cartridge has them in
front of its prompt, so every length, position and key of the prefix cache follows from one array of
ids. A token behind a cartridge of N tokens has the position N + its index in the prompt.

With pages of 4, a cartridge of 10 tokens, and the prompt t u v w behind it::

    ids     -1 -2 -3 -4   -5 -6 -7 -8   -9 -10                 pinned: pages 7 3 9
    pages   [    7    ]   [    3    ]   [    9    ]
            in the prefix cache         the tail, outside

    ids     -1 -2 -3 -4   -5 -6 -7 -8   -9 -10 t u   v w       the sequence's table: 7 3 5 8
    pages   [    7    ]   [    3    ]   [    5    ]  [   8
            shared                      a copy of 9, made before the pass that feeds t

The pages of a cartridge have one more holder than the sequences that share them: a *pin*. Full
pages are in the prefix cache under the pseudo ids, and so are the pages of text behind them. The
ids are unique, so no page crosses over to another cartridge, to another version of this one, or to
a request without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokasaurus.manager.kv.allocator import PageAllocator
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["Cartridge", "Cartridges"]

_LOWEST_ID = -(1 << 31)


@dataclass(frozen=True, eq=False, slots=True)
class Cartridge:
    """One load of a cartridge.

    Attributes:
        name: under which requests name it.
        paths: of its files.
        ids: [tokens] pseudo ids.
        pages: [pages] pinned, in order of position. The last one may not be full.
    """

    name: str
    paths: tuple[str, ...]
    ids: Int32Array
    pages: Int32Array

    @property
    def num_tokens(self) -> int:
        """Positions that it takes."""
        return len(self.ids)


class Cartridges:
    """The cartridges of one replica, by name.

    Args:
        pages: where their pages come from.
    """

    def __init__(self, pages: PageAllocator) -> None:
        self._pages = pages
        self._next_id = -1
        self._by_name: dict[str, Cartridge] = {}
        self._written: dict[str, None] = {}  # names, in a fixed order

    def __contains__(self, name: str) -> bool:
        """Whether the name is taken: by a cartridge that is loaded, or still being written."""
        return name in self._by_name

    def find(self, name: str) -> Cartridge | None:
        """The cartridge of that name; None if it is not loaded, or not written yet."""
        return self._by_name[name] if name in self._written else None

    def ids_of(self, name: str) -> Int32Array:
        """The pseudo ids of a cartridge that is loaded; none for ""."""
        return self._by_name[name].ids if name else EMPTY_INT32

    def all(self) -> list[Cartridge]:
        """All cartridges that have pages, in the order in which they were loaded."""
        return list(self._by_name.values())

    def tail_page(self, name: str) -> int:
        """The page of a cartridge that is not full."""
        return int(self._by_name[name].pages[-1])

    @property
    def num_ids_left(self) -> int:
        """Pseudo ids that were never used."""
        return self._next_id - _LOWEST_ID + 1

    def begin(self, name: str, paths: tuple[str, ...], num_tokens: int) -> Cartridge:
        """Gives a cartridge pseudo ids and pinned pages, which are to be written.

        Raises:
            ProtocolError: fewer pages are available.
        """
        pages = self._pages.pin(ceil_div(num_tokens, self._pages.page_size))
        ids = np.arange(self._next_id, self._next_id - num_tokens, -1, dtype=np.int32)
        self._next_id -= num_tokens
        cartridge = Cartridge(name, paths, ids, pages)
        self._by_name[name] = cartridge
        return cartridge

    def finish(self, name: str, namespace: int) -> None:
        """The pages of a cartridge are written: requests may name it from now on.

        Args:
            name: of the cartridge.
            namespace: of the prefix cache, where its full pages can be found.
        """
        self._written[name] = None
        self._publish(self._by_name[name], namespace)

    def publish_all(self, namespace: int) -> None:
        """Makes the full pages of all cartridges findable in another namespace, which is empty.

        A cartridge does not depend on the weights. The text behind it does.
        """
        for name in self._written:
            self._publish(self._by_name[name], namespace)

    def remove(self, name: str) -> tuple[int, int]:
        """Gives back the pages of a cartridge, and those of text behind it that nothing holds.

        No request that has not ended may name it.

        Returns:
            The number of all these pages, and of the tokens in them.
        """
        cartridge = self._by_name.pop(name)
        self._written.pop(name, None)
        num_pages = self._pages.unpin(cartridge.pages, int(cartridge.ids[0]))
        num_behind = num_pages - len(cartridge.pages)
        return num_pages, cartridge.num_tokens + num_behind * self._pages.page_size

    def _publish(self, cartridge: Cartridge, namespace: int) -> None:
        num_full = cartridge.num_tokens // self._pages.page_size
        if num_full:
            ids = cartridge.ids[: num_full * self._pages.page_size]
            self._pages.publish(namespace, ids, cartridge.pages[:num_full], 0)
