"""With which pages a sequence starts, and how many it takes from others."""

from __future__ import annotations

from tokasaurus.manager.running import RunningSequences, SlotStart
from tokasaurus.manager.sequence import Sequence
from tokasaurus.protocol.arrays import EMPTY_INT32
from tokasaurus.rounding import ceil_div

__all__ = ["Starts"]


class Starts:
    """What the prefix cache holds of a prompt, and what is to be computed.

    Args:
        running: sequences in slots, and their pages.
    """

    def __init__(self, running: RunningSequences) -> None:
        self._running = running
        self._pages = running.pages
        self._page_size = running.slots.page_size

    def of(self, sequence: Sequence) -> SlotStart:
        """The pages with which a sequence would start now."""
        page_size, num_pseudo = self._page_size, sequence.request.num_pseudo
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

    def num_needed(self, start: SlotStart) -> int:
        """Pages that are not available any more if the sequence starts, without its cartridge.

        A page that is copied is held until the batch is planned.
        """
        held = start.whole_prompt if len(start.whole_prompt) else start.cached_pages
        return self._pages.num_needed(held, start.num_new_pages)

    def num_to_claim(self, start: SlotStart) -> int:
        """The same with its cartridge."""
        num_needed = self.num_needed(start)
        if start.sequence.request.cartridge is not None:
            num_needed += _num_unclaimed_pages(start.sequence)
        return num_needed


def _num_unclaimed_pages(sequence: Sequence) -> int:
    """Pages of its cartridge, if no sequence uses or claims that."""
    cartridge = sequence.request.cartridge
    return 0 if cartridge is None or cartridge.num_holders else cartridge.num_pages
