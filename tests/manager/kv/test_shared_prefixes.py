"""The trie of shared pages against one that is computed anew from all page lists."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.kv.shared_prefixes import SharedPrefixes

Prefix = tuple[int, ...]


def pages_of(prefix: Prefix) -> np.ndarray:
    return np.array(prefix, np.int32)


def naive_nodes(held: dict[int, Prefix]) -> dict[Prefix, set[int]]:
    """Every node, named by all pages up to its end, with its holders."""
    holders: dict[Prefix, set[int]] = defaultdict(set)
    following: dict[Prefix, set[int]] = defaultdict(set)
    for slot, pages in held.items():
        for end in range(1, len(pages) + 1):
            holders[pages[:end]].add(slot)
            following[pages[:end]].update(pages[end : end + 1])
    ends = set(held.values())
    return {
        prefix: slots
        for prefix, slots in holders.items()
        if prefix in ends or len(following[prefix]) > 1
    }


class Checked:
    """A trie and its oracle, driven together."""

    def __init__(self, num_slots: int) -> None:
        self.prefixes = SharedPrefixes(num_slots)
        self.num_slots = num_slots
        self.held: dict[int, Prefix] = {}
        self.numbers: dict[Prefix, int] = {}

    def enter(self, slots: list[int], pages: Prefix) -> None:
        version = self.prefixes.version
        self.prefixes.enter(slots, pages_of(pages))
        if pages:
            self.held.update(dict.fromkeys(slots, pages))
            assert not slots or self.prefixes.version != version
        self.check()

    def leave(self, slots: list[int]) -> None:
        version = self.prefixes.version
        self.prefixes.leave(np.array(slots, np.intp))
        left = [self.held.pop(slot) for slot in slots if slot in self.held]
        assert (self.prefixes.version != version) == bool(left)
        self.check()

    def check(self) -> None:
        prefixes = self.prefixes
        expected = naive_nodes(self.held)
        numbers: dict[Prefix, int] = {}
        for slot in range(self.num_slots):
            node, pages = prefixes.leaf[slot], self.held.get(slot, ())
            assert (node == -1) == (not pages)
            end = len(pages)
            while node != -1:
                assert prefixes.end_column[node] == end
                assert numbers.setdefault(pages[:end], int(node)) == node
                node = prefixes.parent[node]
                end = prefixes.end_column[node]
            assert end == 0
        assert numbers.keys() == expected.keys()
        assert len(set(numbers.values())) == len(numbers) < 2 * self.num_slots
        for prefix, node in numbers.items():
            assert prefixes.num_holders[node] == len(expected[prefix])
            assert self.numbers.get(prefix, node) == node, "a living node changed its number"
        self.numbers = numbers
        # The last entries are above the trie, and no other node exists.
        assert np.count_nonzero(prefixes.num_holders) == len(numbers)
        assert (prefixes.parent[-1], prefixes.end_column[-1], prefixes.num_holders[-1]) == (
            -1,
            0,
            0,
        )


def test_the_trie_is_as_in_the_picture_of_the_module():
    checked = Checked(4)
    checked.enter([0, 1], (7, 3, 9))
    checked.enter([2], (7, 3, 4, 5))
    checked.enter([3], (7, 3))
    assert checked.numbers.keys() == {(7, 3), (7, 3, 9), (7, 3, 4, 5)}
    checked.leave([3])
    assert checked.numbers.keys() == {(7, 3), (7, 3, 9), (7, 3, 4, 5)}
    checked.leave([2])
    assert checked.numbers.keys() == {(7, 3, 9)}
    checked.leave([0, 3])
    assert checked.numbers.keys() == {(7, 3, 9)}


def test_random_operations_keep_the_trie_equal_to_its_oracle():
    for num_pages in (2, 3, 12):
        for seed in range(4):
            check_random_operations(seed, num_pages)


def check_random_operations(seed: int, num_pages: int) -> None:
    random_ = random.Random(seed)
    checked = Checked(16)

    def pages() -> Prefix:
        others = list(checked.held.values())
        start: Prefix = ()
        if others and random_.random() < 0.5:
            start = random_.choice(others)
            start = start[: random_.randrange(len(start) + 1)]
        length = random_.choice([0, 0, 1, 2, 3, 5, 20])
        return start + tuple(random_.randrange(num_pages) for _ in range(length))

    for _ in range(250):
        absent = sorted(set(range(16)) - checked.held.keys())
        if absent and random_.random() < 0.6:
            count = min(len(absent), random_.choice([0, 1, 1, 1, 2, 5]))
            checked.enter(random_.sample(absent, count), pages())
        else:
            checked.leave(random_.sample(range(16), random_.choice([0, 1, 1, 2, 4, 16])))
    checked.leave(list(range(16)))
    assert not checked.numbers


def test_the_most_nodes_there_can_be():
    checked = Checked(8)
    for _ in range(2):  # again, with the numbers that became free
        # A chain in which every node but the last is cut twice.
        for slot in range(8):
            checked.enter([slot], (1,) * (slot + 1) + (2,))
        assert len(checked.numbers) == 2 * 8 - 1
        checked.leave(list(range(8)))


def test_a_slot_that_enters_twice_is_an_error():
    checked = Checked(2)
    checked.enter([1], (4, 5))
    for slots in ([1], [0, 1]):
        with pytest.raises(ProtocolError, match="twice"):
            checked.prefixes.enter(slots, pages_of((4, 5)))
        checked.check()
