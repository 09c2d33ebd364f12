"""Plans batches: who decodes, which prompts get chunks, who is admitted, who must give way.

Each question has one method that answers with a value, and the answer is carried out before the next
question is asked, so nothing is ever undone. Knows nothing of results or of the server.

The order of a plan:

1. Every running sequence that may decode does. Where they need more pages than can be had, the newest
   running sequence is preempted, until they suffice. The oldest is never asked while it needs its pages:
   in the end it could have every page there is, and no request is accepted that needs more. So the
   oldest always advances, and everybody is the oldest some day.
2. What is left of ``max_tokens_per_forward`` goes to prompts, in order, in chunks. Where a prompt ends,
   the other samples of its request may fork from its last row: that takes no tokens of the budget.
3. What is left then admits sequences from the queue, strictly in order. Where nobody holds a page the head
   is admitted whatever it needs. A sequence that was preempted and waits for its last results counts as
   being in the queue already: the pages it gave up are not for those behind it. Only who would compute
   a page that another prompt is computing steps aside until that page can be found.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.batches import NO_COPIES, Chunk, draws, forward_batch, prompt_pieces
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
    num_pages: int  # less what is kept for those that run
    must_admit: bool  # nobody holds a page: the head fits, however large
    first_order: int  # who comes after this order does not run now

    def admit(self, num_tokens: int, num_pages: int, count: int = 1) -> None:
        """So many sequences run, each of which takes and reserves so many pages."""
        self.num_tokens -= num_tokens
        self.num_sequences -= count
        self.num_pages -= num_pages * count
        self.must_admit = False


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
        admissions: list[Admission] = []
        if chunks or len(self._backlog):
            budget -= sum(chunk.length for chunk in chunks)
            headroom = self._headroom(budget, decoding)
            for chunk in chunks:
                self._plan_forks(chunk, headroom)
            admissions = self._plan_admissions(chunks, headroom)
        if not len(decode_slots) and not chunks:
            return None
        batch = self._commit(decode_slots, chunks, admissions, now)
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
        """Deals tokens to the prompts that are being fed, in order."""
        chunks: list[Chunk] = []
        for sequence in self._running.prefilling:
            if budget <= 0:
                break
            start = int(self._slots.length[sequence.slot])
            end = min(start + budget, len(sequence.prompt_ids))
            chunks.append(Chunk(sequence, start, end))
            budget -= end - start
        return chunks

    def _headroom(self, budget: int, decoding: BoolArray) -> _Headroom:
        slots = self._slots
        # A slot whose tokens are all planned enters no further batch: it does not count after this one.
        num_active = int(np.count_nonzero(decoding | (slots.length < slots.final_length)))
        to_come = np.clip(slots.final_length - slots.capacity, 0, self.reserve_tokens)
        num_reserved = int((-(-to_come // slots.page_size)).sum())
        return _Headroom(
            num_sequences=min(self._max_running - num_active, slots.num_free),
            num_tokens=budget,
            num_pages=self._pages.num_available - num_reserved,
            must_admit=not slots.capacity.any(),
            # The preempted ones will be back in the queue in a few steps.
            first_order=min((s.order for s in self._running.preempted), default=_NO_ORDER),
        )

    def _plan_forks(self, chunk: Chunk, headroom: _Headroom) -> None:
        """Lets samples of the same prompt run from its last row on, while there is room."""
        if not chunk.ends_prompt or self._backlog.next_follower(chunk.sequence) is None:
            return
        head = self._backlog.head()
        first_order = min(headroom.first_order, head.order if head else _NO_ORDER)
        num_new, num_reserved = self._num_pages(chunk.sequence, len(chunk.sequence.prompt_ids))
        num_each = (1 if num_new else 0) + num_reserved
        limit = headroom.num_sequences
        if num_each:
            limit = min(limit, headroom.num_pages // num_each)
        for _ in range(limit):
            follower = self._backlog.next_follower(chunk.sequence)
            if follower is None or follower.order > first_order:
                break
            chunk.followers.append(self._backlog.pop_follower(chunk.sequence))
        headroom.admit(0, num_each, len(chunk.followers))

    def _plan_admissions(self, chunks: list[Chunk], headroom: _Headroom) -> list[Admission]:
        """Lets sequences run while there is room; adds the first chunk of each."""
        admissions: list[Admission] = []
        while (sequence := self._backlog.head()) is not None:
            if headroom.num_tokens <= 0 or headroom.num_sequences <= 0:
                break
            if sequence.order > headroom.first_order:
                break
            if headroom.num_pages <= 0 and not headroom.must_admit:
                break
            cached_pages = NO_PAGES
            if not sequence.prompt_logprobs_due:  # else it needs the logits of every position
                cached_pages = self._pages.lookup(sequence.prompt_ids)
            start = len(cached_pages) * self._slots.page_size
            num_new, num_reserved = self._num_pages(sequence, start)
            num_needed = num_reserved + self._pages.num_needed(cached_pages, num_new)
            if num_needed > headroom.num_pages and not headroom.must_admit:
                break
            self._backlog.pop()
            if not sequence.prompt_logprobs_due and not self._running.in_progress.enter(
                sequence, len(cached_pages)
            ):
                self._backlog.park(sequence)
                continue
            self._pages.retain(cached_pages)
            end = min(start + headroom.num_tokens, len(sequence.prompt_ids))
            chunk = Chunk(sequence, start, end)
            headroom.admit(chunk.length, num_needed)
            admissions.append(Admission(sequence, cached_pages, num_new))
            chunks.append(chunk)
            self._plan_forks(chunk, headroom)
        return admissions

    def _num_pages(self, sequence: Sequence, start: int) -> tuple[int, int]:
        """How many pages it takes to feed a prompt from a page's start on, and to go on for a while."""
        page_size = self._slots.page_size
        num_pages = -(-len(sequence.prompt_ids) // page_size)
        to_come = min(sequence.final_length - num_pages * page_size, self.reserve_tokens)
        return num_pages - start // page_size, max(0, -(-to_come // page_size))

    def _commit(
        self,
        decode_slots: IndexArray,
        chunks: list[Chunk],
        admissions: list[Admission],
        now: float,
    ) -> ForwardBatch:
        running = self._running
        number = running.in_flight.next_number
        if admissions:
            running.enter(admissions, now)
        entered = [admission.sequence for admission in admissions]
        copies = [NO_COPIES]
        for chunk in chunks:
            if chunk.followers:
                chunk.forks, copied = running.fork(chunk.sequence, chunk.followers, now)
                entered += chunk.followers
                copies.append(copied)
        drawing = draws(chunks)
        batch = forward_batch(
            number,
            entered,
            running.table_changes.flush(),
            decode_slots,
            chunks,
            drawing,
            np.concatenate(copies, axis=1),
        )
        sampling_slots = np.concatenate([decode_slots, drawing[1]])
        running.in_flight.add(Flight(number, sampling_slots, prompt_pieces(chunks)))
        if chunks:
            self._commit_chunks(chunks, drawing[1], number)
        self._counters.num_batches += 1
        self._counters.num_decode_tokens += len(decode_slots)
        self._counters.num_prefill_tokens += len(batch.prefill_ids)
        return batch

    def _commit_chunks(self, chunks: list[Chunk], drawing: IndexArray, number: int) -> None:
        running, slots = self._running, self._slots
        fed = [chunk.sequence.slot for chunk in chunks]
        slots.length[fed] = [chunk.end for chunk in chunks]
        slots.last_batch[fed] = number
        slots.last_batch[drawing] = number
        # Only now: a page that this frees must not be given out in the batch that still writes to it.
        for chunk in chunks:
            running.publish(chunk.sequence, chunk.forks)
        if drawing.size:
            ended = [chunk.sequence for chunk in chunks if chunk.ends_prompt]
            running.prompts_are_fed(ended, drawing)

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
