"""Which replica has which beginnings of prompts in its prefix cache, as far as the router knows.

The router does not ask: it remembers what it has sent where. For each replica it keeps the blocks
of prompts that were sent last, as many tokens as the replica's cache holds. A replica's cache may
have given up a block that is remembered here, or still have one that is not. That costs time, and
changes no result.

A block begins where the one before it ends, and its key stands for everything up to its end::

    tokens   0     64    128   192  ...  1024        1152        1280  ...
             ├─────┼─────┼─────┼─────────┼───────────┼───────────┼
    key            k0    k1    k2        k15         k16         k17

Blocks have 64 tokens, and where that is more, an eighth of what comes before them in multiples of
64. So the keys of a prompt are few, however long it is.

The key of a prefix is the sum of its ids (plus 1), each multiplied by a random number of its
position (multilinear hashing: Carter and Wegman, 1979). It takes one pass of numpy for all blocks.
The numbers are drawn anew in each process, so that a client cannot make two prefixes of one key.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from tokasaurus.protocol.arrays import Int32Array

__all__ = ["Blocks", "PrefixPlaces"]

Blocks: TypeAlias = Sequence[tuple[int, int]]
"""The blocks of a prompt from its beginning on: a key, and the tokens up to the block's end.

Positions of a cartridge before the prompt count.
"""

_BLOCK_TOKENS = 64
_GROWTH = 8  # a block has about one token for this many before it
_FIRST_ROOM = 4096  # tokens
_ONE = np.uint64(1)


class PrefixPlaces:
    """The beginnings of prompts that each replica probably has in its cache."""

    def __init__(self) -> None:
        self._recent: dict[int, _Recent] = {}  # by replica
        self._holders: dict[int, int] = {}  # by key: a bit for each replica
        self._cartridges: dict[str, int] = {}  # positions of each that is registered
        self._ends: list[int] = []  # of blocks, in tokens
        self._factors = np.zeros(0, np.uint64)  # by position
        self._random = np.random.default_rng()

    def add(self, replica: int, num_tokens: int) -> None:
        """A replica with an empty cache for this number of tokens."""
        self.drop(replica)
        self._recent[replica] = _Recent(num_tokens)

    def drop(self, replica: int) -> None:
        """The replica's cache is gone, if it was there."""
        recent = self._recent.pop(replica, None)
        for key in () if recent is None else recent.sizes:
            self._forget(key, replica)

    def clear(self) -> None:
        """All caches are empty."""
        self._holders.clear()
        for recent in self._recent.values():
            recent.sizes.clear()
            recent.num_tokens = 0

    def register(self, cartridge: str, num_tokens: int) -> None:
        """There is a cartridge, which takes this many positions before a prompt."""
        self._cartridges[cartridge] = num_tokens

    def unregister(self, cartridge: str) -> None:
        """No prompt comes behind this cartridge any more, if one ever did."""
        self._cartridges.pop(cartridge, None)

    def num_before(self, cartridge: str) -> int:
        """The positions of what comes before a prompt; 0 for "", and for what is not registered."""
        return self._cartridges.get(cartridge, 0)

    def blocks(self, prompt_ids: Int32Array, cartridge: str = "") -> Blocks:
        """The blocks of a prompt, without tokens at its end that do not fill one.

        A cartridge before it is the first block.

        Args:
            prompt_ids: [prompt length].
            cartridge: the name of what comes before the prompt; another makes other keys.
        """
        blocks = self._blocks_of(prompt_ids)
        if not cartridge:
            return blocks
        num_before = self.num_before(cartridge)
        behind = [(hash((key, cartridge)), num_before + end) for key, end in blocks]
        return [(hash(cartridge), num_before), *behind] if num_before else behind

    def _blocks_of(self, prompt_ids: Int32Array) -> Blocks:
        if len(prompt_ids) > len(self._factors):
            self._make_room(len(prompt_ids))
        count = bisect_right(self._ends, len(prompt_ids))
        if not count:
            return ()
        ends = self._ends[:count]
        length = ends[-1]
        # Id 0 must count, too.
        products = (prompt_ids[:length].astype(np.uint64) + _ONE) * self._factors[:length]
        sums = np.add.reduceat(products, [0, *ends[:-1]])
        keys = np.cumsum(sums, dtype=np.uint64).tolist()
        return list(zip(keys, ends, strict=True))

    def cached(self, blocks: Blocks) -> dict[int, int]:
        """The tokens that each replica probably has, for those that have any."""
        found: dict[int, int] = {}
        holders, before = -1, 0  # of all blocks so far, and the tokens of these
        for key, end in blocks:
            here = holders & self._holders.get(key, 0)
            if before:
                _set_each(found, holders & ~here, before)
            holders, before = here, end
            if not here:
                return found
        if before:
            _set_each(found, holders, before)
        return found

    def note(self, replica: int, blocks: Blocks) -> None:
        """A prompt with these blocks goes to the replica."""
        recent = self._recent[replica]
        # A block is of no use without those before it, so it is given up before them.
        for index in range(len(blocks) - 1, -1, -1):
            key, end = blocks[index]
            if key in recent.sizes:
                recent.sizes.move_to_end(key)
            else:
                size = end - (blocks[index - 1][1] if index else 0)
                recent.sizes[key] = size
                recent.num_tokens += size
                self._holders[key] = self._holders.get(key, 0) | 1 << replica
        while recent.num_tokens > recent.max_tokens:
            key, size = recent.sizes.popitem(last=False)
            recent.num_tokens -= size
            self._forget(key, replica)

    def _forget(self, key: int, replica: int) -> None:
        holders = self._holders[key] & ~(1 << replica)
        if holders:
            self._holders[key] = holders
        else:
            del self._holders[key]

    def _make_room(self, num_tokens: int) -> None:
        """Draws numbers for prompts of this length, at least twice as many as before."""
        room = max(num_tokens, 2 * len(self._factors), _FIRST_ROOM)
        more = self._random.integers(
            0, 1 << 64, room - len(self._factors), dtype=np.uint64, endpoint=False
        )
        self._factors = np.concatenate([self._factors, more | _ONE])
        end = self._ends[-1] if self._ends else 0
        while end < room:
            end += max(1, end // (_GROWTH * _BLOCK_TOKENS)) * _BLOCK_TOKENS
            self._ends.append(end)


class _Recent:
    """The blocks that were sent to one replica last."""

    __slots__ = ("max_tokens", "num_tokens", "sizes")

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self.sizes: OrderedDict[int, int] = OrderedDict()  # by key, in tokens; the oldest first


def _set_each(found: dict[int, int], holders: int, num_tokens: int) -> None:
    """Sets the tokens of each replica that has a bit."""
    while holders:
        lowest = holders & -holders
        found[lowest.bit_length() - 1] = num_tokens
        holders ^= lowest
