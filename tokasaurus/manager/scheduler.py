"""Plans batches: which sequences decode, feed their prompts, enter, or give way.

Each question has one method that answers with a value. ``plan`` carries the answer out before it
asks the next question, so nothing is ever undone. Only a claim on a page of a prompt is made
together with an offer, because it decides about the sequences behind it in the queue. Knows nothing
of results or of the server.

A cartridge that no sequence uses yet is first claimed (``claims``), and written if its pages are
not there. The sequence starts in a later plan.

The order of a plan:

1. Where the head of the queue outranks running sequences, these are preempted until the head finds
   a seat and pages, if only less important sequences are in its way.
2. Where a client runs less than its share and one of its sequences has waited for long, the
   sequences of clients that run more than theirs are preempted until it finds a seat and pages.
3. Every running sequence that may decode does; in a pipeline those of one lane (``lanes``). Where
   they need more pages than are available, others are preempted until the pages suffice: of the
   least important priority, of the clients that run the most, the one that costs the least to
   compute again. The first in the order is never preempted while it needs its pages: in the end it
   could have every page there is, and no request is accepted that needs more. So the first always
   advances, and every sequence is the first at some time. A claim on a cartridge counts as a
   running sequence of the same order, except that it is dropped rather than preempted.
4. What is left of ``max_tokens_per_forward``, or less (``prompt_budget``), goes to prompts, in
   order, in chunks. Where a prompt ends, the other samples of its request may fork from its last
   row: that takes no tokens of the budget. If this feeds nothing and no lane is due, the lane that
   has waited the longest decodes.
5. What is left then admits sequences from the queue, strictly in order, as far as there is room now
   and as the forecast finds room for all that they will need (``admission``). There are four
   exceptions:

   - Where no sequence holds a page, the head is admitted whatever it needs.
   - So is the sequence for which others gave way by rule 2.
   - A sequence that would compute a page that another prompt is computing steps aside until that
     page can be found.
   - A sequence that was preempted and waits for its last results counts as being in the queue
     already: the sequences behind it cannot have the pages that it gave up.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.batches import (
    Chunk,
    draws,
    forward_batch,
    pooled_prompts,
    prompt_pieces,
)
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.rows import Candidate, uncached_candidate
from tokasaurus.manager.in_flight import Flight
from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.manager.kv.prefix_groups import GroupFinder, Groups
from tokasaurus.manager.lanes import Lanes
from tokasaurus.manager.order import NO_ORDER, priority_of
from tokasaurus.manager.prompt_budget import PromptBudget
from tokasaurus.manager.running import NO_COPIES, RunningSequences, SlotStart
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.slots import NO_SLOTS, IndexArray
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.arrays import EMPTY_INT32, BoolArray, Int32Array
from tokasaurus.protocol.messages import ForwardBatch
from tokasaurus.rounding import ceil_div

__all__ = ["FORCED_PREEMPTION_INTERVAL", "Scheduler"]

FORCED_PREEMPTION_INTERVAL = 8  # batches

_MAX_PARKED = 256  # in one plan, so that none takes long
_NUM_NEAR_HEAD = 32  # sequences of the queue that may be let in out of turn


class _Wanted(NamedTuple):
    """What the front of the queue needs, where it outranks running sequences."""

    num_sequences: int
    num_pages: int
    order: int  # of the head


class _DecodePlan(NamedTuple):
    """The running sequences that decode."""

    is_decoding: BoolArray  # [slots]
    crossing: IndexArray  # slots that enter a new page
    num_missing: int  # pages; 0 or less where there are enough


@dataclass(slots=True)
class _Headroom:
    """What a round of admissions may still use, whatever the forecast says."""

    num_sequences: int
    num_tokens: int
    num_pages: int

    @property
    def is_used_up(self) -> bool:
        """Whether no sequence can start to feed its prompt."""
        return self.num_tokens <= 0 or self.num_sequences <= 0

    def take(self, num_tokens: int, num_pages: int, num_sequences: int) -> None:
        """Counts what these sequences use, all together."""
        self.num_tokens -= num_tokens
        self.num_pages -= num_pages
        self.num_sequences -= num_sequences


class _Offer(NamedTuple):
    """A candidate for which there is room now."""

    candidate: Candidate
    chunk: Chunk
    start: SlotStart | None  # None: it runs, only its forks do not
    claims: bool = False  # its cartridge; it does not run yet. No offer comes after this one

    @property
    def entering(self) -> list[Sequence]:
        """The sequences that get a slot if the offer is accepted."""
        leader = [] if self.start is None else [self.start.sequence]
        return leader + self.chunk.followers


class _Offers(NamedTuple):
    """What the forecast is asked about."""

    offers: list[_Offer]  # in the order in which they may run
    # For pages that another prompt is computing, or for cartridges that are being written.
    waiting: list[Sequence]


class Scheduler:
    """The planner of one replica.

    Attributes:
        may_find_more: whether the last plan has taken a sequence out of the way because of its
            cartridge: the next plan may find more to run.

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
            running.prefixes,
            config.page_size,
            config.min_group_size,
            config.min_prefix_len,
            config.num_lanes,
        )
        self._lanes = Lanes(config.num_lanes, running.slots) if config.num_lanes > 1 else None
        self._prompt_budget = PromptBudget(config, running, backlog, admission)
        self._max_running = config.max_running
        self.may_find_more = False
        self._favoured: Sequence | None = None  # others gave way for it in this plan

    def plan(self, now: float) -> ForwardBatch | None:
        """Plans the next batch and counts it as sent; None if there is nothing to run."""
        self.may_find_more = False
        self._backlog.review_places()
        wanted = self._wanted_by_head()
        self._favoured = None if wanted is None else self._backlog.head()
        while wanted is not None and (victims := self._in_the_way_of(wanted)).size:
            self.preempt(victims)
        overdue = self._make_way()
        if overdue is not None:
            self._favoured = overdue
        decode_slots, is_decoding = self._decode()
        chunks, accepted = self._feed(is_decoding, len(decode_slots), overdue)
        if not len(decode_slots) and not chunks:
            if self._lanes is None or not self._lanes.num_decoding:
                return None
            decode_slots, is_decoding = self._decode(at_once=True)
            if not len(decode_slots):  # all that could decode gave way
                return None
        number = self._running.in_flight.next_number
        begins_step = self._lanes is None or self._lanes.begins_step(number)
        batch = self._commit(decode_slots, chunks, accepted, now, begins_step)
        if begins_step:
            self._admission.pass_step()
            self._backlog.shares.pass_step()
        if self._config.force_preemption:
            self.preempt(self._victims_without_need(batch.number))
        return batch

    def recall(self) -> None:
        """Lets sequences back into the queue for whose cartridges there may be room now.

        It is called once before the plans of a turn: those that these plans refuse stay aside.
        """
        claims = self._running.claims
        if claims.is_any_aside and (
            self._is_empty or claims.recall_is_due(self._counters.device_s)
        ):
            self._running.recall()

    @property
    def num_lanes(self) -> int:
        """Lanes that have something to do."""
        if self._lanes is None:
            return 1
        most = self._lanes.num_lanes
        if self._lanes.num_decoding >= most or self._running.prefilling:
            return most  # chunks of prompts wait for no tokens
        return min(most, max(1, self._running.num_running))

    def preempt(self, slots: IndexArray) -> None:
        """Takes the pages of the sequences in these slots; they keep their place in the order."""
        if slots.size:
            self._admission.release(slots)
            self._running.preempt([self._slots.sequence(slot) for slot in slots.tolist()])

    # --- giving way ------------------------------------------------------------------------------

    def _wanted_by_head(self) -> _Wanted | None:
        """What the front of the queue needs; None if it outranks none or cannot fit."""
        head = self._backlog.head()
        if head is None:
            return None
        lowest = priority_of(int(self._slots.order.max()))
        if priority_of(head.order) >= lowest:
            return None
        candidates = self._outranking(lowest)
        num_rows = self._admission.num_outranking(candidates)
        if not num_rows:
            return None
        num_pages, num_left = 0, num_rows
        cartridges: dict[Cartridge, int] = {}  # to be claimed, and their pages
        for candidate in candidates:
            if num_left <= 0:
                break
            num_left -= candidate.num_rows
            num_pages += self._num_needed(self._start_of(candidate.sequence))
            cartridge = candidate.sequence.request.cartridge
            if cartridge is not None and not cartridge.num_holders:
                cartridges[cartridge] = cartridge.num_pages
        num_pages += sum(cartridges.values())
        return _Wanted(num_rows, num_pages, head.order)

    def _outranking(self, lowest: int) -> list[Candidate]:
        """The first of the queue, as many as one batch may feed, that go before this priority."""
        budget = self._config.max_tokens_per_forward
        candidates: list[Candidate] = []
        num_tokens = 0
        for sequence in self._backlog.in_order():
            if priority_of(sequence.order) >= lowest or num_tokens >= budget:
                break
            num_tokens += sequence.num_own_tokens
            candidates.append(self._uncached_candidate(sequence))
        return candidates

    def _in_the_way_of(self, wanted: _Wanted) -> IndexArray:
        """The slots to preempt next for the front of the queue; none if it finds what it needs."""
        slots = self._slots
        num_active = int(np.count_nonzero(slots.length < slots.final_length))
        num_missing = wanted.num_pages - self._pages.num_available
        num_entering = min(wanted.num_sequences, slots.num_free)
        has_seats = num_active + num_entering <= self._max_running
        if has_seats and num_missing <= 0:
            return NO_SLOTS
        if priority_of(int(slots.order.max())) <= priority_of(wanted.order):
            return NO_SLOTS
        return self._victims(max(1, num_missing), wanted.order)

    def _oldest_order(self) -> int:
        """The order of the sequence that runs, or has a claim, and goes before all others."""
        oldest = int(self._slots.order[self._slots.order >= 0].min())
        return min(oldest, self._running.claims.first_order())

    def _drop_claim_behind(self, order: int) -> bool:
        """Drops the last claim on a cartridge, if it comes after this order."""
        last = self._running.claims.last()
        if last is None or last.order <= order:
            return False
        self._running.claims.drop(last)
        return True

    def _victims(self, num_pages: int, order: int) -> IndexArray:
        """The slots that are preempted next; at least one.

        Args:
            num_pages: that are wanted.
            order: of a sequence that goes before all of them.
        """
        slots = self._slots
        planned = slots.fully_planned()
        if planned.size:  # they need their pages no more: nothing is computed again
            return planned
        later = (slots.order > order).nonzero()[0]
        if not later.size:
            raise ProtocolError("the oldest running sequence does not find the pages it may have")
        priorities = priority_of(slots.order[later])
        rows = self._above_share(later[priorities == priorities.max()])
        orders = slots.order[rows]
        # Pages that other sequences hold too are neither freed nor computed again.
        num_freed, cost = self._running.unshared(rows)
        # One sequence, if its pages suffice: that with the least work. Otherwise as few as
        # possible. Of equals the newest.
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

    # --- shares ----------------------------------------------------------------------------------

    def _make_way(self) -> Sequence | None:
        """Lets a sequence in though the forecast has no room, if that is fair.

        It is the first near the head of the queue for which these things hold:

        - It has waited for long.
        - Its client runs less than its share.
        - Sequences behind the head, of clients that run more than their share, hold what it may
          need.

        It becomes the head, and these are preempted until it finds a seat and its pages.

        Returns:
            The new head; None if all must wait.
        """
        head = self._backlog.head()
        if head is None or not self._is_shared(head) or not self._slots.num_free:
            return None
        slots = self._slots
        peers = (priority_of(slots.order) == priority_of(head.order)).nonzero()[0]
        behind = peers[slots.order[peers] > head.order]
        if not behind.size:
            return None
        num_clients = self._backlog.shares.num_clients(head.request.message.priority)
        counts = np.bincount(slots.client[peers], minlength=self._backlog.shares.num_numbers)
        rows = behind[counts[slots.client[behind]] * num_clients > peers.size]
        if not rows.size:
            return None
        rows = rows[np.argsort(-slots.order[rows])]
        for sequence in islice(self._backlog.in_order(), _NUM_NEAR_HEAD):
            is_below = (counts[sequence.request.client] + 1) * num_clients <= peers.size
            if not is_below or not self._is_overdue(sequence):
                continue
            num_victims = self._num_displaced_by(sequence, rows)
            if num_victims is None or not self._backlog.move_to_head(sequence):
                return None
            self.preempt(rows[:num_victims])
            return sequence
        return None

    def _num_displaced_by(self, sequence: Sequence, rows: IndexArray) -> int | None:
        """How many of these slots, from the first on, hold the room that a sequence may need.

        None if all of them do not hold enough.
        """
        slots, start = self._slots, self._start_of(sequence)
        num_later = ceil_div(sequence.final_length, slots.page_size) - start.num_pages
        num_missing = self._num_to_claim(start) + num_later - self._pages.num_available
        num_freed = np.cumsum(self._running.unshared(rows)[0])
        if num_missing > num_freed[-1]:
            return None
        num_active = int(np.count_nonzero(slots.length < slots.final_length))
        num_victims = int(num_active >= self._max_running)
        if num_missing > 0:
            num_victims = max(num_victims, int(np.searchsorted(num_freed, num_missing)) + 1)
        return num_victims

    def _is_shared(self, sequence: Sequence) -> bool:
        """Whether another client has sequences of this one's priority."""
        return self._backlog.shares.num_clients(sequence.request.message.priority) > 1

    def _is_overdue(self, sequence: Sequence) -> bool:
        waited_s = self._counters.device_s - sequence.request.device_s_before
        return waited_s >= self._config.share_wait_s

    def _above_share(self, rows: IndexArray) -> IndexArray:
        """Those of these running sequences whose clients run more than others; all if none do."""
        clients = self._slots.client[rows]
        counts = np.bincount(clients)
        num_clients = np.count_nonzero(counts)
        if num_clients < 2:
            return rows
        is_above = counts[clients] * num_clients > rows.size
        return rows[is_above] if is_above.any() else rows

    def _victims_without_need(self, number: int) -> IndexArray:
        """For tests: another slot now and then; never the oldest, which must advance."""
        count, rest = divmod(number, FORCED_PREEMPTION_INTERVAL)
        if rest != FORCED_PREEMPTION_INTERVAL - 1:
            return NO_SLOTS
        order = self._slots.order
        running = (order >= 0).nonzero()[0]
        younger: IndexArray = running[order[running] > order[running].min(initial=NO_ORDER)]
        return younger[[count % younger.size]] if younger.size else younger

    # --- decode ----------------------------------------------------------------------------------

    def _decode(self, *, at_once: bool = False) -> tuple[IndexArray, BoolArray]:
        """The slots that decode, and the same as a column over slots; their pages are given out.

        Args:
            at_once: see ``Lanes.due``.
        """
        decode = self._plan_decode(at_once)
        while decode.num_missing > 0:
            if not self._drop_claim_behind(int(self._slots.order.max())):
                self.preempt(self._victims(decode.num_missing, self._oldest_order()))
            decode = self._plan_decode(at_once)
        return self._commit_decode(decode), decode.is_decoding

    def _plan_decode(self, at_once: bool) -> _DecodePlan:
        slots = self._slots
        is_decoding = slots.length < slots.decode_limit
        if self._lanes is not None:
            number = self._running.in_flight.next_number
            is_decoding = self._lanes.due(is_decoding, number, at_once=at_once)
        crossing = (is_decoding & (slots.length == slots.capacity)).nonzero()[0]
        return _DecodePlan(is_decoding, crossing, crossing.size - self._pages.num_available)

    def _commit_decode(self, decode: _DecodePlan) -> IndexArray:
        """Gives out the new pages and counts the tokens as fed; returns the slots that decode."""
        slots, crossing = self._slots, decode.crossing
        if crossing.size:
            columns = slots.capacity[crossing] // slots.page_size
            slots.page_table[crossing, columns] = self._pages.allocate(crossing.size)
            slots.capacity[crossing] += slots.page_size
            self._running.table_changes.add(crossing, columns.astype(np.intp))
        slots.length += decode.is_decoding
        rows = decode.is_decoding.nonzero()[0]
        slots.last_batch[rows] = self._running.in_flight.next_number
        return rows

    # --- prompts ---------------------------------------------------------------------------------

    def _feed(
        self, is_decoding: BoolArray, num_decoding: int, overdue: Sequence | None
    ) -> tuple[list[Chunk], list[_Offer]]:
        """The chunks of the batch, and the sequences that enter, among them those of chunks."""
        self._refresh_forecast(num_decoding)
        num_all = num_decoding if self._lanes is None else self._lanes.num_decoding
        budget = self._prompt_budget.tokens(num_decoding, keeps_pace=num_all > 0)
        chunks = self._plan_chunks(budget)
        budget -= sum(chunk.length for chunk in chunks)
        offers, waiting = self._plan_offers(chunks, budget, is_decoding, overdue)
        for sequence in waiting:
            self._backlog.park(sequence)
        accepted = self._accept(offers, overdue)
        chunks += [offer.chunk for offer in accepted if offer.start is not None]
        # Only now: a sequence that wakes up may come before those that were offered a place.
        self._running.wake()
        return chunks, accepted

    def _refresh_forecast(self, num_decoding: int) -> None:
        if self._admission.refresh_is_due:
            waiting = [] if self._config.admission.greedy_prefill else self._queue_front()
            num_rows = num_decoding if self._lanes is None else self._lanes.num_decoding
            self._admission.refresh(waiting, self._admission.max_tokens - num_rows)

    def _queue_front(self) -> list[Candidate]:
        """The candidates that are likely to run soon, as if none of their pages were cached."""
        front: list[Candidate] = []
        num_sequences = 0
        for sequence in self._backlog.in_order():
            front.append(self._uncached_candidate(sequence))
            num_sequences += front[-1].num_rows
            if num_sequences >= self._max_running:
                break
        return front

    def _uncached_candidate(self, sequence: Sequence) -> Candidate:
        num_forks = self._backlog.num_followers(sequence)
        return uncached_candidate(sequence, num_forks)

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

    # --- admission -------------------------------------------------------------------------------

    def _plan_offers(
        self,
        chunks: list[Chunk],
        budget: int,
        is_decoding: BoolArray,
        overdue: Sequence | None,
    ) -> _Offers:
        """Candidates for which there is room now: forks of these prompts, then the queue."""
        if not (chunks or len(self._backlog)):
            return _Offers([], [])
        head = self._backlog.head()
        if not (self._is_empty or overdue is not None or self._admission.may_ask(head)):
            return _Offers([], [])
        headroom = self._headroom(budget, is_decoding)
        # These will be back in the queue in a few turns.
        resuming = (s.order for s in self._running.preempted if s.resumes)
        first_order = min(resuming, default=NO_ORDER)
        fork_order = first_order if head is None else min(first_order, head.order)
        forks = self._fork_offers(chunks, headroom, fork_order)
        queued, waiting = self._queue_offers(headroom, first_order)
        return _Offers(forks + queued, waiting)

    def _headroom(self, budget: int, is_decoding: BoolArray) -> _Headroom:
        slots = self._slots
        # A slot whose tokens are all planned enters no further batch: it does not count after this
        # one.
        num_active = int(np.count_nonzero(is_decoding | (slots.length < slots.final_length)))
        return _Headroom(
            num_sequences=min(self._max_running - num_active, slots.num_free),
            num_tokens=budget,
            num_pages=self._pages.num_available,
        )

    def _fork_offers(
        self, chunks: list[Chunk], headroom: _Headroom, first_order: int
    ) -> list[_Offer]:
        """Samples that could fork from these prompts, and go before ``first_order``."""
        offers: list[_Offer] = []
        for chunk in chunks:
            if self._backlog.next_follower_order(chunk.sequence) < first_order:
                num_forks = self._take_forks(chunk, headroom, first_order)
                if num_forks:
                    offers.append(_Offer(Candidate(chunk.sequence, 0, 0, num_forks), chunk, None))
        return offers

    def _queue_offers(self, headroom: _Headroom, first_order: int) -> _Offers:
        """The first of the queue, as long as they fit and do not come after ``first_order``."""
        offers: list[_Offer] = []
        waiting: list[Sequence] = []
        queue = self._backlog.in_order()
        following = next(queue, None)
        while following is not None:
            sequence, following = following, next(queue, None)
            if headroom.is_used_up or sequence.order > first_order or len(waiting) == _MAX_PARKED:
                break
            cartridge = sequence.request.cartridge
            is_refused = cartridge is not None and self._running.claims.is_refused(cartridge)
            if is_refused and self._steps_aside(sequence):
                waiting.append(sequence)
                continue
            start = self._start_of(sequence)
            num_needed = self._num_to_claim(start)
            if num_needed > headroom.num_pages:
                num_needed = self._make_room(start, headroom)
            if num_needed > headroom.num_pages:
                is_cartridge_too_large = self._num_needed(start) <= headroom.num_pages
                if is_cartridge_too_large and self._steps_aside(sequence):
                    waiting.append(sequence)
                    continue
                break
            if cartridge is not None and not cartridge.num_holders:
                offers.append(_claim_offer(start, num_needed))
                break
            if cartridge is not None and not cartridge.is_there:
                self._running.set_aside(sequence)
                waiting.append(sequence)
            elif self._running.may_feed(sequence, start.num_found_pages):
                if cartridge is not None:  # else a claim that keeps it might be dropped now
                    self._running.claims.add(sequence, cartridge)
                last = first_order if following is None else min(first_order, following.order)
                offers.append(self._take_start(start, num_needed, headroom, last))
            else:
                waiting.append(sequence)
        return _Offers(offers, waiting)

    def _make_room(self, start: SlotStart, headroom: _Headroom) -> int:
        """Drops claims that come after this sequence until its pages are there.

        Returns:
            The number of pages that it needs, with its cartridge.
        """
        num_needed = self._num_to_claim(start)
        while num_needed > headroom.num_pages:
            num_available = self._pages.num_available
            if not self._drop_claim_behind(start.sequence.order):
                break
            headroom.num_pages += self._pages.num_available - num_available
            num_needed = self._num_to_claim(start)
        return num_needed

    def _start_of(self, sequence: Sequence) -> SlotStart:
        """The pages with which a sequence would start now."""
        page_size, num_pseudo = self._slots.page_size, sequence.request.num_pseudo
        ids = sequence.prompt_ids
        if sequence.whole_prompt_due:  # needs the hidden state of every token of its own
            ids = ids[: num_pseudo + 1]
        cached_pages = self._pages.lookup(self._running.weights_version, ids)
        num_pages = ceil_div(len(sequence.prompt_ids), page_size)
        length = max(len(cached_pages) * page_size, num_pseudo)
        # Where a cartridge is not there yet, no page is found, but its full ones will be.
        num_new_pages = num_pages - max(len(cached_pages), num_pseudo // page_size)
        whole_prompt = EMPTY_INT32
        if length + 1 < len(ids) == (len(cached_pages) + 1) * page_size:
            found = self._pages.lookup_whole(self._running.weights_version, ids)
            # The copy needs one page more than the prompt has, and there may never be that many.
            num_needed = self._pages.num_needed(found, num_new_pages)
            num_needed += _num_unclaimed_pages(sequence)
            if len(found) and num_needed <= self._pages.num_available:
                whole_prompt, length = found, len(ids) - 1
        return SlotStart(sequence, cached_pages, num_pages, num_new_pages, length, whole_prompt)

    def _num_needed(self, start: SlotStart) -> int:
        """Pages that are not available any more if the sequence starts, without its cartridge.

        A page that is copied is held until the batch is planned.
        """
        held = start.whole_prompt if len(start.whole_prompt) else start.cached_pages
        return self._pages.num_needed(held, start.num_new_pages)

    def _num_to_claim(self, start: SlotStart) -> int:
        """The same with its cartridge."""
        num_needed = self._num_needed(start)
        if start.sequence.request.cartridge is not None:
            num_needed += _num_unclaimed_pages(start.sequence)
        return num_needed

    def _take_start(
        self, start: SlotStart, num_needed: int, headroom: _Headroom, last_order: int
    ) -> _Offer:
        """Offers a place to a sequence, and to as many of its forks as there is room for.

        Args:
            start: of the sequence.
            num_needed: pages that it takes.
            headroom: to take them from.
            last_order: where sequences of other clients come next.
        """
        sequence, first = start.sequence, start.length
        end = min(first + headroom.num_tokens, len(sequence.prompt_ids))
        chunk = Chunk(sequence, first, end)
        headroom.take(end - first, num_needed, 1)
        candidate = Candidate(
            sequence=sequence,
            num_tokens=len(sequence.prompt_ids) - first,
            num_held_pages=start.num_pages - num_needed,
            num_forks=self._take_forks(chunk, headroom, last_order),
        )
        return _Offer(candidate, chunk, start)

    def _take_forks(self, chunk: Chunk, headroom: _Headroom, last_order: int) -> int:
        """How many samples could run from the chunk's last row on, before other clients' come."""
        num_followers = self._backlog.num_followers(chunk.sequence)
        if num_followers == 0 or not chunk.ends_prompt:
            return 0
        count = min(num_followers, headroom.num_sequences)
        if self._is_shared(chunk.sequence):
            count = self._backlog.num_followers_before(chunk.sequence, last_order, count)
        has_own_page = len(chunk.sequence.prompt_ids) % self._slots.page_size > 0
        if has_own_page:
            count = min(count, max(0, headroom.num_pages))
        headroom.take(0, count if has_own_page else 0, count)
        return count

    def _accept(self, offers: list[_Offer], overdue: Sequence | None) -> list[_Offer]:
        """Takes the sequences out of the queue that may run: the forecast has room, or they must.

        Args:
            offers: in order.
            overdue: one that must; None if there is none.
        """
        if not offers:
            return offers
        num_rows = self._admission.num_admissible([offer.candidate for offer in offers])
        if self._is_empty or offers[0].candidate.sequence is overdue:
            num_rows = max(num_rows, 1)
        if offers[-1].claims and num_rows == sum(each.candidate.num_rows for each in offers[:-1]):
            self._refuse_claim(offers[-1].candidate.sequence)
        accepted: list[_Offer] = []
        for offer in offers:
            if num_rows <= 0:
                break
            if offer.claims:
                self._claim(offer.candidate.sequence)
                break
            accepted.append(offer)
            if offer.start is not None:
                if self._backlog.pop() is not offer.candidate.sequence:
                    raise ProtocolError("the queue changed while its head was offered a place")
                self._pages.retain(offer.start.cached_pages)
                self._pages.retain(offer.start.whole_prompt)
                num_rows -= 1
            num_forks = min(num_rows, offer.candidate.num_forks)
            offer.chunk.followers = self._backlog.pop_followers(offer.chunk.sequence, num_forks)
            num_rows -= num_forks
            if offer.chunk.sequence.request.cartridge is not None:
                self._running.hold_cartridge(offer.chunk.sequence, len(offer.entering))
        return accepted

    def _refuse_claim(self, sequence: Sequence) -> None:
        """The forecast has room for all before this sequence, and none for its cartridge."""
        if self._steps_aside(sequence):
            self._backlog.park(sequence)
            self.may_find_more = True

    def _steps_aside(self, sequence: Sequence) -> bool:
        return sequence is not self._favoured and self._running.step_aside(sequence)

    def _claim(self, sequence: Sequence) -> None:
        """Keeps the pages of a cartridge for the head of the queue, which starts when it is there.

        Until then the queue behind it goes on.
        """
        self.may_find_more = True
        cartridge = sequence.request.cartridge
        is_there = cartridge is not None and cartridge.is_there
        self._running.set_aside(sequence)
        if not is_there:
            self._backlog.park(sequence)

    @property
    def _is_empty(self) -> bool:
        """No sequence holds a page that is not pinned: each that runs has some."""
        return self._pages.num_held == 0

    # --- the batch -------------------------------------------------------------------------------

    def _commit(
        self,
        decode_slots: IndexArray,
        chunks: list[Chunk],
        accepted: list[_Offer],
        now: float,
        begins_step: bool,
    ) -> ForwardBatch:
        running = self._running
        number = running.in_flight.next_number
        copies_before, copies_after = self._enter(accepted, now)
        if self._config.use_groups:
            groups = self._groups.find(decode_slots, _slots_of(chunks))
            if groups.chunks is not None:
                chunks = [chunks[index] for index in groups.chunks.order.tolist()]
        else:
            groups = Groups.none(decode_slots)
        drawing = draws(chunks)
        batch = forward_batch(
            number=number,
            left_slots=running.left_slots,
            entered=[sequence for offer in accepted for sequence in offer.entering],
            table_changes=running.table_changes.flush(),
            chunks=chunks,
            draws=drawing,
            copies_before=copies_before,
            copies_after=copies_after,
            groups=groups,
        )
        running.left_slots = []
        sampling_slots = groups.slots
        if drawing.slots.size:
            sampling_slots = np.concatenate([groups.slots, drawing.slots])
        running.in_flight.add(
            Flight(
                number, sampling_slots, prompt_pieces(chunks), pooled_prompts(chunks), begins_step
            )
        )
        if chunks:
            self._commit_chunks(chunks, drawing.slots, number)
        self._counters.num_batches += 1
        self._counters.num_decode_tokens += len(decode_slots)
        self._counters.num_prefill_tokens += len(batch.prefill_ids)
        return batch

    def _enter(self, accepted: list[_Offer], now: float) -> tuple[Int32Array, Int32Array]:
        """Gives slots and pages; returns the pages to copy before the pass, and those after it."""
        if not accepted:
            return NO_COPIES, NO_COPIES
        running = self._running
        starts = [offer.start for offer in accepted if offer.start is not None]
        copies_before = running.enter(starts, now) if starts else NO_COPIES
        copied = [start for start in starts if len(start.whole_prompt)]
        copies = [NO_COPIES]
        for offer in accepted:
            chunk = offer.chunk
            if chunk.followers:
                chunk.forks, of_forks = running.fork(chunk.sequence, chunk.followers, now)
                copies.append(of_forks)
        if copied:
            # A later batch may write to these pages: it runs after the copy.
            self._pages.release(
                (running.weights_version, start.sequence.prompt_ids, start.whole_prompt)
                for start in copied
            )
        entering = [sequence.slot for offer in accepted for sequence in offer.entering]
        self._admission.admit(np.array(entering, np.intp))
        return copies_before, np.concatenate(copies, axis=1)

    def _commit_chunks(self, chunks: list[Chunk], drawing: IndexArray, number: int) -> None:
        running, slots = self._running, self._slots
        fed = [chunk.sequence.slot for chunk in chunks]
        slots.length[fed] = [chunk.end for chunk in chunks]
        slots.last_batch[fed] = number
        slots.last_batch[drawing] = number
        # Only now: a page that this frees must not be given out in the batch that still writes to
        # it.
        running.publish([(chunk.sequence, chunk.forks) for chunk in chunks])
        if drawing.size:
            ended = [(chunk.sequence, chunk.forks) for chunk in chunks if chunk.ends_prompt]
            running.prompts_are_fed(ended, drawing)
        running.wake()


def _num_unclaimed_pages(sequence: Sequence) -> int:
    """Pages of its cartridge, if no sequence uses or claims that."""
    cartridge = sequence.request.cartridge
    return 0 if cartridge is None or cartridge.num_holders else cartridge.num_pages


def _claim_offer(start: SlotStart, num_needed: int) -> _Offer:
    """Asks for the room that a sequence takes with its cartridge, which nothing uses yet."""
    sequence = start.sequence
    candidate = Candidate(sequence, sequence.num_own_tokens, start.num_pages - num_needed, 0)
    return _Offer(candidate, Chunk(sequence, start.length, start.length), None, claims=True)


def _slots_of(chunks: list[Chunk]) -> IndexArray:
    if not chunks:
        return NO_SLOTS
    return np.array([chunk.sequence.slot for chunk in chunks], np.intp)
