"""The page allocator and its prefix cache against an oracle that keeps every page by itself."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.invariants import check_allocator
from tokasaurus.manager.kv.allocator import PageAllocator
from tokasaurus.rounding import ceil_div


def ids_of(text: str) -> np.ndarray:
    return np.array([ord(char) for char in text], np.int32)


@dataclass
class CachedPage:
    page: int
    last_used: int


class NaiveCache:
    """Every cached page under its namespace and the ids of all positions up to its end."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[tuple[int, ...], CachedPage] = {}
        self.clock = 0

    def prefixes(self, namespace: int, ids: np.ndarray) -> list[tuple[int, ...]]:
        size = self.page_size
        return [(namespace, *ids[:end].tolist()) for end in range(size, len(ids) + 1, size)]

    def lookup(self, namespace: int, ids: np.ndarray) -> list[int]:
        found = []
        whole_pages = ids[: (len(ids) - 1) // self.page_size * self.page_size]
        for prefix in self.prefixes(namespace, whole_pages):
            if prefix not in self.pages:
                break
            found.append(self.pages[prefix].page)
        return found

    def insert(self, namespace: int, ids: np.ndarray, pages: list[int]) -> list[int]:
        self.clock += 1
        shared = []
        for prefix, page in zip(self.prefixes(namespace, ids), pages, strict=True):
            entry = self.pages.setdefault(prefix, CachedPage(page, 0))
            entry.last_used = self.clock
            shared.append(entry.page)
        return shared

    def evict(self, count: int, held: set[int]) -> None:
        for _ in range(count):
            leaves = [
                prefix
                for prefix, entry in self.pages.items()
                if entry.page not in held
                and not any(
                    other[: len(prefix)] == prefix and other != prefix for other in self.pages
                )
            ]
            del self.pages[min(leaves, key=lambda prefix: self.pages[prefix].last_used)]

    def close(self, namespace: int) -> None:
        self.pages = {prefix: page for prefix, page in self.pages.items() if prefix[0] != namespace}


@dataclass(eq=False)
class Holder:
    namespace: int
    ids: np.ndarray
    pages: np.ndarray
    num_published: int = 0


class Checked:
    """An allocator and its oracle, driven together."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.allocator = PageAllocator(num_pages, page_size)
        self.naive = NaiveCache(page_size)
        self.namespaces = [0]
        self.holders: list[Holder] = []

    def held(self) -> set[int]:
        return {page for holder in self.holders for page in holder.pages.tolist()}

    def admit(self, namespace: int, ids: np.ndarray) -> bool:
        found = self.allocator.lookup(namespace, ids)
        assert found.tolist() == self.naive.lookup(namespace, ids)
        num_new = ceil_div(len(ids), self.naive.page_size) - len(found)
        if self.allocator.num_needed(found, num_new) > self.allocator.num_available:
            return False
        holder = Holder(namespace, ids, found)
        self.holders.append(holder)
        self._evict_naively(num_new)
        self.allocator.retain(found)
        holder.pages = np.concatenate([found, self.allocator.allocate(num_new)])
        holder.num_published = len(found)
        return True

    def grow(self, holder: Holder, ids: np.ndarray) -> None:
        total = np.concatenate([holder.ids, ids])
        num_new = ceil_div(len(total), self.naive.page_size) - len(holder.pages)
        if num_new <= self.allocator.num_available:
            self._evict_naively(num_new)
            new = self.allocator.allocate(num_new)
            holder.ids, holder.pages = total, np.concatenate([holder.pages, new])

    def publish(self, holder: Holder) -> None:
        count = len(holder.ids) // self.naive.page_size
        ids = holder.ids[: count * self.naive.page_size]
        expected = holder.pages[:count].tolist()
        if holder.namespace in self.namespaces:
            expected = self.naive.insert(holder.namespace, ids, expected)
        shared = self.allocator.publish(
            holder.namespace, ids, holder.pages[:count], holder.num_published
        )
        if shared is not None:
            holder.pages[:count] = shared
        assert holder.pages[:count].tolist() == expected
        holder.num_published = count

    def release(self, holder: Holder, num_known: int) -> None:
        count = num_known // self.naive.page_size
        ids = holder.ids[: count * self.naive.page_size]
        if holder.namespace in self.namespaces:
            self.naive.insert(holder.namespace, ids, holder.pages[:count].tolist())
        self.allocator.release([(holder.namespace, ids, holder.pages)])
        self.holders.remove(holder)

    def replace(self, old: int, new: int) -> None:
        """Closes a namespace and opens another."""
        cached = {page.page for prefix, page in self.naive.pages.items() if prefix[0] == old}
        self.naive.close(old)
        self.namespaces[self.namespaces.index(old)] = new
        num_freed = self.allocator.replace_namespace(old, new)
        assert num_freed == len(cached - self.held())

    def check(self) -> None:
        tables = [holder.pages for holder in self.holders]
        orphans = [each.pages for each in self.holders if each.namespace not in self.namespaces]
        check_allocator(self.allocator, tables, orphans)
        cached = sorted(entry.page for entry in self.naive.pages.values())
        assert np.flatnonzero(self.allocator.pool.cached).tolist() == cached

    def _evict_naively(self, count: int) -> None:
        self.naive.evict(max(0, count - self.allocator.pool.num_free), self.held())


def test_random_operations_keep_the_allocator_equal_to_its_oracle() -> None:
    for page_size in (1, 2, 5):
        for seed in range(4):
            check_random_operations(seed, page_size, with_namespaces=False)


def test_random_operations_in_namespaces_that_come_and_go() -> None:
    for page_size in (1, 2, 5):
        for seed in range(4):
            check_random_operations(seed, page_size, with_namespaces=True)


def check_random_operations(seed: int, page_size: int, *, with_namespaces: bool) -> None:
    chance = random.Random(f"{seed} {page_size}")
    checked = Checked(num_pages=24, page_size=page_size)
    if with_namespaces:
        checked.allocator.cache.open(1)
        checked.namespaces.append(1)

    def some_ids(most: int) -> np.ndarray:
        # Two letters, so that long common prefixes are frequent.
        length = chance.randint(1, most * page_size)
        return ids_of("".join(chance.choice("aaab") for _ in range(length)))

    num_admitted = 0
    for _ in range(250):
        action = chance.random()
        if with_namespaces and chance.random() < 0.04:
            old = chance.choice(checked.namespaces)
            checked.replace(old, max(checked.namespaces) + 1)
        elif action < 0.4 or not checked.holders:
            num_admitted += checked.admit(chance.choice(checked.namespaces), some_ids(8))
        else:
            holder = chance.choice(checked.holders)
            if action < 0.6:
                checked.grow(holder, some_ids(2))
            elif action < 0.8:
                checked.publish(holder)
            else:
                # A holder that leaves knows at least the ids of the pages it shares.
                cached = checked.allocator.pool.cached[holder.pages]
                least = int(cached.sum()) * page_size
                checked.release(holder, chance.randint(least, len(holder.ids)))
        checked.check()
    assert num_admitted > 20
    assert checked.allocator.cache.num_evicted > 20


def admitted(allocator: PageAllocator, text: str) -> np.ndarray:
    ids = ids_of(text)
    found = allocator.lookup(0, ids)
    allocator.retain(found)
    num_new = ceil_div(len(ids), allocator.page_size) - len(found)
    return np.concatenate([found, allocator.allocate(num_new)])


def test_the_last_token_of_a_prompt_is_never_found() -> None:
    allocator = PageAllocator(8, 2)
    allocator.release([(0, ids_of("abcd"), admitted(allocator, "abcd"))])
    assert len(allocator.lookup(0, ids_of("abcd"))) == 1
    assert len(allocator.lookup(0, ids_of("abcde"))) == 2
    assert len(allocator.lookup(0, ids_of("ab"))) == 0
    assert len(allocator.lookup(0, ids_of("a"))) == 0


def test_a_run_is_split_where_prompts_part() -> None:
    allocator = PageAllocator(16, 2)
    one = admitted(allocator, "abcdef")
    allocator.publish(0, ids_of("abcdef"), one, 0)
    other = admitted(allocator, "abcdxy")
    assert other[:2].tolist() == one[:2].tolist()
    allocator.publish(0, ids_of("abcdxy"), other, 2)
    assert len(list(allocator.cache.nodes())) == 3
    assert allocator.lookup(0, ids_of("abcdxy!")).tolist() == other.tolist()
    assert allocator.lookup(0, ids_of("abcdef!")).tolist() == one.tolist()
    check_allocator(allocator, [one, other])


def test_a_leaf_grows_in_place() -> None:
    allocator = PageAllocator(8, 2)
    pages = admitted(allocator, "abcdef")
    for end in (2, 4, 6):
        assert allocator.publish(0, ids_of("abcdef")[:end], pages[: end // 2], end // 2 - 1) is None
    assert len(list(allocator.cache.nodes())) == 1


def test_duplicate_pages_are_given_back() -> None:
    allocator = PageAllocator(8, 2)
    one, other = admitted(allocator, "abcd!"), admitted(allocator, "abcd?")
    assert not set(one.tolist()) & set(other.tolist())
    allocator.publish(0, ids_of("abcd"), one[:2], 0)
    num_free = allocator.pool.num_free
    shared = allocator.publish(0, ids_of("abcd"), other[:2], 0)
    assert shared is not None
    assert shared.tolist() == one[:2].tolist()
    assert allocator.pool.num_free == num_free + 2
    other[:2] = shared
    check_allocator(allocator, [one, other])


def test_the_least_recently_used_goes_first_from_its_end() -> None:
    allocator = PageAllocator(8, 1)
    for text in ("abc", "xyz"):
        allocator.release([(0, ids_of(text), admitted(allocator, text))])
    allocator.release([(0, ids_of("abc"), admitted(allocator, "abc"))])  # used again
    held = allocator.allocate(4)
    assert len(allocator.lookup(0, ids_of("xyz!"))) == 1
    assert len(allocator.lookup(0, ids_of("abc!"))) == 3
    more = allocator.allocate(2)
    assert len(allocator.lookup(0, ids_of("xyz!"))) == 0
    assert len(allocator.lookup(0, ids_of("abc!"))) == 2
    check_allocator(allocator, [held, more])


def test_held_pages_are_never_evicted() -> None:
    allocator = PageAllocator(4, 1)
    pages = admitted(allocator, "ab")
    allocator.publish(0, ids_of("ab"), pages, 0)
    allocator.allocate(2)
    assert allocator.num_available == 0
    with pytest.raises(ProtocolError):
        allocator.allocate(1)
    assert len(allocator.lookup(0, ids_of("ab!"))) == 2


def test_a_page_of_one_namespace_is_not_found_in_another() -> None:
    allocator = PageAllocator(8, 2)
    allocator.cache.open(7)
    pages = admitted(allocator, "abcd!")
    allocator.publish(0, ids_of("abcd"), pages[:2], 0)
    assert len(allocator.lookup(0, ids_of("abcd!"))) == 2
    assert len(allocator.lookup(7, ids_of("abcd!"))) == 0
    other = allocator.allocate(2)
    assert allocator.publish(7, ids_of("abcd"), other, 0) is None
    assert allocator.lookup(7, ids_of("abcd!")).tolist() == other.tolist()
    check_allocator(allocator, [pages, other])


def test_pages_that_outlive_their_namespace_are_found_nowhere() -> None:
    allocator = PageAllocator(8, 2)
    one = admitted(allocator, "abcd!")
    allocator.publish(0, ids_of("abcd"), one[:2], 0)
    other = admitted(allocator, "abcd?")
    allocator.release([(0, ids_of("xyxy"), allocator.allocate(2))])
    assert allocator.replace_namespace(0, 1) == 2  # those of xyxy have no holder
    check_allocator(allocator, [one, other], [one, other])
    assert allocator.publish(0, ids_of("abcd"), other[:2], 2) is None
    allocator.release([(0, ids_of("abcd"), one)])
    check_allocator(allocator, [other], [other])
    allocator.release([(0, ids_of("abcd"), other)])
    assert allocator.pool.num_free == 8
    assert len(allocator.lookup(1, ids_of("abcd!"))) == 0
    check_allocator(allocator, [])


def test_a_closed_namespace_leaves_the_order_of_eviction_as_it_was() -> None:
    allocator = PageAllocator(6, 1)
    allocator.cache.open(7)
    for namespace, text in ((0, "ab"), (7, "xy"), (0, "cd")):
        allocator.release([(namespace, ids_of(text), allocator.allocate(2))])
    allocator.cache.close(7)
    held = allocator.allocate(3)  # two that were freed, and one of the least recently used
    assert len(allocator.lookup(0, ids_of("ab!"))) == 1
    assert len(allocator.lookup(0, ids_of("cd!"))) == 2
    check_allocator(allocator, [held])
