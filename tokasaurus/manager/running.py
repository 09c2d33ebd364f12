"""The running sequences: how one enters a slot, how one leaves it.

The one place that joins slot table, token window, pages, backlog and batches in flight for this, so that
finishing, preempting and aborting are the same few moves. Decides nothing.

    enter ──▶ running ──▶ retire: pages back, planned no more ──▶ depart: slot free, if preempted requeue
                          (finished, aborted or preempted)        (its last batch was absorbed)
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np

from tokasaurus.config.slices import ManagerConfig
from tokasaurus.manager.allocator import PageAllocator
from tokasaurus.manager.counters import Counters
from tokasaurus.manager.in_flight import InFlight
from tokasaurus.manager.sequence import Sequence, SequenceState
from tokasaurus.manager.slots import IndexArray, SlotTable
from tokasaurus.manager.table_changes import TableChanges
from tokasaurus.manager.token_window import TokenWindow
from tokasaurus.manager.waiting import Backlog
from tokasaurus.protocol.arrays import Int32Array

__all__ = ["Admission", "RunningSequences"]


@dataclass(frozen=True, eq=False, slots=True)
class Admission:
    """The decision to let the head of the queue run."""

    sequence: Sequence
    cached_pages: Int32Array  # its prompt's leading pages, found in the prefix cache
    num_new_pages: int
    num_reserved_pages: int  # that it may need soon after


class RunningSequences:
    """Everything that belongs to sequences in slots.

    Args:
        config: the manager's slice.
        backlog: where preempted sequences return to.
        counters: to count in.
    """

    def __init__(self, config: ManagerConfig, backlog: Backlog, counters: Counters) -> None:
        longest = min(config.max_request_tokens, config.num_pages * config.page_size)
        max_pages = max(1, -(-longest // config.page_size))
        self.slots = SlotTable(config.num_slots, max_pages, config.page_size)
        self.window = TokenWindow(self.slots, config.scheduling_steps_ahead)
        self.pages = PageAllocator(config.num_pages, config.page_size)
        self.table_changes = TableChanges(self.slots)
        self.in_flight = InFlight()
        self.prefilling: list[Sequence] = []  # oldest first
        self.preempted: list[Sequence] = []  # whose last batch is in flight
        self.stop_lag = config.stop_lag
        self._backlog = backlog
        self._counters = counters

    def enter(self, admission: Admission, now: float) -> None:
        """Lets a sequence run: a slot, all pages of its prompt."""
        sequence = admission.sequence
        num_cached = len(admission.cached_pages)
        num_cached_tokens = num_cached * self.pages.page_size
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached_tokens = num_cached_tokens
            self._counters.queue_s += now - sequence.request.arrived_at
        self._counters.num_cached_tokens += num_cached_tokens
        pages = self.pages.acquire(admission.cached_pages, admission.num_new_pages)
        self.window.prepare(sequence.request.message.num_logprobs)
        self.slots.enter(sequence, pages, num_cached)
        self.table_changes.add(
            np.full(len(pages), sequence.slot), np.arange(len(pages), dtype=np.intp)
        )
        bisect.insort(self.prefilling, sequence, key=lambda other: other.order)

    def prompts_are_fed(self, sequences: Rows[Sequence]) -> None:
        """The last chunks of these prompts were sent: they decode, and their followers find the prompt."""
        slots = np.array([sequence.slot for sequence in sequences], np.intp)
        self.slots.update_decode_limits(slots, self.stop_lag)
        for sequence in sequences:
            self.prefilling.remove(sequence)
            self._backlog.prompt_is_findable(sequence)

    def acknowledge(self, slots: IndexArray, num_tokens: Int32Array) -> None:
        """The server has searched so many tokens of the sequences in these slots."""
        np.maximum.at(self.slots.acked, slots, num_tokens)
        running = slots[self.slots.order[slots] >= 0]
        self.slots.update_decode_limits(running, self.stop_lag)

    def publish(self, sequence: Sequence) -> None:
        """Makes the full pages of a prompt findable, as far as batches that fill them were sent.

        Pages that turn out to be duplicates are given back; the slot's table then names the cached ones,
        from the next batch on. That is safe: the slot never writes to a full page again, and its batches
        in flight run before anything that gets the duplicates.
        """
        slots, slot = self.slots, sequence.slot
        count = slots.num_known_pages(slot)
        if count <= slots.published[slot]:
            return
        pages = slots.pages(slot)[:count]
        shared = self.pages.publish(sequence.prompt_ids[: count * slots.page_size], pages)
        columns = np.flatnonzero(shared != pages)
        if columns.size:
            pages[columns] = shared[columns]
            self.table_changes.patch(sequence, columns)
        slots.published[slot] = count

    def preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's pages; it keeps its tokens, those still in flight included."""
        slot = sequence.slot
        sequence.state = SequenceState.PREEMPTED
        if self.slots.length[slot] < self.slots.final_length[slot]:
            self._counters.num_preemptions += 1  # else all its tokens are in flight: it only ends
        self.preempted.append(sequence)
        if not self._retire(sequence):
            self.depart(slot)

    def end(self, sequence: Sequence) -> int | None:
        """The sequence has its answer.

        Returns:
            Its slot if no batch in flight names it; else it departs by itself.
        """
        self.slots.stop_absorbing(sequence.slot)
        if sequence.state is SequenceState.PREEMPTED:
            self.preempted.remove(sequence)
            return None
        return None if self._retire(sequence) else sequence.slot

    def depart(self, slot: int) -> None:
        """The slot's last batch was absorbed, and its tokens are on their way to the server."""
        sequence = self.slots.sequence(slot)
        if sequence.state is SequenceState.PREEMPTED:
            self.preempted.remove(sequence)
            self.window.store(sequence)
            sequence.prompt_ids = self.window.all_ids(sequence)
            self.slots.leave(slot)
            self._backlog.resume(sequence)
        else:
            self.slots.leave(slot)

    def _retire(self, sequence: Sequence) -> bool:
        """Gives the pages back, the known ones to the prefix cache. True if the slot departs later."""
        slots, slot = self.slots, sequence.slot
        num_known = slots.num_known_pages(slot) * slots.page_size
        self.pages.release(self.window.all_ids(sequence)[:num_known], slots.pages(slot))
        if slots.length[slot] < slots.prompt_end[slot]:
            self.prefilling.remove(sequence)
        slots.stop_planning(slot)
        last_batch = int(slots.last_batch[slot])
        if not self.in_flight.names(last_batch):
            return False
        self.in_flight.depart_after(last_batch, slot)
        return True
