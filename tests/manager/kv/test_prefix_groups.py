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


def check(groups: Groups, table: Table, slots: list[int], limits: Limits) -> None:
    ordered = groups.slots.tolist()
    assert sorted(ordered) == sorted(slots)
    columns = (groups.first_rows, groups.num_rows, groups.first_columns, groups.num_columns)
    assert all(column.dtype == np.int32 for column in columns)
    ranges = list(zip(*(column.tolist() for column in columns), strict=True))
    found = [
        (frozenset(ordered[row : row + num_rows]), column, column + num_columns)
        for row, num_rows, column, num_columns in ranges
    ]
    assert len(set(found)) == len(found)
    assert set(found) == naive_groups(table, set(slots), limits)
    for (row, num_rows, _, _), (next_row, next_num_rows, _, _) in itertools.pairwise(ranges):
        assert row <= next_row  # outer groups before inner ones
        assert next_row + next_num_rows <= row + num_rows or next_row >= row + num_rows
    for row, slot in enumerate(ordered):
        end = 0
        for first_row, num_rows, column, num_columns in ranges:
            if first_row <= row < first_row + num_rows:
                assert column == end  # goes on where the one around it ends
                end += num_columns
        assert end <= len(table.get(slot, ()))
    in_none = [slot for slot in slots if not any(slot in members for members, _, _ in found)]
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
    assert groups.first_rows.tolist() == [1, 1, 4]
    assert groups.num_rows.tolist() == [6, 3, 3]
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
        for share in (1.0, 0.7, 0.2):
            slots = [slot for slot in range(num_slots) if random_.random() < share]
            check(finder.find(np.array(slots, np.intp)), full, slots, limits)


def test_too_few_rows_and_too_short_prefixes():
    table = {slot: [1, 2, 3, 4] for slot in range(3)}

    def num_groups(**limits):
        _, finder = make(table, 4, **limits)
        return len(finder.find(np.arange(4)).first_rows)

    assert num_groups(min_group_size=3, min_prefix_len=64) == 1
    assert num_groups(min_group_size=4, min_prefix_len=64) == 0
    assert num_groups(min_group_size=3, min_prefix_len=80) == 0
    assert num_groups(min_group_size=3, min_prefix_len=65) == 0  # 5 pages


def test_a_run_too_short_for_a_group_goes_to_the_groups_inside_it():
    header = list(range(3))  # 48 tokens: too short to be a group
    table = {slot: [*header, 10 + slot // 2, 20 + slot // 2] for slot in range(4)}
    _, finder = make(table, 4, min_prefix_len=80)
    groups = finder.find(np.arange(4))
    assert groups.num_rows.tolist() == [2, 2]
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
    assert of_all.num_rows.tolist() == [4]
    assert finder.find(np.arange(4)) is of_all
    assert finder.find(np.array([0, 2, 3])).num_rows.tolist() == [3]
    assert finder.find(np.array([0, 1, 3])).num_rows.tolist() == [3]
    prefixes.leave(np.array([3]))
    assert finder.find(np.array([0, 1, 3])).num_rows.tolist() == [2]
    prefixes.enter([3, 4], np.array([1, 2], np.int32))
    assert finder.find(np.array([0, 1, 3])).num_rows.tolist() == [3]
    prefixes.leave(np.arange(8))
    groups = finder.find(np.array([0, 1, 3]))
    assert (groups.slots.tolist(), len(groups.first_rows)) == ([0, 1, 3], 0)


def test_a_batch_without_rows_has_no_groups():
    _, finder = make({0: [1], 1: [1]}, 4)
    groups = finder.find(np.empty(0, np.intp))
    assert len(groups.slots) == len(groups.first_rows) == 0
