"""How many prompt tokens a batch feeds.

Without a pipeline as many as fit, or as many as the forecast says (``greedy_prefill=F``).

In a pipeline the longest batch sets the pace: while it is at one stage, the others run out of
work. So prompts are spread. A batch feeds its part of the prompt tokens that could be fed now, as
if they were to be fed in the next few rounds of the lanes::

    could be fed    2000  1950 1900 1850 1800 ...        a prompt of 2000 tokens comes
    fed             ▪50   ▪49  ▪48  ▪47  ▪45  ...        of 5 lanes and 8 rounds: a 40th

While more than that comes, what could be fed grows, and so does the part. At a steady load the
batches get nearly equal parts, although prompts come in bursts, and their lengths differ.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.waiting import Backlog
from tokasaurus.rounding import ceil_div

__all__ = ["PromptBudget"]

# Over how many rounds of the lanes prompts are spread. Four simulated stages were busy 74 to 93% of
# the time where batches fed all that fits, 91 to 99% with one round, and 98 to 100% with eight.
_NUM_ROUNDS = 8
_LEAST = 16  # tokens; fewer make prompts take long, and batches hardly shorter
_NUM_LOOKED_AT = 16  # sequences of the queue; the others count like these


class PromptBudget:
    """The prompt tokens of each batch of one replica.

    Args:
        config: the manager's slice.
        running: sequences in slots.
        backlog: sequences that wait.
        admission: the forecast.
    """

    def __init__(
        self,
        config: ManagerConfig,
        running: RunningSequences,
        backlog: Backlog,
        admission: AdmissionControl,
    ) -> None:
        self._max_tokens = config.max_tokens_per_forward
        self._max_running = config.max_running
        self._num_lanes = config.num_lanes
        self._running = running
        self._backlog = backlog
        self._admission = admission

    def tokens(self, num_decoding: int, *, keeps_pace: bool) -> int:
        """The most prompt tokens that a batch may feed.

        Args:
            num_decoding: its decode rows.
            keeps_pace: sequences decode, in this batch or in those of other lanes.
        """
        tokens = self._max_tokens - num_decoding
        pace = self._admission.prefill_pace  # for each step
        if pace is not None and keeps_pace:
            tokens = min(tokens, ceil_div(pace, self._num_lanes))
        if self._num_lanes > 1:
            share = ceil_div(self._num_feedable(), _NUM_ROUNDS * self._num_lanes)
            tokens = min(tokens, max(share, _LEAST))
        return tokens

    def _num_feedable(self) -> int:
        """Prompt tokens that could be fed now if batches were large enough: an estimate."""
        return self._running.num_unfed_tokens() + self._num_admissible_tokens()

    def _num_admissible_tokens(self) -> int:
        """Prompt tokens of the queue, as far as there are pages and seats for them."""
        head = self._backlog.head()
        if head is None or not self._admission.may_ask(head):
            return 0
        slots, pages = self._running.slots, self._running.pages
        num_active = int(np.count_nonzero(slots.length < slots.final_length))
        num_seats = min(self._max_running - num_active, slots.num_free)
        front = [
            sequence.num_own_tokens for sequence in islice(self._backlog.in_order(), _NUM_LOOKED_AT)
        ]
        num_sequences = min(len(self._backlog), max(0, num_seats))
        num_tokens = sum(front) * num_sequences // len(front)
        return min(num_tokens, pages.num_available * slots.page_size)
