"""Which of a batch's prefix groups the kernel uses, and the measured costs that decide it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokasaurus.model.backend.base import PrefixGroups
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["ALWAYS", "NEVER", "ChosenGroups", "GroupCosts", "choose_groups", "fit_costs"]


class GroupCosts(NamedTuple):
    """What a group saves, in seconds of one layer.

    Attributes:
        saved_per_pair: for each row and token of the prefix: reading the token for the row alone
            costs more than multiplying by a token that is laid out.
        per_token: to lay out a token of the prefix, for each block of rows.
        per_row: to merge the results of a row.
        fixed: of a group.
        rows_per_block: that share what is laid out.
    """

    saved_per_pair: float
    per_token: float
    per_row: float
    fixed: float
    rows_per_block: int

    def saved(self, num_rows: int, num_tokens: int) -> float:
        """Seconds that a group of these rows saves if it reads a prefix of these tokens once."""
        blocks = ceil_div(num_rows, self.rows_per_block)
        return (
            self.saved_per_pair * num_rows * num_tokens
            - self.per_token * blocks * num_tokens
            - self.per_row * num_rows
            - self.fixed
        )


ALWAYS = GroupCosts(1.0, 0.0, 0.0, 0.0, 1)
NEVER = GroupCosts(0.0, 0.0, 0.0, 1.0, 1)


def fit_costs(
    num_rows: Int32Array,
    num_tokens: Int32Array,
    saved_s: NDArray[np.float64],
    rows_per_block: int,
) -> GroupCosts:
    """The costs that explain measured savings best, by least squares.

    Args:
        num_rows: [measurements], of a group.
        num_tokens: [measurements], of its prefix.
        saved_s: [measurements], the time without the group less the time with it.
        rows_per_block: as in ``GroupCosts``.
    """
    blocks = ceil_div(num_rows, rows_per_block)
    causes = np.stack(
        (num_rows * num_tokens, -blocks * num_tokens, -num_rows, -np.ones(len(num_rows))), axis=1
    ).astype(np.float64)
    # Errors of a measurement grow with its size.
    weights = 1 / (num_rows * num_tokens)
    costs = np.linalg.lstsq(causes * weights[:, None], saved_s * weights, rcond=None)[0]
    per_pair, per_token, per_row, fixed = costs.tolist()
    return GroupCosts(per_pair, per_token, per_row, fixed, rows_per_block)


class ChosenGroups(NamedTuple):
    """The groups that the kernel uses.

    Attributes:
        first_rows: [groups].
        num_rows: [groups].
        begins: [groups], the first position of each.
        ends: [groups], the position behind the last of each.
        own_starts: [decode rows], the first position of each row that is in no group.
    """

    first_rows: Int32Array
    num_rows: Int32Array
    begins: Int32Array
    ends: Int32Array
    own_starts: Int32Array

    @property
    def num_grouped(self) -> int:
        """Rows that are in a group."""
        return int(np.count_nonzero(self.own_starts))


def choose_groups(
    groups: PrefixGroups,
    page_size: int,
    num_decodes: int,
    saved: Callable[[int, int], float],
) -> ChosenGroups:
    """Takes each group that saves time, the outer ones first.

    A group inside one that is not taken begins where that one would have begun.

    Args:
        groups: of the batch.
        page_size: in tokens.
        num_decodes: decode rows of the batch.
        saved: by a group, from its rows and tokens.
    """
    own_starts = np.zeros(num_decodes, np.int32)
    chosen = []
    ends = (groups.first_columns + groups.num_columns) * page_size
    for first, count, end in zip(
        groups.first_rows.tolist(), groups.num_rows.tolist(), ends.tolist(), strict=True
    ):
        begin = own_starts.item(first)
        if saved(count, end - begin) > 0:
            chosen.append((first, count, begin, end))
            own_starts[first : first + count] = end
    first_rows, num_rows, begins, ends = np.array(chosen, np.int32).reshape(-1, 4).T.copy()
    return ChosenGroups(first_rows, num_rows, begins, ends, own_starts)
