"""Pages of cartridges in the allocator and the prefix cache."""

from __future__ import annotations

import numpy as np
import pytest

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.invariants import check_allocator
from tokasaurus.manager.kv.allocator import PageAllocator
from tokasaurus.manager.kv.cartridges import Cartridges


def fill(allocator: PageAllocator, ids: np.ndarray) -> None:
    """Caches the whole pages of these ids, which nothing holds afterwards."""
    num_pages = len(ids) // allocator.page_size
    found = allocator.cache.lookup(0, ids, num_pages)
    allocator.retain(found)
    own = allocator.allocate(num_pages - len(found))
    allocator.release([(0, ids, np.concatenate([found, own]))])


def behind(cartridges: Cartridges, name: str, *ids: int) -> np.ndarray:
    return np.concatenate([cartridges.ids_of(name), np.array(ids, np.int32)])


def loaded(allocator: PageAllocator, **sizes: int) -> Cartridges:
    cartridges = Cartridges(allocator)
    for name, num_tokens in sizes.items():
        cartridges.begin(name, (name,), num_tokens)
        cartridges.finish(name, 0)
    return cartridges


def pins(cartridges: Cartridges) -> list[np.ndarray]:
    return [cartridge.pages for cartridge in cartridges.all()]


def test_a_removed_cartridge_leaves_the_order_of_eviction_as_it_was() -> None:
    allocator = PageAllocator(12, 1)
    cartridges = loaded(allocator, a=2, b=1)
    text = [np.array(ids, np.int32) for ids in ((1, 2), (3, 4))]
    fill(allocator, text[0])
    fill(allocator, behind(cartridges, "a", 5, 6))
    fill(allocator, behind(cartridges, "a", 5, 7))  # a second leaf
    fill(allocator, behind(cartridges, "b", 5))
    fill(allocator, text[1])
    check_allocator(allocator, pins(cartridges))
    assert cartridges.remove("a") == (5, 5)
    check_allocator(allocator, pins(cartridges))
    assert allocator.pool.num_free == 6
    held = allocator.allocate(8)  # two of these were cached: those that were used first
    assert len(allocator.cache.lookup(0, text[0], 2)) == 0
    assert len(allocator.cache.lookup(0, behind(cartridges, "b", 5), 2)) == 2
    assert len(allocator.cache.lookup(0, text[1], 2)) == 2
    more = allocator.allocate(3)
    assert allocator.num_available == 0
    assert len(allocator.cache.lookup(0, behind(cartridges, "b", 5), 2)) == 1  # it is pinned
    check_allocator(allocator, [held, more, *pins(cartridges)])


def test_text_behind_a_cartridge_shorter_than_a_page_goes_with_it() -> None:
    allocator = PageAllocator(8, 4)
    cartridges = loaded(allocator, a=2, b=2)
    fill(allocator, behind(cartridges, "a", 5, 6, 7, 8, 9, 10))
    fill(allocator, behind(cartridges, "b", 5, 6))
    assert allocator.num_pinned == 2
    assert cartridges.remove("a") == (3, 2 + 2 * 4)
    assert len(allocator.cache.lookup(0, behind(cartridges, "b", 5, 6), 1)) == 1
    check_allocator(allocator, pins(cartridges))


def test_a_cartridge_is_found_in_the_namespace_that_replaces_another() -> None:
    allocator = PageAllocator(8, 2)
    cartridges = loaded(allocator, a=5)
    ids = behind(cartridges, "a", 6)
    fill(allocator, ids)
    assert allocator.replace_namespace(0, 3) == 1
    cartridges.publish_all(3)
    (pages,) = pins(cartridges)
    assert allocator.cache.lookup(3, ids, 3).tolist() == pages[:2].tolist()
    check_allocator(allocator, pins(cartridges))
    assert cartridges.remove("a") == (3, 5)
    assert allocator.pool.num_free == 8


def test_a_cartridge_is_not_found_before_it_is_written() -> None:
    allocator = PageAllocator(4, 2)
    cartridges = Cartridges(allocator)
    cartridge = cartridges.begin("a", ("path",), 6)
    assert cartridges.find("a") is None
    assert "a" in cartridges
    assert len(allocator.cache.lookup(0, cartridge.ids, 3)) == 0
    with pytest.raises(ProtocolError):
        cartridges.begin("b", ("path",), 3)
    assert allocator.num_pinned == 3
    cartridges.finish("a", 0)
    assert cartridges.find("a") is cartridge
