"""The rows of the forecast: running sequences, and candidates that might run now.

Reads the slot table, asks for predicted lengths, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import NamedTuple

import numpy as np

from tokasaurus.manager.forecast.curve import ForecastRows, Forest
from tokasaurus.manager.forecast.learning import LengthLearning
from tokasaurus.manager.forecast.lengths import at_most_median
from tokasaurus.manager.running import RunningSequences
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.slots import IndexArray
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.rounding import ceil_div

__all__ = ["Candidate", "candidate_rows", "running_forest", "running_rows", "uncached_candidate"]


class Candidate(NamedTuple):
    """A sequence that might run now, and samples that would fork from it: a row for each."""

    sequence: Sequence
    num_tokens: int  # of its prompt, that it would feed; 0 where it runs already, and has no row
    # Of its prompt's pages, those that have a holder already; less by the end of a cartridge that
    # has none.
    num_held_pages: int
    num_forks: int

    @property
    def num_rows(self) -> int:
        """Sequences that would run."""
        return self.num_forks + (self.num_tokens > 0)

    def most_pages_each(self, page_size: int) -> int:
        """Pages of one of its sequences that becomes as long as it may, without pinned ones."""
        num_pinned = self.sequence.request.num_pinned_pages
        return ceil_div(self.sequence.final_length, page_size) - num_pinned

    def most_pages(self, page_size: int) -> int:
        """Pages of all its sequences if each becomes as long as it may."""
        return self.most_pages_each(page_size) * self.num_rows


def uncached_candidate(sequence: Sequence, num_forks: int) -> Candidate:
    """A sequence of the queue, as if no page of its own prompt were cached."""
    num_held = sequence.request.num_pinned_pages
    return Candidate(sequence, sequence.num_own_tokens, num_held, num_forks)


def running_rows(
    running: RunningSequences, learning: LengthLearning
) -> tuple[IndexArray, ForecastRows]:
    """Slots that hold pages, and their rows: first those that decode, then prompts in order.

    Pinned pages are left out, and so are the positions in them.
    """
    slots, page_size = running.slots, running.slots.page_size
    prefilling = [sequence.slot for sequence in running.prefilling]
    is_decoding = slots.order >= 0
    is_decoding[prefilling] = False
    rows = np.concatenate([is_decoding.nonzero()[0], np.array(prefilling, np.intp)])
    length = slots.length[rows].astype(np.int64)
    decodes_from = np.maximum(length, slots.prompt_end[rows])
    num_pinned = slots.num_pseudo[rows].astype(np.int64) // page_size
    predicted = learning.predict(
        slots.length_group[rows],
        slots.known[rows].astype(np.int64),
        slots.max_tokens[rows],
        slots.arrival[rows],
    )
    # The last token is not fed.
    end = np.minimum(slots.prompt_length[rows] + predicted - 1, slots.final_length[rows])
    return rows, ForecastRows(
        length=decodes_from - num_pinned * page_size,
        num_pages=slots.capacity[rows].astype(np.int64) // page_size - num_pinned,
        num_prompt_tokens=decodes_from - length,
        num_steps=np.maximum(end - decodes_from, 0),
        leaf=running.prefixes.leaf[rows].astype(np.int64),
    )


def running_forest(running: RunningSequences) -> Forest:
    """The pages that slots share, without those that are pinned."""
    prefixes, slots = running.prefixes, running.slots
    rows = ((prefixes.leaf >= 0) & (slots.num_pseudo >= slots.page_size)).nonzero()[0]
    if not rows.size:
        return Forest(prefixes.parent, prefixes.end_column)
    # All holders of a page of a cartridge have that cartridge, and hold all its full pages.
    num_pinned: Int32Array = np.zeros_like(prefixes.end_column)
    nodes, counts = prefixes.leaf[rows], slots.num_pseudo[rows] // slots.page_size
    while nodes.size:
        num_pinned[nodes] = counts
        nodes = prefixes.parent[nodes]
        nodes, counts = nodes[nodes >= 0], counts[nodes >= 0]
    return Forest(prefixes.parent, prefixes.end_column - num_pinned)


class _Alike(NamedTuple):
    """The columns of one candidate, or of its forks, which have them in common."""

    length: int
    num_pages: int
    num_prompt_tokens: int
    leaf: int
    group: int
    num_generated: int
    max_tokens: int


def candidate_rows(
    candidates: Rows[Candidate], page_size: int, learning: LengthLearning
) -> tuple[ForecastRows, Forest]:
    """Each candidate that does not run yet, followed by its forks; and the pages that these share.

    Pages that other sequences hold, or that are pinned, are left out: they are in use anyway.
    """
    alike: list[_Alike] = []
    counts: list[int] = []
    numbers: list[int] = []
    node_pages: list[int] = []
    for sequence, num_tokens, num_held, num_forks in candidates:
        message, group = sequence.request.message, sequence.request.length_group
        length = len(sequence.prompt_ids)
        num_full, rest = divmod(length, page_size)
        if num_tokens == 0:
            num_held = num_full
        num_full -= num_held
        length -= num_held * page_size
        num_pages = num_full + (rest > 0)
        leaf = -1
        if num_tokens and num_forks and num_full:
            leaf = len(node_pages)
            node_pages.append(num_full)
        limit = message.max_tokens
        if num_tokens:
            num_stored = sequence.num_stored
            alike.append(_Alike(length, num_pages, num_tokens, leaf, group, num_stored, limit))
            counts.append(1)
            numbers.append(sequence.arrival)
        if num_forks:
            alike.append(_Alike(length, num_pages, 0, leaf, group, 0, limit))
            counts.append(num_forks)
            numbers += range(sequence.arrival + 1, sequence.arrival + 1 + num_forks)
    # Where few sequences run, a head that happens to be predicted long would hold up the whole
    # queue.
    if numbers:
        numbers[0] = at_most_median(numbers[0])
    columns = np.repeat(
        np.array(alike, np.int64).reshape(-1, len(_Alike._fields)), counts, axis=0
    ).T
    lengths, pages, tokens, leaves, groups, num_generated, limits = columns
    predicted = learning.predict(groups, num_generated, limits, np.array(numbers, np.int64))
    forest = Forest(np.full(len(node_pages), -1, np.int32), np.array(node_pages, np.int32))
    return ForecastRows(lengths, pages, tokens, predicted - num_generated - 1, leaves), forest
