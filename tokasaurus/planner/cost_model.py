"""How long a batch takes on a device, by a formula.

::

    seconds = host.batch_s                            launches, planning
            + host.sequence_s * sequences             ... of what each sequence needs
            + layers(rows)                            products: weights are read once for all rows
            + exchange.batch_s                        all-reduces of tensor parallelism
            + exchange.row_s * rows
            + attention of all sequences, as if each were alone
            - what groups save that share a prefix
            + head(draws)                             the head's product: for drawn rows only
            + draw_s of each row that draws           by how it samples

A *row* is a token of the forward pass: of a sequence that decodes, or of a chunk of a prompt. A
*pair* is a row and a position that it attends to.

::

    attention = position_s * positions of the sequences that decode
              + pair_s * pairs of the chunks
              + layout_s * positions of the chunks, once for each block of rows

    a group saves, at least 0:
                (position_s - pair_s) * pairs of rows that decode, within the prefix
              + layout_s * prefix * (blocks of its chunks - blocks of the group)
              - state_s * rows - group_s

A row that decodes reads each key and value for itself. The rows of a chunk or a group read them
once for a block of rows, and then multiply. Each of these times is the larger of what memory and
what products take, so there are no further maxima. Costs of attention are those of all layers.

The same object is used wherever a device is simulated. ``estimate`` makes one by arithmetic, and
``toka-bench calibrate`` by measurements on a machine.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec
import numpy as np

from tokasaurus.planner.curve import Curve
from tokasaurus.protocol.arrays import EMPTY_INT32, Float64Array, Int32Array
from tokasaurus.protocol.messages import SAMPLING_NUMBERS, Sampling

__all__ = [
    "INSTANT",
    "NO_GROUPS",
    "AttentionCosts",
    "BatchWork",
    "CostModel",
    "DrawCosts",
    "ExchangeCosts",
    "GroupWork",
    "HostCosts",
    "Parts",
    "fixed",
]


class GroupWork(NamedTuple):
    """The groups of a batch. In columns.

    Attributes:
        num_decodes: [groups] rows that decode.
        num_tokens: [groups] of the prefix, behind those of the groups that the group is in.
        first_chunks: [groups] index into the chunks of the batch.
        num_chunks: [groups].
    """

    num_decodes: Int32Array
    num_tokens: Int32Array
    first_chunks: Int32Array
    num_chunks: Int32Array


NO_GROUPS = GroupWork(*[EMPTY_INT32] * 4)


class BatchWork(NamedTuple):
    """What a batch asks of a device.

    Attributes:
        num_decodes: sequences that decode.
        num_decode_positions: that these attend to in all, their new tokens included.
        chunk_lengths: [chunks] rows of each chunk of a prompt.
        chunk_ends: [chunks] the position behind the last row of each.
        num_draws: rows that draw a token, or give a prompt's logprobs.
        draw_s: what they take besides the head's product; see ``DrawCosts.of``.
        groups: sequences that share prefixes.
    """

    num_decodes: int = 0
    num_decode_positions: int = 0
    chunk_lengths: Int32Array = EMPTY_INT32
    chunk_ends: Int32Array = EMPTY_INT32
    num_draws: int = 0
    draw_s: float = 0.0
    groups: GroupWork = NO_GROUPS


class _Costs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Numbers that are at least 0."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, float | int) and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: expected a number of at least 0")


class HostCosts(_Costs, frozen=True, kw_only=True):
    """What is not computed on the device, or takes the same time whatever it computes.

    Attributes:
        batch_s: of every batch.
        sequence_s: of every sequence that decodes, and every chunk.
    """

    batch_s: float = 0.0
    sequence_s: float = 0.0


class ExchangeCosts(_Costs, frozen=True, kw_only=True):
    """The all-reduces of tensor parallelism, in all layers.

    Attributes:
        batch_s: of every batch: latencies.
        row_s: of every row: bytes over the rate of a link.
    """

    batch_s: float = 0.0
    row_s: float = 0.0


class AttentionCosts(_Costs, frozen=True, kw_only=True):
    """Attention in all layers; the formula above says how they are used.

    Attributes:
        position_s: a position that a row of its own attends to.
        pair_s: a row and a position, in a block of rows that was read for many.
        layout_s: to read a position for a block of rows.
        block_rows: the most rows of a block.
        state_s: to hand a row from its group to what is its own.
        group_s: of a group.
    """

    position_s: float = 0.0
    pair_s: float = 0.0
    layout_s: float = 0.0
    block_rows: int = 1 << 30
    state_s: float = 0.0
    group_s: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_rows < 1:
            raise ValueError(f"block_rows={self.block_rows}: expected a number of at least 1")

    def batch_s(self, work: BatchWork) -> float:
        """The seconds of a batch's attention, in all layers. Groups that save none are not used."""
        seconds = self.alone_s(work)
        if len(work.groups.num_tokens):
            seconds -= float(np.maximum(self.saved_s(work), 0.0).sum())
        return seconds

    def alone_s(self, work: BatchWork) -> float:
        """The seconds of a batch's attention if each sequence reads for itself."""
        seconds = self.position_s * work.num_decode_positions
        if len(work.chunk_lengths):
            seconds += self._chunks_s(work)
        return seconds

    def _chunks_s(self, work: BatchWork) -> float:
        rows, ends = work.chunk_lengths.astype(np.float64), work.chunk_ends
        blocks = np.ceil(rows / self.block_rows)
        # Each row sees one position more than the row before it, and each block that of its end.
        pairs = rows * (ends - (rows - 1) / 2)
        positions = blocks * (ends - (rows - rows / blocks) / 2)
        return float(self.pair_s * pairs.sum() + self.layout_s * positions.sum())

    def saved_s(self, work: BatchWork) -> Float64Array:
        """[groups] the seconds that each group saves if it is used, which may be negative."""
        groups = work.groups
        # In the chunks before each: rows, and blocks of rows.
        before = np.zeros((2, len(work.chunk_lengths) + 1))
        np.cumsum(work.chunk_lengths, out=before[0, 1:])
        np.cumsum(np.ceil(work.chunk_lengths / self.block_rows), out=before[1, 1:])
        last = groups.first_chunks + groups.num_chunks
        chunk_rows, chunk_blocks = before[:, last] - before[:, groups.first_chunks]
        num_rows = groups.num_decodes + chunk_rows
        blocks = np.ceil(num_rows / self.block_rows)
        saved: Float64Array = groups.num_tokens * (
            (self.position_s - self.pair_s) * groups.num_decodes
            + self.layout_s * (chunk_blocks - blocks)
        )
        saved -= self.state_s * num_rows + self.group_s
        return saved


# A temperature of any other number than 0 is no filter.
_FILTERS = SAMPLING_NUMBERS.keys() - {"temperature"}


class DrawCosts(_Costs, frozen=True, kw_only=True):
    """What a row takes that draws a token, besides the head's product.

    Attributes:
        greedy_s: temperature 0.
        sampled_s: any other temperature, without filters.
        top_k_s: the same with ``top_k``.
        top_p_s: the same with another filter, and without ``top_k``.
        adjusted_s: added if its logits are adjusted: by penalties, biases or banned words.
        logprobs_s: added if it gives logprobs.
    """

    greedy_s: float = 0.0
    sampled_s: float = 0.0
    top_k_s: float = 0.0
    top_p_s: float = 0.0
    adjusted_s: float = 0.0
    logprobs_s: float = 0.0

    def of(self, sampling: Sampling, num_logprobs: int) -> float:
        """The seconds of a row that samples so.

        Args:
            sampling: of its request.
            num_logprobs: of its request; -1 for none.
        """
        if sampling.temperature == 0:
            seconds = self.greedy_s
        elif sampling.top_k > 0:
            seconds = self.top_k_s
        elif any(getattr(sampling, name) != SAMPLING_NUMBERS[name] for name in _FILTERS):
            seconds = self.top_p_s
        else:
            seconds = self.sampled_s
        if sampling.adjustments is not None:
            seconds += self.adjusted_s
        if num_logprobs >= 0:
            seconds += self.logprobs_s
        return seconds


_NOTHING = Curve.constant(0.0)


class Parts(NamedTuple):
    """The seconds of a batch by what they are spent on; their sum is the whole."""

    host_s: float = 0.0
    layers_s: float = 0.0
    exchange_s: float = 0.0
    attention_s: float = 0.0
    head_s: float = 0.0
    draws_s: float = 0.0


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The constants of the formula above.

    Attributes:
        host: outside of the device.
        layers: rows -> seconds: the products and element-wise work of all layers.
        exchange: between ranks.
        attention: in all layers.
        head: drawn rows -> seconds: the head's product.
        draws: drawing, by kind of row.
        error: about how far predicted times are off, as a share of the time.
    """

    host: HostCosts = HostCosts()
    layers: Curve = _NOTHING
    exchange: ExchangeCosts = ExchangeCosts()
    attention: AttentionCosts = AttentionCosts()
    head: Curve = _NOTHING
    draws: DrawCosts = DrawCosts()
    error: float = 0.0

    def batch_s(self, work: BatchWork) -> float:
        """The seconds that a batch takes."""
        return sum(self.parts(work))

    def parts(self, work: BatchWork) -> Parts:
        """The seconds that a batch takes, by what they are spent on."""
        num_sequences = work.num_decodes + len(work.chunk_lengths)
        host_s = self.host.batch_s + self.host.sequence_s * num_sequences
        if not num_sequences:  # such a batch only changes slots and page tables
            return Parts(host_s)
        num_rows = work.num_decodes + int(work.chunk_lengths.sum())
        return Parts(
            host_s=host_s,
            layers_s=self.layers(num_rows),
            exchange_s=self.exchange.batch_s + self.exchange.row_s * num_rows,
            attention_s=self.attention.batch_s(work),
            head_s=self.head(work.num_draws) if work.num_draws else 0.0,
            draws_s=work.draw_s,
        )


def fixed(step_s: float) -> CostModel:
    """Every batch takes the same time."""
    return CostModel(host=HostCosts(batch_s=step_s))


INSTANT = fixed(0.0)
