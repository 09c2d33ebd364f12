"""How much memory FlashInfer's kernels need for partial results, and for their plans.

FlashInfer cuts ranges of positions into blocks as long as no more of them wait for a multiprocessor
than a few. Each block has an output and an LSE in fp32 for each row of its tile. In a graph their
number must not change, so there it counts one tile for each row, and ranges are always cut.
"""

from __future__ import annotations

import torch

from tokasaurus.model.backend.base import ModelHeads
from tokasaurus.rounding import ceil_div

__all__ = ["graph_bytes", "graph_plan_bytes", "workspace_bytes"]

# Of a multiprocessor, up to which ranges are cut.
_BLOCKS = 2

# Rows of a tile, where each query head of a key head is a row.
_TILES = (16, 64, 128)

# FlashInfer aligns each of its arrays.
_SPARE = 1 << 20

# Of a plan: three numbers for each block and two for each row, and a mark for each block.
_BYTES_OF_BLOCK, _BYTES_OF_ROW = 13, 8
_SPARE_OF_PLAN = 4 << 10


def workspace_bytes(heads: ModelHeads, num_processors: int) -> int:
    """The most that a call needs, whatever its rows.

    Args:
        heads: of the model.
        num_processors: multiprocessors of the device.
    """
    return _partials(heads, _most_cut(heads, num_processors), _TILES[-1])


def graph_bytes(heads: ModelHeads, num_processors: int, num_rows: int) -> int:
    """What a call in a graph needs.

    Args:
        heads: of the model.
        num_processors: multiprocessors of the device.
        num_rows: of the graph; each decodes.
    """
    return _partials(heads, _graph_blocks(heads, num_processors, num_rows), _tile(heads))


def graph_plan_bytes(heads: ModelHeads, num_processors: int, num_rows: int) -> int:
    """What the plan of such a call needs, on the device and in pinned memory each."""
    blocks = _graph_blocks(heads, num_processors, num_rows)
    return blocks * _BYTES_OF_BLOCK + (num_rows + 1) * _BYTES_OF_ROW + _SPARE_OF_PLAN


def _most_cut(heads: ModelHeads, num_processors: int) -> int:
    """Blocks of a key head up to which ranges are cut."""
    return max(_BLOCKS * num_processors // heads.num_kv_heads, 1)


def _graph_blocks(heads: ModelHeads, num_processors: int, num_rows: int) -> int:
    heads_of_rows = num_rows * (heads.num_heads // heads.num_kv_heads)
    tiles = ceil_div(heads_of_rows, _tile(heads)) + num_rows - 1
    return max(_most_cut(heads, num_processors), tiles)


def _tile(heads: ModelHeads) -> int:
    """Rows of the tile of a decode."""
    group = heads.num_heads // heads.num_kv_heads
    return next(tile for tile in _TILES if group <= tile)


def _partials(heads: ModelHeads, num_blocks: int, tile: int) -> int:
    numbers = num_blocks * tile * heads.num_heads * (heads.head_dim + 1)
    return numbers * torch.float32.itemsize + _SPARE
