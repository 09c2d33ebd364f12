"""Which sequences give way to others, and why.

Rules 1 to 3 of ``scheduler``: for the head of the queue, for a client below its share, and for the
sequences that decode.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.forecast.admission import AdmissionControl
from tokasaurus.manager.forecast.rows import Candidate, uncached_candidate
from tokasaurus.manager.kv.cartridges import Cartridge
from tokasaurus.manager.order import NO_ORDER, priority_of
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.slots import NO_SLOTS, IndexArray
from tokasaurus.manager.starts import Starts
from tokasaurus.manager.waiting import Backlog
from tokasaurus.rounding import ceil_div

__all__ = ["Preemption"]

_FORCED_INTERVAL = 8  # batches

_NUM_NEAR_HEAD = 32  # sequences of the queue that may be let in out of turn


class _Wanted(NamedTuple):
    """What the front of the queue needs, where it outranks running sequences."""

    num_sequences: int
    num_pages: int
    order: int  # of the head


class Preemption:
    """Takes the pages of running sequences for others.

    Args:
        config: the manager's slice.
        running: sequences in slots.
        backlog: sequences that wait.
        admission: the forecast, which forgets those that give way.
        counters: tell how long a sequence has waited.
        starts: tell what a sequence needs.
    """

    def __init__(
        self,
        config: ManagerConfig,
        running: RunningSequences,
        backlog: Backlog,
        admission: AdmissionControl,
        counters: Counters,
        starts: Starts,
    ) -> None:
        self._config = config
        self._running = running
        self._slots = running.slots
        self._pages = running.pages
        self._backlog = backlog
        self._admission = admission
        self._counters = counters
        self._starts = starts

    def preempt(self, slots: IndexArray) -> None:
        """Takes the pages of the sequences in these slots; they keep their place in the order."""
        if slots.size:
            self._admission.release(slots)
            self._running.preempt([self._slots.sequence(slot) for slot in slots.tolist()])

    def for_decoding(self, num_pages: int) -> None:
        """Lets one claim on a cartridge or some sequences go, for pages that others decode into.

        Args:
            num_pages: that are missing. There may be fewer after the call: then it is called again.
        """
        if not self._running.claims.drop_behind(int(self._slots.order.max())):
            self.preempt(self._victims(num_pages, self._oldest_order()))

    def without_need(self, number: int) -> None:
        """For tests: preempts another slot now and then; never the oldest, which must advance.

        Args:
            number: of the batch.
        """
        count, rest = divmod(number, _FORCED_INTERVAL)
        if rest != _FORCED_INTERVAL - 1:
            return
        order = self._slots.order
        running = (order >= 0).nonzero()[0]
        younger = running[order[running] > order[running].min(initial=NO_ORDER)]
        if younger.size:
            self.preempt(younger[[count % younger.size]])

    # --- for the head of the queue ---------------------------------------------------------------

    def for_head(self) -> Sequence | None:
        """Preempts until the head of the queue finds room, if less important sequences hold it.

        Returns:
            The head, if it goes before a running sequence; otherwise None.
        """
        wanted = self._wanted_by_head()
        if wanted is None:
            return None
        head = self._backlog.head()
        while (victims := self._in_the_way_of(wanted)).size:
            self.preempt(victims)
        return head

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
            num_pages += self._starts.num_needed(self._starts.of(candidate.sequence))
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
            candidates.append(uncached_candidate(sequence, self._backlog.num_followers(sequence)))
        return candidates

    def _in_the_way_of(self, wanted: _Wanted) -> IndexArray:
        """The slots to preempt next for the front of the queue; none if it finds what it needs."""
        slots = self._slots
        num_active = int(np.count_nonzero(slots.length < slots.final_length))
        num_missing = wanted.num_pages - self._pages.num_available
        num_entering = min(wanted.num_sequences, slots.num_free)
        has_seats = num_active + num_entering <= self._config.max_running
        if has_seats and num_missing <= 0:
            return NO_SLOTS
        if priority_of(int(slots.order.max())) <= priority_of(wanted.order):
            return NO_SLOTS
        return self._victims(max(1, num_missing), wanted.order)

    def _oldest_order(self) -> int:
        """The order of the sequence that runs, or has a claim, and goes before all others."""
        oldest = int(self._slots.order[self._slots.order >= 0].min())
        return min(oldest, self._running.claims.first_order())

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

    # --- for a client below its share ------------------------------------------------------------

    def for_overdue(self) -> Sequence | None:
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
        if head is None or not self._backlog.is_shared(head) or not self._slots.num_free:
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
        slots, start = self._slots, self._starts.of(sequence)
        num_later = ceil_div(sequence.final_length, slots.page_size) - start.num_pages
        num_missing = self._starts.num_to_claim(start) + num_later - self._pages.num_available
        num_freed = np.cumsum(self._running.unshared(rows)[0])
        if num_missing > num_freed[-1]:
            return None
        num_active = int(np.count_nonzero(slots.length < slots.final_length))
        num_victims = int(num_active >= self._config.max_running)
        if num_missing > 0:
            num_victims = max(num_victims, int(np.searchsorted(num_freed, num_missing)) + 1)
        return num_victims

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
