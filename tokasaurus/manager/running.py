"""The running sequences: how one enters a slot, how one leaves it.

The one place that joins slot table, token window, pages, backlog and batches in flight, so that
finishing, preempting and aborting are the same few moves. Decides nothing.

    enter ──▶ running ──▶ retire: pages back, not planned ──▶ depart: slot free, if preempted queued
                          (finished, aborted or preempted)    (its last batch was absorbed)

All moves take many sequences at once: Python runs per sequence only where its objects are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.errors import ProtocolError
from tokasaurus.manager.claims import Claims
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.in_flight import InFlight
from tokasaurus.manager.kv.allocator import PageAllocator
from tokasaurus.manager.kv.cartridges import Cartridges
from tokasaurus.manager.kv.prompts_in_progress import PromptsInProgress
from tokasaurus.manager.kv.shared_prefixes import SharedPrefixes
from tokasaurus.manager.kv.table_changes import TableChanges
from tokasaurus.manager.sequence import Sequence, SequenceState
from tokasaurus.manager.slots import IndexArray, SlotTable
from tokasaurus.manager.stages import Stages
from tokasaurus.manager.token_window import TokenWindow
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array, Int64Array
from tokasaurus.rounding import ceil_div

__all__ = ["NO_COPIES", "RunningSequences", "SlotStart"]

NO_COPIES: Int32Array = np.empty((2, 0), np.int32)


class SlotStart(NamedTuple):
    """The pages with which a sequence starts in a slot: those of its whole prompt."""

    sequence: Sequence
    cached_pages: Int32Array  # its prompt's leading pages, found in the prefix cache
    num_pages: int  # of its prompt
    num_new_pages: int
    # Positions of its prompt that are not computed: those of the cached pages, and what is copied
    # of the page behind them: the end of its cartridge, or all but the last token of the prompt.
    length: int
    # All pages of the prompt, if the last one is cached, too. That one is copied, since the last
    # token is computed in any case.
    whole_prompt: Int32Array = EMPTY_INT32

    @property
    def num_found_pages(self) -> int:
        """Leading pages of its prompt that are in the prefix cache."""
        return len(self.whole_prompt) or len(self.cached_pages)


class RunningSequences:
    """Everything that belongs to sequences in slots.

    Attributes:
        weights_version: of the weights that compute the batches to come. It is the namespace of
            what enters a slot.

    Args:
        config: the manager's slice.
        backlog: where preempted sequences return to.
        counters: to count in.
    """

    def __init__(self, config: ManagerConfig, backlog: Backlog, counters: Counters) -> None:
        longest = min(config.max_request_tokens, config.num_pages * config.page_size)
        max_pages = max(1, ceil_div(longest, config.page_size))
        self.slots = SlotTable(config.num_slots, max_pages, config.page_size)
        self.window = TokenWindow(self.slots, config.max_in_flight)
        self.weights_version = 0
        self.pages = PageAllocator(config.num_pages, config.page_size, self.weights_version)
        self.cartridges = Cartridges(self.pages)
        self.claims = Claims(self.cartridges, config.share_wait_s)
        self.table_changes = TableChanges(self.slots)
        # Of prompts, as far as they were found in the cache or fed.
        self.prefixes = SharedPrefixes(config.num_slots)
        self.in_flight = InFlight()
        self.stages = Stages()
        self.prefilling: list[Sequence] = []  # in order
        # The prompts of these, and of candidates.
        self.in_progress = PromptsInProgress(config.page_size)
        self.preempted: list[Sequence] = []  # their last batches are in flight
        # With tokens and without a slot: preempted, or begun elsewhere.
        self.resting: dict[Sequence, None] = {}
        # Slots that sequences with adjustments left; the worker does not know it yet.
        self.left_slots: list[int] = []
        self.stop_lag = config.stop_lag
        self._backlog = backlog
        self._counters = counters

    @property
    def is_empty(self) -> bool:
        """No sequence holds a page that is not pinned: each that runs has some."""
        return self.pages.num_held == 0

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return int(np.count_nonzero(self.slots.order >= 0))

    @property
    def num_begun(self) -> int:
        """Sequences that have begun and not ended, whether they run now or were preempted."""
        return self.num_running + len(self.preempted) + len(self.resting)

    def num_unfed_tokens(self) -> int:
        """Tokens of the prompts being fed that are in no batch yet."""
        return sum(
            len(sequence.prompt_ids) - self.slots.length.item(sequence.slot)
            for sequence in self.prefilling
        )

    def unshared(self, slots: IndexArray) -> tuple[Int64Array, Int64Array]:
        """[slots] pages with no other holder, and the positions that are filled in them."""
        page_size = self.slots.page_size
        num_pinned = self.slots.num_pseudo[slots] // page_size
        num_shared = np.maximum(self.prefixes.num_shared_pages(slots), num_pinned, dtype=np.int64)
        num_pages = self.slots.capacity[slots] // page_size - num_shared
        return num_pages, self.slots.length[slots] - num_shared * page_size

    def may_feed(self, sequence: Sequence, num_cached_pages: int) -> bool:
        """Whether no sequence before this one is computing the page that its prompt needs next."""
        if sequence.whole_prompt_due:  # it computes every page in any case
            return True
        return self.in_progress.enter(self.weights_version, sequence, num_cached_pages)

    def wake(self) -> None:
        """Lets sequences go on that waited for pages of others, or for a cartridge."""
        for woken in (self.in_progress.woken, self.claims.woken):
            for sequence in woken:
                self._backlog.wake(sequence)
            woken.clear()

    def set_aside(self, sequence: Sequence) -> None:
        """A sequence of the queue waits for its cartridge, for which pages are available.

        The caller parks it.
        """
        cartridge = sequence.request.cartridge
        if cartridge is None:
            raise ProtocolError(f"{sequence.name} has no cartridge to wait for")
        self.claims.add(sequence, cartridge)
        self.in_progress.leave(sequence)

    def step_aside(self, sequence: Sequence) -> bool:
        """There is no room for the cartridge of a sequence of the queue.

        Returns:
            Whether it gives way to those behind it for now: then the caller parks it.
        """
        cartridge = sequence.request.cartridge
        if cartridge is None:
            return False
        if not self.claims.step_aside(sequence, cartridge, self._counters.device_s):
            return False
        self.in_progress.leave(sequence)
        return True

    def recall(self) -> None:
        """Lets sequences back into the queue that gave way because of their cartridges."""
        self.claims.recall()
        self.wake()

    def hold_cartridge(self, leader: Sequence, count: int) -> None:
        """This number of samples of a request is about to enter slots, perhaps with its leader."""
        cartridge = leader.request.cartridge
        if cartridge is not None and count:
            self.cartridges.hold(cartridge, count)
            self.claims.leave(leader)

    def leave_queue(self, sequence: Sequence) -> None:
        """A sequence without a slot has ended, or must wait for the end of a drain."""
        self.in_progress.leave(sequence)
        if sequence.request.cartridge is not None:
            self.claims.leave(sequence)

    def enter(self, starts: Rows[SlotStart], now: float) -> Int32Array:
        """Lets sequences run: each gets a slot and all pages of its prompt.

        The cached pages are retained already.

        Returns:
            [2, copies] the pages to copy from and to, before the pass.
        """
        sequences = [start.sequence for start in starts]
        cached_pages = [start.cached_pages for start in starts]
        lengths = [start.length for start in starts]
        num_new_pages = [start.num_new_pages for start in starts]
        self._enter(sequences, cached_pages, num_new_pages, lengths, lengths, now)
        for sequence, pages in zip(sequences, cached_pages, strict=True):
            if len(pages):
                self.prefixes.enter([sequence.slot], pages)
            self.resting.pop(sequence, None)
        self.prefilling += sequences
        self.prefilling.sort(key=lambda sequence: sequence.order)
        page_size = self.pages.page_size
        return self._tail_copies([start for start in starts if start.length % page_size])

    def _tail_copies(self, starts: Rows[SlotStart]) -> Int32Array:
        """[2, copies] to the pages in which these prompts go on.

        They are copied from the last pages of cartridges, or of the same prompts in the cache.

        Args:
            starts: of sequences that begin inside a page.
        """
        if not starts:
            return NO_COPIES
        sources = [
            (start.whole_prompt if len(start.whole_prompt) else _pages_of_cartridge(start))[-1]
            for start in starts
        ]
        rows = [start.sequence.slot for start in starts]
        columns = [len(start.cached_pages) for start in starts]
        return np.stack([np.array(sources, np.int32), self.slots.page_table[rows, columns]])

    def fork(
        self, leader: Sequence, followers: Rows[Sequence], now: float
    ) -> tuple[IndexArray, Int32Array]:
        """Lets samples run from the end of the prompt that their leader feeds in the planned batch.

        They share its full pages. If the last page is not full, each gets a copy of it after the
        pass.

        Returns:
            Their slots, and [2, copies]: the pages to copy from and to.
        """
        slots = self.slots
        length = len(leader.prompt_ids)
        num_shared, rest = divmod(length, slots.page_size)
        shared = slots.pages(leader.slot)[:num_shared]
        count = len(followers)
        self.pages.retain(shared, count)
        num_new = 1 if rest else 0
        num_found = num_shared * slots.page_size
        rows = self._enter(
            followers,
            [shared] * count,
            [num_new] * count,
            [num_found] * count,
            [length] * count,
            now,
        )
        targets = slots.page_table[rows, num_shared] if rest else EMPTY_INT32
        sources = np.full_like(targets, slots.pages(leader.slot)[-1])
        return rows, np.stack([sources, targets])

    def _enter(
        self,
        sequences: Rows[Sequence],
        shared_pages: Rows[Int32Array],
        num_new_pages: Rows[int],
        num_found: Rows[int],
        lengths: Rows[int],
        now: float,
    ) -> IndexArray:
        """Gives slots and pages.

        Args:
            sequences: that begin to run.
            shared_pages: the first pages of each.
            num_new_pages: that each gets behind these.
            num_found: positions of each prompt that others have computed.
            lengths: positions that are filled before its first batch.
            now: the time.

        Returns:
            The slots.
        """
        slots, page_size = self.slots, self.pages.page_size
        num_shared = [len(pages) for pages in shared_pages]
        num_pages = [shared + new for shared, new in zip(num_shared, num_new_pages, strict=True)]
        for sequence, found in zip(sequences, num_found, strict=True):
            request = sequence.request
            self._counters.num_cached_tokens += max(0, found - request.num_pseudo)
            if not sequence.was_admitted:
                sequence.was_admitted = True
                waited_s = now - request.arrived_at
                self._counters.queue_s += waited_s
                self.stages.admitted(sequence, waited_s, found)
                # Reported in full pages, and as if the prompt had come alone: its last token is
                # never found.
                most = min(found, len(request.prompt_ids) - 1) // page_size * page_size
                sequence.num_cached_tokens = max(0, most - request.num_pseudo)
        self.window.prepare(max(s.request.message.num_logprobs for s in sequences))
        rows = slots.enter(sequences, lengths, num_pages, self.weights_version)
        table, new_pages, taken = slots.page_table, self.pages.allocate(sum(num_new_pages)), 0
        for row, shared, count in zip(rows.tolist(), shared_pages, num_pages, strict=True):
            first = len(shared)
            if first:
                table[row, :first] = shared
            num_own = count - first
            table[row, first:count] = new_pages[taken : taken + num_own]
            taken += num_own
        counts = np.array(num_pages)
        owners = rows.repeat(counts)
        columns = np.arange(len(owners)) - (counts.cumsum() - counts).repeat(counts)
        self.table_changes.add(owners, columns)
        return rows

    def rest(self, sequences: Iterable[Sequence]) -> None:
        """Remembers those of these sequences, which have no slot, that have tokens."""
        self.resting.update((sequence, None) for sequence in sequences if sequence.num_stored)

    def publish(self, prompts: Rows[tuple[Sequence, IndexArray]]) -> None:
        """Makes the full pages of prompts findable, as far as batches that fill them were sent.

        Pages that turn out to be duplicates are given back; the slot's table names the cached ones
        from the next batch on. That is safe: the slot never writes to a full page again, and its
        batches in flight run before any batch of a sequence that gets the duplicates.

        Args:
            prompts: sequences, and the slots of the forks that share all these pages with each.
        """
        slots = self.slots
        rows = np.array([sequence.slot for sequence, _ in prompts], np.intp)
        counts = slots.length[rows] // slots.page_size
        num_published = slots.published[rows]
        slots.published[rows] = counts
        is_whole = slots.length[rows] >= slots.prompt_end[rows]
        for (sequence, forks), namespace, count, num_before, is_fed in zip(
            prompts,
            slots.weights_version[rows].tolist(),
            counts.tolist(),
            num_published.tolist(),
            is_whole.tolist(),
            strict=True,
        ):
            if count == num_before:
                continue
            pages = slots.page_table[sequence.slot, :count]
            ids = sequence.prompt_ids[: count * slots.page_size]
            shared = self.pages.publish(namespace, ids, pages, num_before, 1 + len(forks))
            if shared is not None:
                columns = (shared != pages).nonzero()[0]
                for row in [sequence.slot, *forks.tolist()]:
                    slots.page_table[row, columns] = shared[columns]
                    self.table_changes.patch(slots.sequence(row), columns)
            if not is_fed:
                self.in_progress.advance(namespace, sequence, count)

    def prompts_are_fed(self, prompts: Rows[tuple[Sequence, IndexArray]], rows: IndexArray) -> None:
        """The last chunks of these prompts were sent: their sequences decode from now on.

        Args:
            prompts: sequences, and the slots of the forks of each.
            rows: the slots of all of these.
        """
        self.slots.update_decode_limits(rows, self.stop_lag)
        fed = {sequence for sequence, _ in prompts}
        self.prefilling = [sequence for sequence in self.prefilling if sequence not in fed]
        # So far they shared the pages that they had found in the cache.
        self.prefixes.leave(np.array([sequence.slot for sequence, _ in prompts], np.intp))
        for sequence, forks in prompts:
            num_full = len(sequence.prompt_ids) // self.slots.page_size
            pages = self.slots.page_table[sequence.slot, :num_full]
            self.prefixes.enter([sequence.slot, *forks.tolist()], pages)
            self.in_progress.leave(sequence)
            self._backlog.prompt_is_fed(sequence)

    def acknowledge(self, slots: IndexArray, num_tokens: Int32Array) -> None:
        """The server has searched this number of tokens of the sequence in each of these slots."""
        np.maximum.at(self.slots.acked, slots, num_tokens)
        running = slots[self.slots.order[slots] >= 0]
        self.slots.update_decode_limits(running, self.stop_lag)

    def preempt(self, sequences: Rows[Sequence]) -> None:
        """Takes the pages of sequences; they keep their tokens, those in flight included."""
        for sequence in sequences:
            sequence.state = SequenceState.PREEMPTED
            # Otherwise all its tokens are in flight, and it only ends.
            slot = sequence.slot
            sequence.resumes = bool(self.slots.length[slot] < self.slots.final_length[slot])
            self._counters.num_preemptions += sequence.resumes
            if sequence.resumes:
                self.stages.preempted(sequence)
        self.preempted += sequences
        self.depart(self.retire(sequences))

    def retire(self, sequences: Rows[Sequence]) -> list[int]:
        """Gives back the pages of sequences that do not run any more; known full pages stay cached.

        Returns:
            The slots without a row in any batch in flight: they may depart. The others depart with
            the result of their last batch.
        """
        slots, page_size = self.slots, self.slots.page_size
        rows = np.array([sequence.slot for sequence in sequences], np.intp)
        num_known = (slots.num_known_pages(rows) * page_size).tolist()
        num_pages = (slots.capacity[rows] // page_size).tolist()
        namespaces = slots.weights_version[rows].tolist()
        ids, counts = self.window.unstored_ids(rows)
        ends = np.cumsum(counts).tolist()
        holders: list[tuple[int, Int32Array, Int32Array]] = []
        start = 0
        for index, sequence in enumerate(sequences):
            prompt_ids, count = sequence.request.prompt_ids, num_known[index]
            if count <= len(prompt_ids):
                known_ids = prompt_ids[:count]
            else:
                known_ids = _all_ids(sequence, ids[start : ends[index]])[:count]
            pages = slots.page_table[sequence.slot, : num_pages[index]]
            holders.append((namespaces[index], known_ids, pages))
            start = ends[index]
        self.prefixes.leave(rows)
        self.pages.release(holders)
        for sequence in sequences:
            if sequence.request.cartridge is not None:
                self.cartridges.release(sequence.request.cartridge)
        is_prefilling = slots.length[rows] < slots.prompt_end[rows]
        for index in is_prefilling.nonzero()[0].tolist():
            self.prefilling.remove(sequences[index])
            self.in_progress.leave(sequences[index])
        self.wake()
        slots.stop_planning(rows)
        departing: list[int] = []
        for slot, last_batch in zip(rows.tolist(), slots.last_batch[rows].tolist(), strict=True):
            if self.in_flight.names(last_batch):
                self.in_flight.depart_after(last_batch, slot)
            else:
                departing.append(slot)
        return departing

    def depart(self, slots: Rows[int]) -> None:
        """Frees slots after their last batches, when their tokens are in messages to the server."""
        if not slots:
            return
        owners = [self.slots.sequence(slot) for slot in slots]
        resumed = [owner for owner in owners if owner.state is SequenceState.PREEMPTED]
        if resumed:
            self.window.store([sequence.slot for sequence in resumed])
        for sequence in resumed:
            self.preempted.remove(sequence)
            sequence.prompt_ids = _all_ids(sequence, EMPTY_INT32)
        self.left_slots += [
            owner.slot for owner in owners if owner.request.message.sampling.adjustments is not None
        ]
        self.slots.leave(slots)
        for sequence in resumed:
            self.resting[sequence] = None
            self._backlog.resume(sequence)

    def all_ids(self, sequence: Sequence) -> Int32Array:
        """All known ids of a sequence in a slot: its request's prompt, then the generated ones."""
        ids, _ = self.window.unstored_ids(np.array([sequence.slot]))
        return _all_ids(sequence, ids)


def _pages_of_cartridge(start: SlotStart) -> Int32Array:
    cartridge = start.sequence.request.cartridge
    return EMPTY_INT32 if cartridge is None else cartridge.pages


def _all_ids(sequence: Sequence, unstored_ids: Int32Array) -> Int32Array:
    if not sequence.stored and not len(unstored_ids):
        return sequence.request.prompt_ids
    stored = [piece.ids for piece in sequence.stored]
    return np.concatenate([sequence.request.prompt_ids, *stored, unstored_ids])
