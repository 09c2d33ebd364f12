"""Plans batches: who decodes, which prompts get chunks, who is admitted, who must give way.

Each question has one method that answers with a value, and the answer is carried out before the next
question is asked, so nothing is ever undone. Knows nothing of results or of the server.

The order of a plan:

1. Every running sequence that may decode does. Where they need more pages than can be had, the newest
   running sequence is preempted, until they suffice. The oldest is never asked while it needs its pages:
   in the end it could have every page there is, and no request is accepted that needs more. So the
   oldest always advances, and everybody is the oldest some day.
2. What is left of ``max_tokens_per_forward`` goes to prompts, oldest first, in chunks.
3. What is left then admits sequences from the queue, strictly in order of arrival. Where nobody holds a
   page the head is admitted whatever it needs. A sequence that was preempted and waits for its last
   results counts as being in the queue already: the pages it gave up are not for those behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.batches import Chunk, forward_batch, prompt_pieces, sampling_slots
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.in_flight import Flight
from tokasaurus.manager.running import Admission, RunningSequences
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.slots import NO_PAGES, IndexArray
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.arrays import BoolArray
from tokasaurus.protocol.messages import ForwardBatch

__all__ = ["FORCED_PREEMPTION_INTERVAL", "RESERVE_TOKENS", "Scheduler"]

# Admitting a sequence is worth its prefill only if it can then run for a while. So pages for this many
# more tokens of every running sequence (or up to its end, if that is nearer) are not given to newcomers.
RESERVE_TOKENS = 32

FORCED_PREEMPTION_INTERVAL = 8  # batches


@dataclass(slots=True)
class _Headroom:
    """What a round of admissions may still use."""

    num_sequences: int
    num_tokens: int
    num_reserved_pages: int
    must_admit: bool  # nobody holds a page: the head fits, however large


class Scheduler:
    """The planner of one replica.

    Args:
        config: the manager's slice.
        running: sequences in slots.
        backlog: sequences that wait.
        counters: to count in.
    """

    def __init__(
        self,
        config: ManagerConfig,
        running: RunningSequences,
        backlog: Backlog,
        counters: Counters,
    ) -> None:
        self._config = config
        self._running = running
        self._slots = running.slots
        self._pages = running.pages
        self._backlog = backlog
        self._counters = counters
        self.reserve_tokens = RESERVE_TOKENS
        # Every running sequence may need a row of each batch, and a row is a token at least.
        self._max_running = min(config.max_seqs_per_forward, config.max_tokens_per_forward)

    def plan(self, now: float) -> ForwardBatch | None:
        """Plans the next batch and counts it as sent; None if there is nothing to run."""
        decoding, crossing = self._plan_decode()
        decode_slots = self._commit_decode(decoding, crossing)
        budget = self._config.max_tokens_per_forward - len(decode_slots)
        chunks = self._plan_chunks(budget)
        budget -= sum(chunk.length for chunk in chunks)
        admitted = self._admit(budget, decoding, now)
        chunks += admitted
        if not len(decode_slots) and not chunks:
            return None
        batch = self._commit(decode_slots, chunks, [chunk.sequence for chunk in admitted])
        if self._config.force_preemption:
            self._preempt_without_need(batch.number)
        return batch

    def _plan_decode(self) -> tuple[BoolArray, IndexArray]:
        """Returns which slots decode (a mask), and which of them enter a new page; preempts for them."""
        slots = self._slots
        while True:
            decoding = slots.length < slots.decode_limit
            crossing = np.flatnonzero(decoding & (slots.length == slots.capacity))
            if crossing.size <= self._pages.num_available:
                return decoding, crossing
            self._running.preempt(self._victim())

    def _victim(self) -> Sequence:
        """The sequence that is preempted next."""
        slots = self._slots
        # Where all tokens are planned, no batch to come needs the pages: this costs nobody anything.
        is_planned = (slots.length == slots.final_length) & (slots.order >= 0)
        if is_planned.any():
            return slots.sequence(int(is_planned.argmax()))
        newest = int(slots.order.argmax())
        if np.count_nonzero(slots.order >= 0) < 2:
            raise ProtocolError("the oldest running sequence does not find the pages it may have")
        return slots.sequence(newest)

    def _commit_decode(self, decoding: BoolArray, crossing: IndexArray) -> IndexArray:
        slots = self._slots
        if crossing.size:
            columns = slots.capacity[crossing] // slots.page_size
            slots.page_table[crossing, columns] = self._pages.allocate(crossing.size)
            slots.capacity[crossing] += slots.page_size
            self._running.table_changes.add(crossing, columns.astype(np.intp))
        slots.length += decoding
        np.copyto(slots.last_batch, self._running.in_flight.next_number, where=decoding)
        return np.flatnonzero(decoding)

    def _plan_chunks(self, budget: int) -> list[Chunk]:
        """Deals tokens to the prompts that are being fed, oldest first."""
        chunks: list[Chunk] = []
        for sequence in self._running.prefilling:
            if budget <= 0:
                break
            chunk = self._chunk(sequence, budget)
            chunks.append(chunk)
            budget -= chunk.length
        return chunks

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        start = int(self._slots.length[sequence.slot])
        return Chunk(sequence, start, min(budget, len(sequence.prompt_ids) - start))

    def _admit(self, budget: int, decoding: BoolArray, now: float) -> list[Chunk]:
        """Lets sequences run while there is room; returns the first chunk of each."""
        chunks: list[Chunk] = []
        if budget <= 0 or not len(self._backlog):
            return chunks
        headroom = self._headroom(budget, decoding)
        while (admission := self._plan_admission(headroom)) is not None:
            sequence = self._backlog.pop()
            self._running.enter(admission, now)
            chunk = self._chunk(sequence, headroom.num_tokens)
            chunks.append(chunk)
            headroom.num_tokens -= chunk.length
            headroom.num_sequences -= 1
            headroom.num_reserved_pages += admission.num_reserved_pages
            headroom.must_admit = False
        return chunks

    def _headroom(self, budget: int, decoding: BoolArray) -> _Headroom:
        slots = self._slots
        # A slot whose tokens are all planned enters no further batch: it does not count after this one.
        num_active = int(np.count_nonzero(decoding | (slots.length < slots.final_length)))
        to_come = np.clip(slots.final_length - slots.capacity, 0, self.reserve_tokens)
        return _Headroom(
            num_sequences=self._max_running - num_active,
            num_tokens=budget,
            num_reserved_pages=int((-(-to_come // slots.page_size)).sum()),
            must_admit=not slots.capacity.any(),
        )

    def _plan_admission(self, headroom: _Headroom) -> Admission | None:
        """Whether the head of the queue may run now."""
        sequence = self._backlog.head()
        if sequence is None or headroom.num_tokens <= 0 or headroom.num_sequences <= 0:
            return None
        if any(other.order < sequence.order for other in self._running.preempted):
            return None  # it will be back in the queue, before this one, in a few steps
        spare = self._pages.num_available - headroom.num_reserved_pages
        if self._slots.num_free == 0 or (spare <= 0 and not headroom.must_admit):
            return None
        if sequence.prompt_logprobs_due:  # needs the logits of every position
            cached_pages = NO_PAGES
        else:
            cached_pages = self._pages.lookup(sequence.prompt_ids)
        page_size = self._slots.page_size
        num_pages = -(-len(sequence.prompt_ids) // page_size)
        to_come = min(sequence.final_length - num_pages * page_size, self.reserve_tokens)
        admission = Admission(
            sequence=sequence,
            cached_pages=cached_pages,
            num_new_pages=num_pages - len(cached_pages),
            num_reserved_pages=max(0, -(-to_come // page_size)),
        )
        needed = self._pages.num_needed(cached_pages, admission.num_new_pages)
        fits = needed + admission.num_reserved_pages <= spare
        return admission if fits or headroom.must_admit else None

    def _commit(
        self, decode_slots: IndexArray, chunks: list[Chunk], entered: list[Sequence]
    ) -> ForwardBatch:
        running, slots = self._running, self._slots
        number = running.in_flight.next_number
        batch = forward_batch(number, entered, running.table_changes.flush(), decode_slots, chunks)
        rows = sampling_slots(decode_slots, chunks)
        running.in_flight.add(Flight(number, rows, prompt_pieces(chunks)))
        for chunk in chunks:
            slot = chunk.sequence.slot
            slots.length[slot] = chunk.end
            slots.last_batch[slot] = number
        # Only now: a page that this frees must not be given out in the batch that still writes to it.
        for chunk in chunks:
            running.publish(chunk.sequence)
        if chunks:
            running.prompts_are_fed([chunk.sequence for chunk in chunks if chunk.ends_prompt])
        self._counters.num_batches += 1
        self._counters.num_decode_tokens += len(decode_slots)
        self._counters.num_prefill_tokens += len(batch.prefill_ids)
        return batch

    def _preempt_without_need(self, number: int) -> None:
        """Now and then, another sequence each time; never the oldest, which must advance."""
        turn, rest = divmod(number, FORCED_PREEMPTION_INTERVAL)
        if rest == FORCED_PREEMPTION_INTERVAL - 1:
            order = self._slots.order
            running = np.flatnonzero(order >= 0)
            younger = running[order[running] > order[running].min(initial=_NO_ORDER)]
            if younger.size:
                self._running.preempt(self._slots.sequence(int(younger[turn % younger.size])))


_NO_ORDER = np.iinfo(np.int64).max
