"""Plans batches: who decodes, which prompts get chunks, who is admitted, who must give way.

Each question has one method that answers with a value, and the answer is carried out before the next
question is asked, so nothing is ever undone. Knows nothing of results or of the server.

The order of a plan:

1. Where the head of the queue outranks sequences that run, these are preempted until it finds a seat and pages,
   if only the less important ones are in its way.
2. Every running sequence that may decode does. Where they need more pages than can be had, others are
   preempted until they suffice: of the least important priority whoever costs the least to compute again.
   The oldest is never asked while it needs its pages: in the end it could have every page there is, and no
   request is accepted that needs more. So the oldest always advances, and everybody is the oldest some day.
3. What is left of ``max_tokens_per_forward`` goes to prompts, in order, in chunks. Where a prompt ends,
   the other samples of its request may fork from its last row: that takes no tokens of the budget.
4. What is left then admits sequences from the queue, strictly in order, as far as there is room now and as
   the forecast finds room for all that they will need (``admission``). Where nobody holds a page the head is
   admitted whatever it needs. A sequence that was preempted and waits for its last results counts as being
   in the queue already: the pages it gave up are not for those behind it. Only who would compute a page
   that another prompt is computing steps aside until that page can be found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.batches import (
    NO_COPIES,
    Chunk,
    draws,
    forward_batch,
    pooled_prompts,
    prompt_pieces,
)
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.rows import Candidate
from tokasaurus.manager.in_flight import Flight
from tokasaurus.manager.kv.prefix_groups import GroupFinder
from tokasaurus.manager.running import Admission, RunningSequences
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.slots import NO_PAGES, IndexArray
from tokasaurus.manager.waiting import Backlog, priority_of
from tokasaurus.protocol.arrays import BoolArray, Int32Array
from tokasaurus.protocol.messages import ForwardBatch

__all__ = ["FORCED_PREEMPTION_INTERVAL", "Scheduler"]

FORCED_PREEMPTION_INTERVAL = 8  # batches

_MAX_PARKED = 256  # in one plan, so that none takes long

_NO_ORDER = np.iinfo(np.int64).max


@dataclass(slots=True)
class _Headroom:
    """What a round of admissions may still use, whatever the forecast says."""

    num_sequences: int
    num_tokens: int
    num_pages: int
    must_admit: bool  # nobody holds a page: the head fits, however large

    def take(self, num_tokens: int, num_pages: int, num_sequences: int) -> None:
        """So many sequences take so much in all."""
        self.num_tokens -= num_tokens
        self.num_pages -= num_pages
        self.num_sequences -= num_sequences
        self.must_admit = False


class _Offer(NamedTuple):
    """A candidate for whom there is room now."""

    candidate: Candidate
    chunk: Chunk
    admission: Admission | None  # None: it runs, only its forks do not

    @property
    def entering(self) -> list[Sequence]:
        """Who gets a slot if it is accepted."""
        leader = [] if self.admission is None else [self.admission.sequence]
        return leader + self.chunk.followers


class Scheduler:
    """The planner of one replica.

    Args:
        config: the manager's slice.
        running: sequences in slots.
        backlog: sequences that wait.
        admission: the forecast.
        counters: to count in.
    """

    def __init__(
        self,
        config: ManagerConfig,
        running: RunningSequences,
        backlog: Backlog,
        admission: AdmissionControl,
        counters: Counters,
    ) -> None:
        self._config = config
        self._running = running
        self._slots = running.slots
        self._pages = running.pages
        self._backlog = backlog
        self._admission = admission
        self._counters = counters
        self._groups = GroupFinder(
            running.prefixes, config.page_size, config.min_group_size, config.min_prefix_len
        )
        # Every running sequence may need a row of each batch, and a row is a token at least.
        self._max_running = min(config.max_seqs_per_forward, config.max_tokens_per_forward)

    def plan(self, now: float) -> ForwardBatch | None:
        """Plans the next batch and counts it as sent; None if there is nothing to run."""
        self._make_way()
        decoding, crossing = self._plan_decode()
        decode_slots = self._commit_decode(decoding, crossing)
        budget = self._prefill_budget(len(decode_slots))
        chunks = self._plan_chunks(budget)
        budget -= sum(chunk.length for chunk in chunks)
        accepted = self._accept(self._offers(chunks, budget, decoding), chunks)
        # Only now: who is woken may come before those who were offered a place.
        self._running.wake()
        if not len(decode_slots) and not chunks:
            return None
        batch = self._commit(decode_slots, chunks, accepted, now)
        self._admission.pass_step()
        if self._config.force_preemption:
            self._preempt_without_need(batch.number)
        return batch

    def preempt(self, slots: IndexArray) -> None:
        """Takes the pages of the sequences in these slots; they go on later, before all that follow them."""
        self._admission.release(slots)
        self._running.preempt([self._slots.sequence(slot) for slot in slots.tolist()])

    def _make_way(self) -> None:
        """Where the first of the queue outrank some who run, these give way until there is room for those."""
        slots, head = self._slots, self._backlog.head()
        if head is None:
            return
        lowest = priority_of(int(slots.order.max()))
        if priority_of(head.order) >= lowest:
            return
        candidates = self._outranking(lowest)
        num_rows = self._admission.num_outranking(candidates)
        num_pages, num_left = 0, num_rows
        for candidate in candidates:
            if num_left <= 0:
                break
            num_left -= candidate.num_rows
            cached_pages = self._cached_pages(candidate.sequence)
            num_new = -(-candidate.num_tokens // slots.page_size) - len(cached_pages)
            num_pages += self._pages.num_needed(cached_pages, num_new)
        while num_rows:
            num_active = int(np.count_nonzero(slots.length < slots.final_length))
            num_missing = num_pages - self._pages.num_available
            has_seats = num_active + min(num_rows, slots.num_free) <= self._max_running
            if has_seats and num_missing <= 0:
                return
            if priority_of(int(slots.order.max())) <= priority_of(head.order):
                return
            self.preempt(self._victims(max(1, num_missing), head.order))

    def _outranking(self, lowest: int) -> list[Candidate]:
        """The first of the queue, as many as one batch may feed, that go before this priority."""
        budget = self._config.max_tokens_per_forward
        candidates: list[Candidate] = []
        num_tokens = 0
        for sequence in self._backlog.in_order():
            if priority_of(sequence.order) >= lowest or num_tokens >= budget:
                break
            num_tokens += len(sequence.prompt_ids)
            num_forks = self._backlog.num_followers(sequence)
            candidates.append(Candidate(sequence, len(sequence.prompt_ids), 0, num_forks))
        return candidates

    def _plan_decode(self) -> tuple[BoolArray, IndexArray]:
        """Returns which slots decode (a mask), and which of them enter a new page; preempts for them."""
        slots = self._slots
        while True:
            decoding = slots.length < slots.decode_limit
            crossing = (decoding & (slots.length == slots.capacity)).nonzero()[0]
            if crossing.size <= self._pages.num_available:
                return decoding, crossing
            oldest = int(slots.order[slots.order >= 0].min())
            self.preempt(self._victims(crossing.size - self._pages.num_available, oldest))

    def _victims(self, num_pages: int, order: int) -> IndexArray:
        """The slots that are preempted next, where so many pages are wanted; at least one.

        Args:
            num_pages: wanted.
            order: of a sequence that all of them come after.
        """
        slots = self._slots
        # Where all tokens are planned, no batch to come needs the pages: this costs nobody anything.
        is_planned = (slots.length == slots.final_length) & (slots.order >= 0)
        if is_planned.any():
            planned: IndexArray = is_planned.nonzero()[0]
            return planned
        later = (slots.order > order).nonzero()[0]
        if not later.size:
            raise ProtocolError("the oldest running sequence does not find the pages it may have")
        priorities = priority_of(slots.order[later])
        rows = later[priorities == priorities.max()]
        orders = slots.order[rows]
        # What others hold too is neither freed nor computed again.
        num_shared = self._running.prefixes.num_shared_pages(rows)
        num_freed = slots.capacity[rows] // slots.page_size - num_shared
        cost = slots.length[rows] - num_shared * slots.page_size
        # Alone, if one suffices: the least work; else as few as possible. Of equals the newest.
        suffices = num_freed >= num_pages
        if suffices.any():
            ranked = np.lexsort((-orders, cost, ~suffices))[:1]
        else:
            ranked = np.lexsort((-orders, -num_freed))
            # A victim may have wanted one of the pages itself.
            num_gained = np.cumsum(num_freed[ranked])
            ranked = ranked[: int(np.searchsorted(num_gained, num_pages)) + 1]
        victims: IndexArray = rows[ranked]
        return victims

    def _commit_decode(self, decoding: BoolArray, crossing: IndexArray) -> IndexArray:
        slots = self._slots
        if crossing.size:
            columns = slots.capacity[crossing] // slots.page_size
            slots.page_table[crossing, columns] = self._pages.allocate(crossing.size)
            slots.capacity[crossing] += slots.page_size
            self._running.table_changes.add(crossing, columns.astype(np.intp))
        slots.length += decoding
        np.copyto(slots.last_batch, self._running.in_flight.next_number, where=decoding)
        return decoding.nonzero()[0]

    def _prefill_budget(self, num_decoding: int) -> int:
        """Prompt tokens that this batch may feed."""
        budget = self._config.max_tokens_per_forward - num_decoding
        if self._admission.refresh_is_due:
            waiting = [] if self._config.admission.greedy_prefill else self._queue_front()
            self._admission.refresh(waiting, budget)
        pace = self._admission.prefill_pace
        return budget if pace is None or num_decoding == 0 else min(budget, pace)

    def _queue_front(self) -> list[Candidate]:
        """Those who are likely to run soon, as if nothing of their prompts were cached."""
        front: list[Candidate] = []
        num_sequences = 0
        for sequence in self._backlog.in_order():
            num_forks = self._backlog.num_followers(sequence)
            front.append(Candidate(sequence, len(sequence.prompt_ids), 0, num_forks))
            num_sequences += 1 + num_forks
            if num_sequences >= self._max_running:
                break
        return front

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

    def _offers(self, chunks: list[Chunk], budget: int, decoding: BoolArray) -> list[_Offer]:
        """Who could run now, in the order in which they may: forks of these prompts, then the queue."""
        if not (chunks or len(self._backlog)):
            return []
        head = self._backlog.head()
        if not (self._is_empty or self._admission.may_ask(head)):
            return []
        slots = self._slots
        # A slot whose tokens are all planned enters no further batch: it does not count after this one.
        num_active = int(np.count_nonzero(decoding | (slots.length < slots.final_length)))
        headroom = _Headroom(
            num_sequences=min(self._max_running - num_active, slots.num_free),
            num_tokens=budget,
            num_pages=self._pages.num_available,
            must_admit=self._is_empty,
        )
        # Those will be back in the queue in a few turns.
        resuming = (s.order for s in self._running.preempted if s.resumes)
        first_order = min(resuming, default=_NO_ORDER)
        offers: list[_Offer] = []
        num_parked = 0
        for chunk in chunks:
            order = self._backlog.next_follower_order(chunk.sequence)
            if order < min(first_order, head.order if head else _NO_ORDER):
                num_forks = self._take_forks(chunk, headroom)
                if num_forks:
                    offers.append(_Offer(Candidate(chunk.sequence, 0, 0, num_forks), chunk, None))
        for sequence in self._backlog.in_order():
            if headroom.num_tokens <= 0 or headroom.num_sequences <= 0:
                break
            if sequence.order > first_order:
                break
            cached_pages = self._cached_pages(sequence)
            num_new = -(-len(sequence.prompt_ids) // slots.page_size) - len(cached_pages)
            num_needed = self._pages.num_needed(cached_pages, num_new)
            if num_needed > headroom.num_pages and not headroom.must_admit:
                break
            if not self._running.may_feed(sequence, len(cached_pages)):
                self._backlog.park(sequence)
                num_parked += 1
                if num_parked == _MAX_PARKED:
                    break
                continue
            start = len(cached_pages) * slots.page_size
            end = min(start + headroom.num_tokens, len(sequence.prompt_ids))
            chunk = Chunk(sequence, start, end)
            headroom.take(end - start, num_needed, 1)
            candidate = Candidate(
                sequence=sequence,
                num_tokens=len(sequence.prompt_ids) - start,
                num_held_pages=len(cached_pages) + num_new - num_needed,
                num_forks=self._take_forks(chunk, headroom),
            )
            offers.append(_Offer(candidate, chunk, Admission(sequence, cached_pages, num_new)))
        return offers

    def _cached_pages(self, sequence: Sequence) -> Int32Array:
        if sequence.whole_prompt_due:  # needs the hidden state of every position
            return NO_PAGES
        return self._pages.lookup(sequence.prompt_ids)

    def _take_forks(self, chunk: Chunk, headroom: _Headroom) -> int:
        """How many samples could run from the chunk's last row on."""
        num_followers = self._backlog.num_followers(chunk.sequence)
        if num_followers == 0 or not chunk.ends_prompt:
            return 0
        count = min(num_followers, headroom.num_sequences)
        has_own_page = len(chunk.sequence.prompt_ids) % self._slots.page_size > 0
        if has_own_page:
            count = min(count, max(0, headroom.num_pages))
        headroom.take(0, count if has_own_page else 0, count)
        return count

    def _accept(self, offers: list[_Offer], chunks: list[Chunk]) -> list[_Offer]:
        """Takes out of the queue whom the forecast has room for; adds the chunks they feed."""
        if not offers:
            return offers
        num_rows = self._admission.num_admissible([offer.candidate for offer in offers])
        if self._is_empty:
            num_rows = max(num_rows, 1)
        accepted: list[_Offer] = []
        for offer in offers:
            if num_rows <= 0:
                break
            accepted.append(offer)
            if offer.admission is not None:
                if self._backlog.pop() is not offer.candidate.sequence:
                    raise ProtocolError("the queue changed while its head was offered a place")
                self._pages.retain(offer.admission.cached_pages)
                chunks.append(offer.chunk)
                num_rows -= 1
            num_forks = min(num_rows, offer.candidate.num_forks)
            offer.chunk.followers = self._backlog.pop_followers(offer.chunk.sequence, num_forks)
            num_rows -= num_forks
        return accepted

    @property
    def _is_empty(self) -> bool:
        """Nobody holds a page."""
        return self._pages.num_held == 0

    def _commit(
        self,
        decode_slots: IndexArray,
        chunks: list[Chunk],
        accepted: list[_Offer],
        now: float,
    ) -> ForwardBatch:
        running = self._running
        number = running.in_flight.next_number
        copies = self._enter(accepted, now)
        groups = self._groups.find(decode_slots) if self._config.use_groups else None
        if groups is not None:
            decode_slots = groups.slots
            if groups.first_rows.size:
                num_grouped = len(decode_slots) - int(groups.first_rows.min())
                self._counters.num_grouped_tokens += num_grouped
        drawing = draws(chunks)
        batch = forward_batch(
            number,
            running.left_slots,
            [sequence for offer in accepted for sequence in offer.entering],
            running.table_changes.flush(),
            decode_slots,
            chunks,
            drawing,
            copies,
            groups,
        )
        running.left_slots = []
        drawing_slots = drawing[1]
        sampling_slots = decode_slots
        if drawing_slots.size:
            sampling_slots = np.concatenate([decode_slots, drawing_slots])
        running.in_flight.add(
            Flight(number, sampling_slots, prompt_pieces(chunks), pooled_prompts(chunks))
        )
        if chunks:
            self._commit_chunks(chunks, drawing_slots, number)
        self._counters.num_batches += 1
        self._counters.num_decode_tokens += len(decode_slots)
        self._counters.num_prefill_tokens += len(batch.prefill_ids)
        return batch

    def _enter(self, accepted: list[_Offer], now: float) -> Int32Array:
        """Gives slots and pages; returns the pages to copy after the batch."""
        if not accepted:
            return NO_COPIES
        running = self._running
        admissions = [offer.admission for offer in accepted if offer.admission is not None]
        if admissions:
            running.enter(admissions, now)
        copies = [NO_COPIES]
        for offer in accepted:
            chunk = offer.chunk
            if chunk.followers:
                chunk.forks, copied = running.fork(chunk.sequence, chunk.followers, now)
                copies.append(copied)
        entering = [sequence.slot for offer in accepted for sequence in offer.entering]
        self._admission.admit(np.array(entering, np.intp))
        return np.concatenate(copies, axis=1)

    def _commit_chunks(self, chunks: list[Chunk], drawing: IndexArray, number: int) -> None:
        running, slots = self._running, self._slots
        fed = [chunk.sequence.slot for chunk in chunks]
        slots.length[fed] = [chunk.end for chunk in chunks]
        slots.last_batch[fed] = number
        slots.last_batch[drawing] = number
        # Only now: a page that this frees must not be given out in the batch that still writes to it.
        running.publish([(chunk.sequence, chunk.forks) for chunk in chunks])
        if drawing.size:
            ended = [(chunk.sequence, chunk.forks) for chunk in chunks if chunk.ends_prompt]
            running.prompts_are_fed(ended, drawing)
        running.wake()

    def _preempt_without_need(self, number: int) -> None:
        """Now and then, another sequence each time; never the oldest, which must advance."""
        turn, rest = divmod(number, FORCED_PREEMPTION_INTERVAL)
        if rest == FORCED_PREEMPTION_INTERVAL - 1:
            order = self._slots.order
            running = (order >= 0).nonzero()[0]
            younger = running[order[running] > order[running].min(initial=_NO_ORDER)]
            if younger.size:
                self.preempt(younger[[turn % younger.size]])
