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

from typing import NamedTuple

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.batches import (
    Chunk,
    draws,
    forward_batch,
    pooled_prompts,
    prompt_pieces,
)
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.entrance import Entrance, Offer
from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.rows import Candidate, uncached_candidate
from tokasaurus.manager.in_flight import Flight
from tokasaurus.manager.kv.prefix_groups import GroupFinder, Groups
from tokasaurus.manager.lanes import Lanes
from tokasaurus.manager.preemption import Preemption
from tokasaurus.manager.prompt_budget import PromptBudget
from tokasaurus.manager.running import NO_COPIES, RunningSequences
from tokasaurus.manager.slots import NO_SLOTS, IndexArray
from tokasaurus.manager.starts import Starts
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.arrays import BoolArray, Int32Array
from tokasaurus.protocol.messages import ForwardBatch

__all__ = ["Scheduler"]


class _DecodePlan(NamedTuple):
    """The running sequences that decode."""

    is_decoding: BoolArray  # [slots]
    crossing: IndexArray  # slots that enter a new page
    num_missing: int  # pages; 0 or less where there are enough


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
            running.prefixes,
            config.page_size,
            config.min_group_size,
            config.min_prefix_len,
            config.num_lanes,
        )
        self._lanes = Lanes(config.num_lanes, running.slots) if config.num_lanes > 1 else None
        self._prompt_budget = PromptBudget(config, running, backlog, admission)
        self._max_running = config.max_running
        starts = Starts(running)
        self._preemption = Preemption(config, running, backlog, admission, counters, starts)
        self._entrance = Entrance(config.max_running, running, backlog, admission, starts)

    def plan(self, now: float) -> ForwardBatch | None:
        """Plans the next batch and counts it as sent; None if there is nothing to run."""
        self._backlog.review_places()
        self._entrance.begin(self._preemption.for_head(), self._preemption.for_overdue())
        decode_slots, is_decoding = self._decode()
        chunks, accepted = self._feed(is_decoding, len(decode_slots))
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
            self._preemption.without_need(batch.number)
        return batch

    def recall(self) -> None:
        """Lets sequences back into the queue for whose cartridges there may be room now.

        It is called once before the plans of a turn: those that these plans refuse stay aside.
        """
        claims = self._running.claims
        if claims.is_any_aside and (
            self._running.is_empty or claims.recall_is_due(self._counters.device_s)
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

    @property
    def may_find_more(self) -> bool:
        """Whether the last plan has taken a sequence out of the way because of its cartridge."""
        return self._entrance.may_find_more

    def preempt(self, slots: IndexArray) -> None:
        """Takes the pages of the sequences in these slots; they keep their place in the order."""
        self._preemption.preempt(slots)

    # --- decode ----------------------------------------------------------------------------------

    def _decode(self, *, at_once: bool = False) -> tuple[IndexArray, BoolArray]:
        """The slots that decode, and the same as a column over slots; their pages are given out.

        Args:
            at_once: see ``Lanes.due``.
        """
        decode = self._plan_decode(at_once)
        while decode.num_missing > 0:
            self._preemption.for_decoding(decode.num_missing)
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

    def _feed(self, is_decoding: BoolArray, num_decoding: int) -> tuple[list[Chunk], list[Offer]]:
        """The chunks of the batch, and the sequences that enter, among them those of chunks."""
        self._refresh_forecast(num_decoding)
        num_all = num_decoding if self._lanes is None else self._lanes.num_decoding
        budget = self._prompt_budget.tokens(num_decoding, keeps_pace=num_all > 0)
        chunks = self._plan_chunks(budget)
        budget -= sum(chunk.length for chunk in chunks)
        accepted = self._entrance.let_in(chunks, budget, is_decoding)
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
            front.append(uncached_candidate(sequence, self._backlog.num_followers(sequence)))
            num_sequences += front[-1].num_rows
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

    # --- the batch -------------------------------------------------------------------------------

    def _commit(
        self,
        decode_slots: IndexArray,
        chunks: list[Chunk],
        accepted: list[Offer],
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
        self._count_limit(len(decode_slots) + len(batch.prefill_ids))
        return batch

    def _count_limit(self, num_tokens: int) -> None:
        """Counts what kept more sequences from running in a batch with this number of tokens."""
        num_running = self._running.num_running
        if num_tokens >= self._config.max_tokens_per_forward:
            self._counters.num_full_batches += 1
        elif self._backlog.num_sequences <= num_running:
            pass  # none waits
        elif num_running >= self._max_running:
            self._counters.num_seat_bound_batches += 1
        else:
            self._counters.num_page_bound_batches += 1

    def _enter(self, accepted: list[Offer], now: float) -> tuple[Int32Array, Int32Array]:
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


def _slots_of(chunks: list[Chunk]) -> IndexArray:
    if not chunks:
        return NO_SLOTS
    return np.array([chunk.sequence.slot for chunk in chunks], np.intp)
