"""Finds out whether what a kernel computes for a row depends on the other rows.

A probe runs a kernel on the same 64 rows in batches of many sizes. From batch to batch a row has
another place and other neighbours, and its result must have the same bits::

    64 rows    0 1 2 3 4 ... 63         the expected results
    5 rows     9 10 11 12 13            row 9 is the first of 5
    65 rows    40 41 ... 63 0 1 ... 40  batches of more rows repeat them

Owns the sizes and the comparison. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["NUM_ROWS", "SOME_COUNTS", "counts_of", "dependent_counts"]

NUM_ROWS = 64
"""Rows of a probe that are different."""

# Around the ends of the tiles that kernels divide rows into.
_EDGES = (65, 96, 97, 128, 129, 256, 257, 512, 513)
SOME_COUNTS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64)
"""Numbers of rows for further seeds, and for kernels of which all rows are alike."""

_FEW_COUNTS = (1, 2, 3, 16, 17)

# Multiplications of a batch of more than 64 rows, and of one row of a small product. Within these,
# a model of 135M parameters is probed in about two seconds on two cores.
_MAX_WORK = 1 << 32
_SMALL_WORK = 1 << 26


# Results of each number of rows that are compared, unless 64 rows have fewer.
_MIN_RESULT_BYTES = 1 << 16


def counts_of(row_work: int, *, is_first: bool) -> list[int]:
    """The numbers of rows that a probe of a product tries.

    Args:
        row_work: multiplications for a row.
        is_first: all numbers up to 64, and edges beyond. Otherwise some.
    """
    if not is_first:
        return list(SOME_COUNTS if row_work <= _SMALL_WORK else _FEW_COUNTS)
    edges = (count for count in _EDGES if count * row_work <= _MAX_WORK)
    return [*range(1, NUM_ROWS + 1), *edges]


def dependent_counts(
    run: Callable[[Tensor], Tensor], counts: Iterable[int], seed: int
) -> list[int]:
    """The numbers of rows at which some row gets other bits than among all 64.

    Args:
        run: computes one batch: from the ids of its rows, [rows] int64, each from 0 to 63, to
            their results, [rows, some].
        counts: to try.
        seed: of the choice of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(NUM_ROWS)
    expected = _bits(run(ids))
    found = []
    for count in counts:
        for chosen in _batches(count, expected.shape[1], generator):
            if not torch.equal(_bits(run(chosen)), expected[chosen]):
                found.append(count)
                break
    return found


def _batches(count: int, row_bytes: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The ids of batches of one size: enough results to see what changes few of them.

    Sums in another order, rounded to fp16, differ in one of a thousand results. Batches stop when
    every row has had its turn.
    """
    # Never 0: each row moves.
    first = int(torch.randint(1, NUM_ROWS, (), generator=generator))
    if count >= NUM_ROWS:
        # Among the same 64 rows, another order changes the neighbours.
        yield torch.randperm(NUM_ROWS, generator=generator)[torch.arange(count) % NUM_ROWS]
        return
    num_rows = min(NUM_ROWS, max(count, _MIN_RESULT_BYTES // row_bytes))
    for start in range(first, first + num_rows, count):
        yield (torch.arange(count) + start) % NUM_ROWS


def _bits(results: Tensor) -> Tensor:
    """[rows, bytes], in which a number that is not finite equals itself."""
    return results.contiguous().view(torch.uint8)
