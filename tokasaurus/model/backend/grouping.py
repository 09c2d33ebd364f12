"""Which of a batch's prefix groups the kernel uses, and the measured costs that decide it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokasaurus.model.backend.base import (
    NO_GROUPED_ROWS,
    GroupedRows,
    PrefixGroups,
    SequenceRows,
)
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = [
    "ALWAYS",
    "NEVER",
    "ChosenGroups",
    "GroupCosts",
    "GroupSize",
    "KernelBlocks",
    "choose_groups",
    "costs_of_choice",
    "fit_costs",
]


class KernelBlocks(NamedTuple):
    """How the kernel cuts the rows of a sequence or a group.

    Attributes:
        num_rows: of a block, for which keys are laid out once.
        rows_without_layout: a sequence of no more rows reads keys where they lie.
    """

    num_rows: int
    rows_without_layout: int


class GroupSize(NamedTuple):
    """What the time of a group depends on.

    Attributes:
        num_rows: of all its sequences.
        num_tokens: of the prefix.
        num_direct_rows: of sequences that would read keys where they lie.
        num_own_blocks: of rows, in the other sequences, each of which would lay keys out.
    """

    num_rows: int
    num_tokens: int
    num_direct_rows: int
    num_own_blocks: int


class GroupCosts(NamedTuple):
    """What a group saves, in seconds of one layer.

    Attributes:
        saved_per_pair: for each token of the prefix and each row that would read it where it lies:
            this costs more than multiplying by a token that is laid out.
        per_token: to lay out a token of the prefix, for each block of rows.
        per_row: to keep the state of a row, which goes on from it.
        fixed: of a group.
        blocks: of the kernel.
    """

    saved_per_pair: float
    per_token: float
    per_row: float
    fixed: float
    blocks: KernelBlocks

    def saved(self, size: GroupSize) -> float:
        """Seconds that a group of this size saves if it reads its prefix once."""
        blocks = ceil_div(size.num_rows, self.blocks.num_rows) - size.num_own_blocks
        return (
            self.saved_per_pair * size.num_direct_rows * size.num_tokens
            - self.per_token * blocks * size.num_tokens
            - self.per_row * size.num_rows
            - self.fixed
        )


ALWAYS = GroupCosts(0.0, 0.0, 0.0, -1.0, KernelBlocks(1, 1))
NEVER = GroupCosts(0.0, 0.0, 0.0, 1.0, KernelBlocks(1, 1))


def costs_of_choice(use_groups: bool | None, usual: GroupCosts) -> GroupCosts:
    """The costs by which a backend chooses groups.

    Args:
        use_groups: of ``BackendOptions``.
        usual: those that decide if the user does not.
    """
    if use_groups is None:
        return usual
    return ALWAYS if use_groups else NEVER


def fit_costs(
    sizes: Iterable[GroupSize], saved_s: NDArray[np.float64], blocks: KernelBlocks
) -> GroupCosts:
    """The costs that explain measured savings best, by least squares. None is negative.

    Args:
        sizes: [measurements].
        saved_s: [measurements], the time without the group less the time with it.
        blocks: of the kernel.
    """
    num_rows, num_tokens, direct, own_blocks = np.array(list(sizes), np.float64).T
    num_blocks = np.ceil(num_rows / blocks.num_rows) - own_blocks
    causes = np.stack(
        (direct * num_tokens, -num_blocks * num_tokens, -num_rows, -np.ones(len(num_rows))), axis=1
    )
    # Errors of a measurement grow with its size.
    weights = 1 / (num_rows * num_tokens)
    causes, saved = causes * weights[:, None], saved_s * weights
    costs = np.zeros(causes.shape[1])
    used = np.arange(len(costs))
    while len(used):
        fitted = np.linalg.lstsq(causes[:, used], saved, rcond=None)[0]
        if (fitted >= 0).all():
            costs[used] = fitted
            break
        used = np.delete(used, np.argmin(fitted * np.abs(causes[:, used]).mean(axis=0)))
    per_pair, per_token, per_row, fixed = costs.tolist()
    return GroupCosts(per_pair, per_token, per_row, fixed, blocks)


class ChosenGroups(NamedTuple):
    """The groups that the kernel uses. The rows of a group are decode rows, then rows of chunks.

    Attributes:
        first_rows: [groups], the first decode row of each; without any, its first row of a chunk.
        num_decodes: [groups], decode rows.
        first_chunk_rows: [groups], the first row of a chunk of each.
        num_rows: [groups], decode rows and rows of chunks.
        begins: [groups], the first position of each.
        ends: [groups], the position behind the last of each.
        depths: [groups], how many of these groups each one is inside of. Those of one depth have no
            row in common.
        own_starts: [sequences], the first position of each that is in no group.
    """

    first_rows: Int32Array
    num_decodes: Int32Array
    first_chunk_rows: Int32Array
    num_rows: Int32Array
    begins: Int32Array
    ends: Int32Array
    depths: Int32Array
    own_starts: Int32Array

    def grouped_rows(self, rows: SequenceRows) -> GroupedRows:
        """The rows that are in a group.

        Args:
            rows: of the batch.
        """
        if not len(self.first_rows):
            return NO_GROUPED_ROWS
        is_grouped, num_decodes = self.own_starts > 0, rows.num_decodes
        counts = np.diff(rows.query_starts)[num_decodes:]
        return GroupedRows(
            int(np.count_nonzero(is_grouped[:num_decodes])),
            int(counts[is_grouped[num_decodes:]].sum()),
        )


def choose_groups(rows: SequenceRows, page_size: int, step: int, costs: GroupCosts) -> ChosenGroups:
    """Takes each group that saves time, the outer ones first.

    A group inside one that is not taken begins where that one would have begun.

    Args:
        rows: of the batch.
        page_size: in tokens.
        step: a group ends at a multiple of this number of tokens; what it has beyond is not shared.
        costs: of groups.
    """
    own_starts, depths = np.zeros((2, len(rows.slots)), np.int32)
    groups, starts = rows.groups, rows.query_starts
    ends = (groups.first_columns + groups.num_columns) * page_size // step * step
    chosen = []
    for decode, num_decodes, chunk, num_chunks, num_rows, direct, own_blocks, end in zip(
        groups.first_decodes.tolist(),
        groups.num_decodes.tolist(),
        groups.first_chunks.tolist(),
        groups.num_chunks.tolist(),
        *_counts(groups, starts, costs.blocks),
        ends.tolist(),
        strict=True,
    ):
        first = decode if num_decodes else chunk
        begin, depth = own_starts.item(first), depths.item(first)
        size = GroupSize(num_rows, end - begin, direct, own_blocks)
        if end > begin and costs.saved(size) > 0:
            first_chunk_row = starts.item(chunk)
            first_row = decode if num_decodes else first_chunk_row
            chosen.append((first_row, num_decodes, first_chunk_row, num_rows, begin, end, depth))
            for members in (slice(decode, decode + num_decodes), slice(chunk, chunk + num_chunks)):
                own_starts[members] = end
                depths[members] = depth + 1
    first_rows, num_decoding, first_chunk_rows, num_all, begins, last, inside = (
        np.array(chosen, np.int32).reshape(-1, 7).T.copy()
    )
    return ChosenGroups(
        first_rows, num_decoding, first_chunk_rows, num_all, begins, last, inside, own_starts
    )


def _counts(
    groups: PrefixGroups, starts: Int32Array, blocks: KernelBlocks
) -> tuple[list[int], list[int], list[int]]:
    """For each group: rows, rows that would read keys where they lie, and blocks that would not."""
    if not len(groups):
        return [], [], []
    counts = np.diff(starts)
    is_direct = counts <= blocks.rows_without_layout
    kinds = np.zeros((3, len(starts)), np.int32)  # in the sequences before each
    kinds[0] = starts
    np.cumsum(np.where(is_direct, counts, 0), out=kinds[1, 1:])
    np.cumsum(np.where(is_direct, 0, ceil_div(counts, blocks.num_rows)), out=kinds[2, 1:])
    rows, direct, own_blocks = (
        kinds[:, groups.first_decodes + groups.num_decodes]
        - kinds[:, groups.first_decodes]
        + kinds[:, groups.first_chunks + groups.num_chunks]
        - kinds[:, groups.first_chunks]
    ).tolist()
    return rows, direct, own_blocks
