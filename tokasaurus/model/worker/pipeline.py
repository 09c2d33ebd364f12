"""What travels between the stages of a pipeline: hidden states onward, drawn tokens back.

::

    first stage   │ batch 0 │ batch 1 │ batch 2 │ batch 3: waits for the tokens that it needs
                        └ hidden states  ▼             ▲ tokens of batch 0
    last stage              │ batch 0 │ batch 1 │ batch 2 │

The first stage receives tokens as late as possible: when a batch decodes a slot whose token it
lacks. So it is the manager that decides how many batches run at once. Where it plans no batch that
needs tokens which are not there yet, no stage ever waits.

With tensor parallelism and one stage, the other ranks get the tokens of the one that samples in the
same way.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tokasaurus.model.parallel.ranks import Ranks, naming_loss
from tokasaurus.model.sampling.rows import SamplingRows
from tokasaurus.protocol.arrays import Int32Array

__all__ = ["Pipeline"]

# Batches whose tokens were not received, at most. Where prompts come and nothing decodes, no batch
# asks for tokens.
_MAX_OWED = 64

# Batches whose hidden states the next stage has not received, at most. A stage that is further
# ahead waits: the next one has enough to do.
_MAX_AHEAD = 4


class Pipeline:
    """One rank's part of the traffic.

    Args:
        ranks: of the replica.
        num_slots: of the worker.
        hidden_size: of the model.
        dtype: of hidden states.
        record: remembers the tokens that rows have drawn.

    Attributes:
        waited_s: seconds that this rank has waited for others, in all batches.
    """

    def __init__(
        self,
        ranks: Ranks,
        num_slots: int,
        hidden_size: int,
        dtype: torch.dtype,
        record: Callable[[SamplingRows, Tensor], None],
    ) -> None:
        self.waited_s = 0.0
        self._ranks = ranks
        self._hidden_size, self._dtype = hidden_size, dtype
        self._record = record
        self._receives_tokens = ranks.is_first_stage and not ranks.samples
        # By slot: the draw that its last token comes from, counted over all batches.
        self._drawn_in = np.full(num_slots, -1, np.int64)
        self._num_draws = 0
        self._owed: deque[tuple[int, SamplingRows]] = deque()
        # Tensors on their way, by the rank that they go to: they must live until they have arrived.
        self._sending: defaultdict[int, deque[tuple[dist.Work, Tensor]]] = defaultdict(deque)

    def clear(self) -> None:
        """Receives all that is on the way, and forgets the slots."""
        while self._owed:
            self._receive_tokens()
        self._drawn_in[:] = -1

    # --- tokens -----------------------------------------------------------------------------------

    def need_tokens_of(self, slots: Int32Array) -> None:
        """Before a batch that decodes these slots: receives their last tokens, if they lack."""
        if not self._owed:
            return
        due = int(self._drawn_in[slots].max(initial=-1))
        while self._owed and (self._owed[0][0] <= due or len(self._owed) > _MAX_OWED):
            self._receive_tokens()

    def expect_tokens(self, rows: SamplingRows) -> None:
        """After a batch, at a rank that does not sample: remembers that rows have drawn."""
        if self._receives_tokens and len(rows.slots):
            self._drawn_in[rows.slots] = self._num_draws
            self._owed.append((self._num_draws, rows))
            self._num_draws += 1

    def send_tokens(self, token_ids: Tensor) -> None:
        """After a batch, at the rank that samples.

        Args:
            token_ids: [sampling rows] int64.
        """
        if len(token_ids):
            for rank in self._ranks.others_of_first_stage:
                # The former tokens were received before this batch was run: nothing waits here.
                self._send(token_ids, rank, self._ranks.token_group, _MAX_OWED + 1)

    def _receive_tokens(self) -> None:
        _, rows = self._owed.popleft()
        token_ids = torch.empty(len(rows.slots), dtype=torch.int64, device=self._ranks.device)
        self._receive(token_ids, self._ranks.sampler, self._ranks.token_group)
        self._record(rows, token_ids)

    # --- hidden states ----------------------------------------------------------------------------

    def receive_hidden(self, num_rows: int) -> Tensor:
        """At a stage but the first: the former stage's hidden states, [rows, hidden]."""
        hidden = torch.empty(
            num_rows, self._hidden_size, dtype=self._dtype, device=self._ranks.device
        )
        if num_rows:
            source = self._ranks.rank - self._ranks.tp_size
            self._receive(hidden, source, self._ranks.hidden_group)
        return hidden

    def send_hidden(self, hidden: Tensor) -> None:
        """At a stage but the last: hands hidden states on, which must not be changed any more."""
        if len(hidden):
            target = self._ranks.rank + self._ranks.tp_size
            self._send(hidden, target, self._ranks.hidden_group, _MAX_AHEAD)

    # --- both -------------------------------------------------------------------------------------

    def _send(self, tensor: Tensor, rank: int, group: dist.ProcessGroup | None, most: int) -> None:
        """Sends without waiting, while less than ``most`` tensors are on their way to this rank."""
        sending, started = self._sending[rank], time.perf_counter()
        with naming_loss():
            # Where gloo sends, work is never completed before someone has waited for it.
            while sending and (len(sending) >= most or sending[0][0].is_completed()):
                sending.popleft()[0].wait()
            self.waited_s += time.perf_counter() - started
            work = dist.isend(tensor, rank, group=group)
        assert work is not None  # this rank is in the group
        sending.append((work, tensor))

    def _receive(self, tensor: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
        started = time.perf_counter()
        with naming_loss():
            work = dist.irecv(tensor, rank, group=group)
            assert work is not None
            work.wait()
        self.waited_s += time.perf_counter() - started
