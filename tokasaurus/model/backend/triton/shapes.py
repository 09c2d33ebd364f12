"""What the kernels of attention are compiled for: sizes of the model, and of tiles.

Nothing here depends on a batch. The sizes of tiles were chosen by what the compiler makes of them
for sm_90: no registers are spilled in the shapes that the tests compile, and two tiles of keys and
values fit into shared memory several times over. Where a key head has 64 query heads or more,
registers are spilled. None of them was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tokasaurus.rounding import ceil_div

__all__ = ["ALIGNMENT", "AttentionShape", "power_of_2"]

ALIGNMENT = 4
"""Of arrays of int32, in numbers: kernels are compiled for addresses that are multiples of 16
bytes."""

# Rows of tiles, where each head of a group is a row. Tensor cores multiply 16 rows or 64 at a time.
# Products in fp32 do not run on them, and take more registers.
_FEW, _MANY, _MANY_WIDE = 16, 64, 32

# Bytes of the keys of a tile.
_TILE_BYTES, _TILE_BYTES_WIDE = 16 << 10, 8 << 10

# Products have at least this many rows, columns and summands.
_LEAST = 16

# Positions of a tile, at most.
_POSITIONS = 64

# Heads that one program prepares or merges. The interpreter takes as long for many.
_HEADS_AT_ONCE, _HEADS_INTERPRETED = 8, 256


@dataclass(frozen=True)
class AttentionShape:
    """The shape of one model's attention.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key heads, and as many value heads.
        head_dim: numbers of a head.
        page_size: in tokens.
        itemsize: bytes of a number.
        is_interpreted: the kernels are.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    itemsize: int
    is_interpreted: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def blocks(self) -> tuple[int, int]:
        """Rows of a small tile, and of a large one."""
        many = _MANY if self.itemsize == 2 else _MANY_WIDE
        least = power_of_2(self.group)
        return max(_FEW, least), max(many, least)

    @cached_property
    def heads_at_once(self) -> int:
        """That a program of ``prepare_heads`` does."""
        return _HEADS_INTERPRETED if self.is_interpreted else _HEADS_AT_ONCE

    def num_preparing(self, num_rows: int) -> int:
        """Programs of ``prepare_heads``."""
        return ceil_div(num_rows * (self.num_heads + 2 * self.num_kv_heads), self.heads_at_once)

    @cached_property
    def num_merging(self) -> int:
        """Programs of ``merge_partials`` for each row."""
        return ceil_div(self.num_heads, _HEADS_AT_ONCE)

    @cached_property
    def preparing(self) -> dict[str, int]:
        """Constants of ``prepare_heads``, but for HAS_NORMS."""
        return {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "PAGE_SIZE": self.page_size,
            "HEADS_AT_ONCE": self.heads_at_once,
            "BLOCK_HALF": power_of_2(self.head_dim // 2),
            "num_warps": 1,
        }

    @cached_property
    def attending(self) -> dict[str, int]:
        """Constants of ``attend_task``, but for BLOCK_M."""
        block_d = max(power_of_2(self.head_dim), _LEAST)
        tile_bytes = _TILE_BYTES if self.itemsize == 2 else _TILE_BYTES_WIDE
        return {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": self.num_kv_heads,
            "HEAD_DIM": self.head_dim,
            "PAGE_SIZE": self.page_size,
            "BLOCK_N": min(max(tile_bytes // (block_d * self.itemsize), _LEAST), _POSITIONS),
            "BLOCK_D": block_d,
            "num_warps": 4,
            # One for the numbers of pages, and one for what lies in them.
            "num_stages": 3,
        }

    @cached_property
    def merging(self) -> dict[str, int]:
        """Constants of ``merge_partials``."""
        return {
            "NUM_HEADS": self.num_heads,
            "HEAD_DIM": self.head_dim,
            "HEADS_AT_ONCE": _HEADS_AT_ONCE,
            "BLOCK_D": power_of_2(self.head_dim),
            "num_warps": 4,
        }


def power_of_2(size: int) -> int:
    """The smallest that is not below the size."""
    return 1 << (size - 1).bit_length()
