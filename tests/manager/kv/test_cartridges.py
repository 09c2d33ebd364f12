"""Pages of cartridges in the allocator and the prefix cache."""

from __future__ import annotations

import numpy as np
import pytest

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.invariants import check_allocator
from tokasaurus.manager.kv.allocator import PageAllocator
from tokasaurus.manager.kv.cartridges import Cartridge, Cartridges


def ids_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def fill(allocator: PageAllocator, ids: np.ndarray) -> None:
    """Caches the whole pages of these ids, which nothing holds afterwards."""
    num_pages = len(ids) // allocator.page_size
    found = allocator.cache.lookup(0, ids, num_pages)
    allocator.retain(found)
    own = allocator.allocate(num_pages - len(found))
    allocator.release([(0, ids, np.concatenate([found, own]))])


class Shelf:
    """An allocator with cartridges."""

    def __init__(self, num_pages: int, page_size: int, **sizes: int) -> None:
        self.pages = PageAllocator(num_pages, page_size)
        self.cartridges = Cartridges(self.pages)
        for name, num_tokens in sizes.items():
            self.use(self.add(name, num_tokens))

    def add(self, name: str, num_tokens: int) -> Cartridge:
        return self.cartridges.register(name, (name,), num_tokens, 0.0)

    def use(self, cartridge: Cartridge) -> None:
        """Something needs it for a moment; it is written if it is not there."""
        self.cartridges.hold(cartridge)
        for each in self.cartridges.take_unwritten():
            each.written_by(0)
            self.cartridges.finish(each, 0)
        self.cartridges.release(cartridge)

    def named(self, name: str) -> Cartridge:
        cartridge = self.cartridges.find(name)
        assert cartridge is not None
        return cartridge

    def behind(self, name: str, *ids: int) -> np.ndarray:
        return np.concatenate([self.named(name).ids, ids_of(*ids)])

    def num_found(self, ids: np.ndarray) -> int:
        return len(self.pages.cache.lookup(0, ids, len(ids) // self.pages.page_size))

    def check(self, *held: np.ndarray) -> None:
        check_allocator(self.pages, [*held, *(each.pages for each in self.cartridges.all())])


def test_a_removed_cartridge_leaves_the_order_of_eviction_as_it_was() -> None:
    shelf = Shelf(12, 1, a=2, b=1)
    shelf.cartridges.hold(shelf.named("b"))
    text = [ids_of(1, 2), ids_of(3, 4)]
    fill(shelf.pages, text[0])
    fill(shelf.pages, shelf.behind("a", 5, 6))
    fill(shelf.pages, shelf.behind("a", 5, 7))  # a second leaf
    fill(shelf.pages, shelf.behind("b", 5))
    fill(shelf.pages, text[1])
    shelf.check()
    assert shelf.cartridges.remove(shelf.named("a")) == (5, 5)
    shelf.check()
    assert shelf.pages.pool.num_free == 6
    held = shelf.pages.allocate(8)  # two of these were cached: those that were used first
    assert shelf.num_found(text[0]) == 0
    assert shelf.num_found(shelf.behind("b", 5)) == 2
    assert shelf.num_found(text[1]) == 2
    more = shelf.pages.allocate(3)
    assert shelf.pages.num_available == 0
    assert shelf.num_found(shelf.behind("b", 5)) == 1  # it is in use
    shelf.check(held, more)


def test_idle_cartridges_and_text_are_evicted_in_the_order_of_their_last_use() -> None:
    shelf = Shelf(16, 2)
    fill(shelf.pages, ids_of(1, 2, 3, 4))  # 2 pages
    shelf.use(shelf.add("a", 5))  # 3 pages
    fill(shelf.pages, ids_of(5, 6, 7, 8))  # 2 pages
    shelf.use(shelf.add("b", 2))  # 1 page
    fill(shelf.pages, shelf.behind("a", 9, 10, 11))  # 2 pages behind it
    shelf.use(shelf.named("a"))
    assert (shelf.pages.pool.num_free, shelf.pages.num_idle) == (6, 4)
    assert shelf.pages.num_available == 16
    held = [shelf.pages.allocate(7)]
    steps = []
    for _ in range(5):
        found = shelf.num_found
        there = [shelf.named(name).is_there for name in "ab"]
        steps.append((found(ids_of(1, 2, 3, 4)), found(ids_of(5, 6, 7, 8)), *there))
        held.append(shelf.pages.allocate(1))
        shelf.check(*held)
    assert steps == [
        (1, 2, True, True),  # the last page first
        (0, 2, True, True),
        (0, 1, True, True),
        (0, 0, True, True),
        (0, 0, True, False),  # a cartridge of one page
    ]
    assert shelf.num_found(shelf.behind("a", 9, 10, 11)) == 3  # the text behind goes before it
    held.append(shelf.pages.allocate(2))
    assert not shelf.named("a").is_there  # as a whole: one page was wanted
    assert len(shelf.named("a").pages) == 0
    assert shelf.pages.pool.num_free == 2
    assert shelf.named("a").tally.num_evictions == 1
    shelf.check(*held)


def test_a_cartridge_in_use_is_never_evicted_and_idle_ones_count_as_available() -> None:
    shelf = Shelf(6, 2, a=4, b=3)
    assert (shelf.pages.num_available, shelf.pages.num_held) == (6, 0)
    shelf.cartridges.hold(shelf.named("a"), 2)
    shelf.cartridges.release(shelf.named("a"))
    assert (shelf.pages.num_pinned, shelf.pages.num_idle) == (2, 2)
    with pytest.raises(ProtocolError):
        shelf.pages.allocate(5)
    shelf.check()
    held = shelf.pages.allocate(4)
    assert shelf.pages.num_held == 4
    assert [shelf.named(name).is_there for name in "ab"] == [True, False]
    shelf.check(held)
    shelf.pages.release([(0, ids_of(), held)])
    shelf.use(shelf.named("b"))
    assert shelf.named("b").tally.num_loads == 2


def test_text_behind_a_cartridge_shorter_than_a_page_goes_with_it() -> None:
    shelf = Shelf(8, 4, a=2, b=2)
    fill(shelf.pages, shelf.behind("a", 5, 6, 7, 8, 9, 10))
    fill(shelf.pages, shelf.behind("b", 5, 6))
    assert shelf.pages.num_idle == 2
    assert shelf.cartridges.remove(shelf.named("a")) == (3, 2 + 2 * 4)
    assert shelf.num_found(shelf.behind("b", 5, 6)) == 1
    shelf.check()
    num_free = shelf.pages.pool.num_free
    assert shelf.cartridges.lose(shelf.named("b")) == 2
    assert shelf.pages.pool.num_free == num_free + 2 == 8


def test_a_cartridge_is_found_in_the_namespace_that_replaces_another() -> None:
    shelf = Shelf(8, 2, a=5)
    ids = shelf.behind("a", 6)
    fill(shelf.pages, ids)
    assert shelf.pages.replace_namespace(0, 3) == 1
    shelf.cartridges.publish_all(3)
    pages = shelf.named("a").pages
    assert shelf.pages.cache.lookup(3, ids, 3).tolist() == pages[:2].tolist()
    shelf.check()
    assert shelf.cartridges.remove(shelf.named("a")) == (3, 5)
    assert shelf.pages.pool.num_free == 8


def test_a_cartridge_is_not_found_before_it_is_written() -> None:
    shelf = Shelf(4, 2)
    cartridge = shelf.add("a", 6)
    assert shelf.pages.num_available == 4
    shelf.cartridges.hold(cartridge)
    assert shelf.cartridges.take_unwritten() == [cartridge]
    cartridge.written_by(7)
    shelf.cartridges.hold(cartridge)
    assert shelf.cartridges.take_unwritten() == []  # it is on its way
    assert shelf.num_found(cartridge.ids) == 0
    with pytest.raises(ProtocolError):
        shelf.cartridges.hold(shelf.add("b", 3))
    assert shelf.pages.num_pinned == 3
    assert cartridge.is_answered_by(7)
    shelf.cartridges.finish(cartridge, 0)
    assert shelf.num_found(cartridge.ids) == 3


def test_a_cartridge_that_lost_its_pages_takes_no_notice_of_the_control_that_wrote_them() -> None:
    shelf = Shelf(4, 2)
    cartridge = shelf.add("a", 6)
    shelf.cartridges.hold(cartridge)
    shelf.cartridges.take_unwritten()
    cartridge.written_by(7)
    shelf.cartridges.release(cartridge)
    held = shelf.pages.allocate(2)
    assert not cartridge.is_answered_by(7)
    assert cartridge.tally.num_evictions == 0  # it never was there
    shelf.pages.release([(0, ids_of(), held)])
    shelf.cartridges.hold(cartridge)
    assert shelf.cartridges.take_unwritten() == [cartridge]
    assert not cartridge.is_answered_by(7)
    cartridge.written_by(9)
    assert not cartridge.is_answered_by(7)
    assert cartridge.is_answered_by(9)


def test_a_cartridge_that_nothing_waits_for_any_more_is_not_written() -> None:
    shelf = Shelf(4, 2)
    cartridge = shelf.add("a", 6)
    shelf.cartridges.hold(cartridge)
    shelf.cartridges.release(cartridge)
    assert shelf.cartridges.take_unwritten() == []
    shelf.cartridges.hold(cartridge)
    assert shelf.cartridges.take_unwritten() == [cartridge]
