"""Who may enter a batch: forks of prompts, and sequences of the queue.

Rule 5 of ``scheduler``. Candidates for which there is room now are offered a place, and those enter
for which the forecast has room, too, or that must run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tokasaurus.errors import ProtocolError
from tokasaurus.manager.batches import Chunk
from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.rows import Candidate
from tokasaurus.manager.order import NO_ORDER
from tokasaurus.manager.running import RunningSequences, SlotStart
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.starts import Starts
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.arrays import BoolArray

__all__ = ["Entrance", "Offer"]

_MAX_PARKED = 256  # in one plan, so that none takes long


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


class Offer(NamedTuple):
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
    """What the front of the queue may do now."""

    offers: list[Offer]  # in the order in which they may run
    # For pages that another prompt is computing, or for cartridges that are being written.
    waiting: list[Sequence]


class Entrance:
    """Lets sequences into batches.

    Attributes:
        may_find_more: whether the last plan has taken a sequence out of the way because of its
            cartridge: the next plan may find more to run.

    Args:
        max_running: sequences that may run at once.
        running: sequences in slots.
        backlog: sequences that wait.
        admission: the forecast.
        starts: tell what a sequence needs.
    """

    def __init__(
        self,
        max_running: int,
        running: RunningSequences,
        backlog: Backlog,
        admission: AdmissionControl,
        starts: Starts,
    ) -> None:
        self._max_running = max_running
        self._running = running
        self._slots = running.slots
        self._pages = running.pages
        self._backlog = backlog
        self._admission = admission
        self._starts = starts
        self.may_find_more = False
        self._favoured: Sequence | None = None
        self._overdue: Sequence | None = None

    def begin(self, head: Sequence | None, overdue: Sequence | None) -> None:
        """A plan begins.

        Args:
            head: the head of the queue, if more important than running sequences.
            overdue: the sequence that others gave way to, whatever the forecast says.
        """
        self.may_find_more = False
        self._favoured = head if overdue is None else overdue
        self._overdue = overdue

    def let_in(self, chunks: list[Chunk], budget: int, is_decoding: BoolArray) -> list[Offer]:
        """Takes those out of the queue that enter the batch.

        Args:
            chunks: of prompts that the batch feeds already.
            budget: tokens of prompts that it may feed besides.
            is_decoding: by slot.

        Returns:
            The offers that were accepted, with the forks that enter.
        """
        offers, waiting = self._find(chunks, budget, is_decoding)
        for sequence in waiting:
            self._backlog.park(sequence)
        return self._accept(offers)

    def _find(self, chunks: list[Chunk], budget: int, is_decoding: BoolArray) -> _Offers:
        """Candidates for which there is room now: forks of these prompts, then the queue."""
        if not (chunks or len(self._backlog)):
            return _Offers([], [])
        head = self._backlog.head()
        if not (
            self._running.is_empty or self._overdue is not None or self._admission.may_ask(head)
        ):
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
    ) -> list[Offer]:
        """Samples that could fork from these prompts, and go before ``first_order``."""
        offers: list[Offer] = []
        for chunk in chunks:
            if self._backlog.next_follower_order(chunk.sequence) < first_order:
                num_forks = self._take_forks(chunk, headroom, first_order)
                if num_forks:
                    offers.append(Offer(Candidate(chunk.sequence, 0, 0, num_forks), chunk, None))
        return offers

    def _queue_offers(self, headroom: _Headroom, first_order: int) -> _Offers:
        """The first of the queue, as long as they fit and do not come after ``first_order``."""
        offers: list[Offer] = []
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
            start = self._starts.of(sequence)
            num_needed = self._starts.num_to_claim(start)
            if num_needed > headroom.num_pages:
                num_needed = self._make_room(start, headroom)
            if num_needed > headroom.num_pages:
                is_cartridge_too_large = self._starts.num_needed(start) <= headroom.num_pages
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
        num_needed = self._starts.num_to_claim(start)
        while num_needed > headroom.num_pages:
            num_available = self._pages.num_available
            if not self._running.claims.drop_behind(start.sequence.order):
                break
            headroom.num_pages += self._pages.num_available - num_available
            num_needed = self._starts.num_to_claim(start)
        return num_needed

    def _take_start(
        self, start: SlotStart, num_needed: int, headroom: _Headroom, last_order: int
    ) -> Offer:
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
        return Offer(candidate, chunk, start)

    def _take_forks(self, chunk: Chunk, headroom: _Headroom, last_order: int) -> int:
        """How many samples could run from the chunk's last row on, before other clients' come."""
        num_followers = self._backlog.num_followers(chunk.sequence)
        if num_followers == 0 or not chunk.ends_prompt:
            return 0
        count = min(num_followers, headroom.num_sequences)
        if self._backlog.is_shared(chunk.sequence):
            count = self._backlog.num_followers_before(chunk.sequence, last_order, count)
        has_own_page = len(chunk.sequence.prompt_ids) % self._slots.page_size > 0
        if has_own_page:
            count = min(count, max(0, headroom.num_pages))
        headroom.take(0, count if has_own_page else 0, count)
        return count

    def _accept(self, offers: list[Offer]) -> list[Offer]:
        """Takes the sequences out of the queue that may run: the forecast has room, or they must.

        Args:
            offers: in order.
        """
        if not offers:
            return offers
        num_rows = self._admission.num_admissible([offer.candidate for offer in offers])
        if self._running.is_empty or offers[0].candidate.sequence is self._overdue:
            num_rows = max(num_rows, 1)
        if offers[-1].claims and num_rows == sum(each.candidate.num_rows for each in offers[:-1]):
            self._refuse_claim(offers[-1].candidate.sequence)
        accepted: list[Offer] = []
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


def _claim_offer(start: SlotStart, num_needed: int) -> Offer:
    """Asks for the room that a sequence takes with its cartridge, which nothing uses yet."""
    sequence = start.sequence
    candidate = Candidate(sequence, sequence.num_own_tokens, start.num_pages - num_needed, 0)
    return Offer(candidate, Chunk(sequence, start.length, start.length), None, claims=True)
