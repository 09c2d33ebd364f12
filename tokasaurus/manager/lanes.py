"""Lanes: which of the running sequences decode in which batch of a pipeline.

A token that the last stage samples is the input of the sequence's next row, and the first stage
lacks it until then. So each batch serves one *lane*, a part of the sequences, and in the meantime
the batches of the other lanes keep the stages busy. With four stages and five lanes::

    batch        7     8     9     10    11    12    13    14
    lane         A     B     C     D     E     A     B     C
                 └── the tokens of 7 come back ──┘

No table says which sequence is in which lane. A lane is what decoded in the same batch, and it is
due again when as many batches have followed as there are lanes::

    last batch   7     8     9     10    11            12 takes those of 7
    sequences    ▪▪▪▪▪ ▪▪▪   ▪▪▪   ▪▪    ▪▪▪▪          17 in five lanes: at most 4 in each
                 └──┬─┘╰▶ 8                            so one of 7 goes on with those of 8

A batch takes no more than an equal part of all sequences that decode. Those that are left over come
first in the next batch, so lanes that have become uneven are even again one round later, and no
sequence waits for a token because of it. A sequence whose prompt ends in a batch decodes with those
that decoded in it. Of equals, the first to arrive stay: the samples of a request, which share a
prefix, arrive one after the other, so a cut divides one request at most.

Knows nothing of stages, prompts or pages.
"""

from __future__ import annotations

import numpy as np

from tokasaurus.manager.slots import SlotTable
from tokasaurus.protocol.arrays import BoolArray
from tokasaurus.rounding import ceil_div

__all__ = ["Lanes"]


class Lanes:
    """The turns of the running sequences.

    Args:
        num_lanes: two or more.
        slots: of the running sequences.

    Attributes:
        num_lanes: as above.
        num_decoding: sequences that may decode, in any lane, as ``due`` was told last.
    """

    def __init__(self, num_lanes: int, slots: SlotTable) -> None:
        self.num_lanes = num_lanes
        self.num_decoding = 0
        self._slots = slots
        # A step is over when each sequence that decodes had a row since this batch; where none
        # decodes, when there was a batch for each lane.
        self._step_began_at = 0
        self._num_batches = num_lanes
        self._oldest = -1  # the last batch of the sequence that has waited the longest

    def due(self, may_decode: BoolArray, number: int, *, at_once: bool) -> BoolArray:
        """[slots] the sequences that decode in a batch.

        Args:
            may_decode: [slots] those of all lanes.
            number: of the batch.
            at_once: whether to take a lane though it is not due, the one that has waited the
                longest. The batch then waits for its tokens.
        """
        rows = may_decode.nonzero()[0]
        self.num_decoding = rows.size
        if not rows.size:
            return may_decode
        last_batch = self._slots.last_batch[rows]
        self._oldest = int(last_batch.min())
        is_due = last_batch <= (self._oldest if at_once else number - self.num_lanes)
        rows, last_batch = rows[is_due], last_batch[is_due]
        most = ceil_div(self.num_decoding, self.num_lanes)
        if rows.size > most:
            rows = rows[np.lexsort((self._slots.arrival[rows], last_batch))[:most]]
        decodes: BoolArray = np.zeros_like(may_decode)
        decodes[rows] = True
        return decodes

    def begins_step(self, number: int) -> bool:
        """Whether a step begins with this batch, for which ``due`` was asked last."""
        self._num_batches += 1
        if self.num_decoding:
            is_over = self._oldest >= self._step_began_at
        else:
            is_over = self._num_batches > self.num_lanes
        if is_over:
            self._step_began_at, self._num_batches = number, 1
        return is_over
