"""Groups of rows against those that the page tables alone imply."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np

from tokasaurus.manager.kv.prefix_groups import MIN_NESTED_LEN, GroupFinder, Groups
from tokasaurus.manager.kv.shared_prefixes import SharedPrefixes
from tokasaurus.rounding import ceil_div

Table = dict[int, list[int]]  # the shareable pages of each slot
Group = tuple[frozenset[int], int, int]  # slots, first column, column after the last


@dataclass(frozen=True)
class Limits:
    min_rows: int
    min_end: int  # columns
    min_columns: int


def make(table: Table, num_slots: int, page_size=16, min_group_size=2, min_prefix_len=16):
    prefixes = SharedPrefixes(num_slots)
    for slot, pages in table.items():
        prefixes.enter([slot], np.array(pages, np.int32))
    return prefixes, GroupFinder(prefixes, page_size, min_group_size, min_prefix_len)


def naive_groups(
    table: Table, rows: set[int], limits: Limits, start: int = 0, parted: int = 0
) -> set[Group]:
    """The groups among rows that have nothing in common from column ``parted`` on.

    Their columns from ``start`` on are in no group yet.
    """
    found: set[Group] = set()
    for page in {table[slot][parted] for slot in rows if len(table[slot]) > parted}:
        part = {slot for slot in rows if table[slot][parted : parted + 1] == [page]}
        columns = zip(*(table[slot] for slot in part), strict=False)
        end = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
        is_group = (
            len(part) >= limits.min_rows
            and end >= limits.min_end
            and end - start >= limits.min_columns
        )
        if is_group:
            found.add((frozenset(part), start, end))
        found |= naive_groups(table, part, limits, end if is_group else start, end)
    return found


def check(
    groups: Groups, table: Table, slots: list[int], limits: Limits, chunk_slots: list[int] = ()
) -> None:
    """Checks the groups of slots that decode, and of slots that feed chunks."""
    decodes, chunks = groups.slots.tolist(), list(chunk_slots)
    first_chunks = num_chunks = np.zeros_like(groups.first_decodes)
    if groups.chunks is not None:
        order, first_chunks, num_chunks = groups.chunks
        chunks = [chunks[index] for index in order.tolist()]
        assert num_chunks.any()
    assert sorted(decodes) == sorted(slots)
    assert sorted(chunks) == sorted(chunk_slots)
    columns = (
        groups.first_decodes,
        groups.num_decodes,
        first_chunks,
        num_chunks,
        groups.first_columns,
        groups.num_columns,
    )
    assert all(column.dtype == np.int32 for column in columns)
    found = [
        (
            frozenset(decodes[decode : decode + num_decodes] + chunks[chunk : chunk + num_chunks]),
            column,
            column + num_columns,
        )
        for decode, num_decodes, chunk, num_chunks, column, num_columns in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]
    assert len(set(found)) == len(found)
    assert set(found) == naive_groups(table, {*slots, *chunk_slots}, limits)
    for index, (members, column, _) in enumerate(found):
        around = [other for other in found[:index] if members <= other[0]]
        assert column == max((end for _, _, end in around), default=0)  # goes on where that ends
        assert not any(members > later for later, _, _ in found[:index])  # outer ones come first
    is_grouped = {slot for members, _, _ in found for slot in members}
    for ordered, given in ((decodes, slots), (chunks, chunk_slots)):
        in_none = [slot for slot in given if slot not in is_grouped]
        assert ordered[: len(in_none)] == in_none


def test_groups_are_as_in_the_picture_of_the_module():
    table = {
        4: [50, 51, 52],
        **{slot: [1, 2, 3] for slot in (1, 6, 2)},
        **{slot: [1, 2, 7, 8] for slot in (0, 3, 5)},
    }
    _, finder = make(table, 8, page_size=64)
    groups = finder.find(np.arange(7))
    check(groups, table, list(range(7)), Limits(2, 1, 1))
    assert groups.first_decodes.tolist() == [1, 1, 4]
    assert groups.num_decodes.tolist() == [6, 3, 3]
    assert groups.first_columns.tolist() == [0, 2, 2]
    assert sorted(groups.num_columns.tolist()) == [1, 2, 2]


def test_groups_of_random_prefixes_are_those_of_the_page_tables():
    for page_size in (1, 16, 64):
        for seed in range(6):
            check_random_prefixes(seed, page_size)


def check_random_prefixes(seed: int, page_size: int) -> None:
    random_ = random.Random(seed)
    num_slots = 60
    for _ in range(25):
        min_group_size = random_.choice([1, 2, 3, 8])
        min_prefix_len = page_size * random_.choice([0, 1, 2, 5, 70])
        # A tree of prefixes; slots hold some, with a tail of their own or without.
        pages = itertools.count(1)
        trunk: list[list[int]] = [[]]
        for _ in range(random_.choice([1, 5, 15])):
            length = random_.choice([1, 2, 3, 4, 5, 80])
            trunk.append(random_.choice(trunk) + [next(pages) for _ in range(length)])
        table = {
            slot: random_.choice(trunk) + [next(pages) for _ in range(random_.choice([0, 0, 1, 4]))]
            for slot in random_.sample(range(num_slots), random_.choice([3, 30, 60]))
        }
        _, finder = make(table, num_slots, page_size, min_group_size, min_prefix_len)
        min_end = max(1, min_prefix_len // page_size)
        limits = Limits(min_group_size, min_end, min(min_end, ceil_div(MIN_NESTED_LEN, page_size)))
        full = {slot: table.get(slot, []) for slot in range(num_slots)}
        for share, chunk_share in ((1.0, 0.0), (0.7, 0.2), (0.2, 0.5), (0.0, 0.6)):
            drawn = [(slot, random_.random()) for slot in random_.sample(range(num_slots), 60)]
            slots = sorted(slot for slot, number in drawn if number < share)
            chunks = [slot for slot, number in drawn if share <= number < share + chunk_share]
            found = finder.find(np.array(slots, np.intp), np.array(chunks, np.intp))
            check(found, full, slots, limits, chunks)


def test_too_few_rows_and_too_short_prefixes():
    table = {slot: [1, 2, 3, 4] for slot in range(3)}

    def num_groups(**limits):
        _, finder = make(table, 4, **limits)
        return len(finder.find(np.arange(4)).first_decodes)

    assert num_groups(min_group_size=3, min_prefix_len=64) == 1
    assert num_groups(min_group_size=4, min_prefix_len=64) == 0
    assert num_groups(min_group_size=3, min_prefix_len=80) == 0
    assert num_groups(min_group_size=3, min_prefix_len=65) == 0  # 5 pages


def test_a_run_too_short_for_a_group_goes_to_the_groups_inside_it():
    header = list(range(3))  # 48 tokens: too short to be a group
    table = {slot: [*header, 10 + slot // 2, 20 + slot // 2] for slot in range(4)}
    _, finder = make(table, 4, min_prefix_len=80)
    groups = finder.find(np.arange(4))
    assert groups.num_decodes.tolist() == [2, 2]
    assert groups.first_columns.tolist() == [0, 0]
    assert groups.num_columns.tolist() == [5, 5]


def test_a_nested_group_is_short_but_not_too_short():
    header = list(range(20))  # 320 tokens
    for num_own, expected in ((4, [20, 4, 4]), (3, [20])):
        table = {slot: header + [100 + slot // 2] * num_own for slot in range(4)}
        _, finder = make(table, 4, min_prefix_len=256)
        assert finder.find(np.arange(4)).num_columns.tolist() == expected


def test_slots_outside_the_batch_do_not_split_groups():
    table = {0: [1, 2, 3, 4, 5], 1: [1, 2, 3, 4, 5], 2: [1, 2]}
    _, finder = make(table, 3)
    assert finder.find(np.array([0, 1])).num_columns.tolist() == [5]


def test_groups_are_computed_again_when_rows_or_prefixes_changed():
    table = {slot: [1, 2] for slot in range(4)}
    prefixes, finder = make(table, 8)
    of_all = finder.find(np.arange(4))
    assert of_all.num_decodes.tolist() == [4]
    assert finder.find(np.arange(4)) is of_all
    assert finder.find(np.array([0, 2, 3])).num_decodes.tolist() == [3]
    assert finder.find(np.array([0, 1, 3])).num_decodes.tolist() == [3]
    prefixes.leave(np.array([3]))
    assert finder.find(np.array([0, 1, 3])).num_decodes.tolist() == [2]
    prefixes.enter([3, 4], np.array([1, 2], np.int32))
    assert finder.find(np.array([0, 1, 3])).num_decodes.tolist() == [3]
    prefixes.leave(np.arange(8))
    groups = finder.find(np.array([0, 1, 3]))
    assert (groups.slots.tolist(), len(groups.first_decodes)) == ([0, 1, 3], 0)


def test_the_groups_of_each_lane_are_remembered():
    prefixes, _ = make({slot: [1, 2] for slot in range(9)}, 16)
    finder = GroupFinder(prefixes, 16, 2, 16, num_lanes=3)
    lanes = [np.array([0, 3, 6]), np.array([1, 4]), np.array([2, 5, 7, 8])]
    first = [finder.find(lane) for lane in lanes]
    for _ in range(3):
        assert [finder.find(lane.copy()) for lane in lanes] == first  # the same objects
    # A lane that has lost a row takes its own place, and no other one's.
    lanes[0] = np.array([0, 3])
    first[0] = finder.find(lanes[0])
    assert first[0].num_decodes.tolist() == [2]
    assert [finder.find(lane.copy()) for lane in (*lanes[1:], lanes[0])] == [*first[1:], first[0]]
    prefixes.leave(np.array([4]))
    assert finder.find(np.array([1, 4])).num_decodes.tolist() == []


def test_chunks_and_decodes_that_share_pages_are_one_group():
    table = {slot: [1, 2, 10 + slot // 2] for slot in range(6)}
    _, finder = make(table, 8, page_size=64)
    groups = finder.find(np.array([6, 0, 1, 2]), np.array([3, 7, 4]))
    limits, full = Limits(2, 1, 1), {6: [], 7: [], **table}
    check(groups, full, [6, 0, 1, 2], limits, [3, 7, 4])
    assert groups.num_decodes[0] == 3
    assert groups.chunks.counts[0] == 2
    assert groups.chunks.order[0] == 1  # slot 7 shares nothing


def test_chunks_that_share_nothing_keep_their_order():
    _, finder = make({slot: [1] for slot in range(3)}, 8)
    groups = finder.find(np.arange(3), np.array([5, 3]))
    assert (groups.num_decodes.tolist(), groups.chunks) == ([3], None)


def test_groups_are_computed_again_when_chunks_changed():
    _, finder = make({slot: [1, 2] for slot in range(6)}, 8)
    first = finder.find(np.arange(3), np.array([4]))
    assert finder.find(np.arange(3), np.array([4])) is first
    assert finder.find(np.arange(3), np.array([4, 5])).chunks.counts.tolist() == [2]
    assert finder.find(np.arange(3)).chunks is None


def test_a_batch_without_rows_has_no_groups():
    _, finder = make({0: [1], 1: [1]}, 4)
    groups = finder.find(np.empty(0, np.intp))
    assert len(groups.slots) == len(groups.first_decodes) == 0
