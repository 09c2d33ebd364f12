"""Adjusts logits before a token is drawn: masks, biases, penalties, for the slots that ask.

Owns what the worker remembers of these slots between batches: each slot's adjustments, the distinct
ids of its prompt if they matter, and the ids that it has generated (``history``). A sequence's ids
come with its parameters when it enters; later ones are recorded on the device as they are drawn.
Nothing here waits for a result, so adjusted sequences run ahead like any other.

The order is that of ``Adjustments``: masks and biases are added first, then come the penalties.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.errors import ProtocolError
from tokasaurus.model.sampling.history import MAX_GATHERED, History
from tokasaurus.model.upload import upload, upload_indices
from tokasaurus.protocol.arrays import EMPTY_INT32, Float32Array, Int32Array, Int64Array
from tokasaurus.protocol.messages import AdjustedSlots, Adjustments, SlotParameters

__all__ = ["AdjustmentTable"]

_ALWAYS = np.iinfo(np.int32).max
# In a table of words: matches any id.
_ANY = -1
_MAX_LAYOUTS = 8
# Of all layouts together, unless a single one has more. An element takes at most 28 bytes.
_MAX_LAYOUT_ELEMENTS = 1 << 22


@dataclass(frozen=True, eq=False)
class _Edits:
    """The additions to one slot's logits that do not depend on the generated ids.

    Attributes:
        ids: [edits].
        values: [edits].
        until: [edits]; an edit counts while fewer tokens than this are generated.
        words: the ids of bad words of two tokens or more.
    """

    ids: Int64Array
    values: Float32Array
    until: Int32Array
    words: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(adjustments: Adjustments) -> _Edits:
        banned = [word[0] for word in adjustments.bad_words if len(word) == 1]
        late, bias = adjustments.late_ids, adjustments.bias
        num_masked = len(banned) + len(late)
        values = np.full(num_masked + len(bias), -np.inf, np.float32)
        values[num_masked:] = [value for _, value in bias]
        until = np.full(len(values), _ALWAYS, np.int32)
        until[len(banned) : num_masked] = adjustments.min_tokens
        ids = np.array([*banned, *late, *(token_id for token_id, _ in bias)], np.int64)
        words = tuple(word for word in adjustments.bad_words if len(word) > 1)
        return _Edits(ids, values, until, words)


@dataclass(frozen=True, eq=False)
class _Layout:
    """The edits of all adjusted rows of a batch, row after row, on the device of the logits.

    It depends on no generated token. A place is the index of a logit in [R, vocabulary], flattened.

    Attributes:
        rows: [R], the adjusted rows among the rows of the logits.
        slots: [R], on the host.
        owners: [edits], the row of each edit, as an index into the R rows.
        ids: [edits], as in ``_Edits``, like the next two.
        values: [edits].
        until: [edits].
        word_owners: [words], the row of each word, as an index into the R rows.
        word_ends: [words], the last id of each word.
        word_prefixes: [words, P], the ids before the last one, aligned to the right.
        penalized: [penalized], the rows with penalties, as indices into the R rows, on the host.
        penalties: [3, penalized]: repetition, frequency, presence.
        first_places: [penalized, 1], the place of each row's first logit.
        known_places: [known], the places of the prompts' ids, each id once for a row; on the host
            if there are many.
        known_repetition: [known], the repetition penalty of each, on the same device.
        counts: whether any row has a frequency or presence penalty.
        may_mask_all: whether some row has at least as many masks as there are tokens.
        num_elements: the size of the tables.
    """

    rows: Tensor
    slots: Int32Array
    owners: Tensor
    ids: Tensor
    values: Tensor
    until: Tensor
    word_owners: Tensor
    word_ends: Tensor
    word_prefixes: Tensor
    penalized: NDArray[np.intp]
    penalties: Tensor
    first_places: Tensor
    known_places: Tensor
    known_repetition: Tensor
    counts: bool
    may_mask_all: bool
    num_elements: int


class AdjustmentTable:
    """The adjustments of slots.

    Args:
        num_slots: of the worker.
        vocab_size: ids are below it.
        history: an empty one.
        device: of the logits.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, history: History, device: torch.device
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._asks: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self._adjustments: dict[int, Adjustments] = {}
        self._edits: dict[int, _Edits] = {}
        self._layouts: dict[bytes, _Layout] = {}
        self._history = history
        # By slot, on the host: the distinct ids of the prompt. A request's samples share one array.
        self._prompts: dict[int, Int32Array] = {}

    def enter(self, parameters: SlotParameters) -> None:
        """Takes the adjustments of sequences that enter slots; former ones are forgotten.

        Raises:
            ProtocolError: ids are beyond the vocabulary, or slots are adjusted that no sequence
                enters, or without adjustments.
        """
        self.leave(parameters.slots)
        if not parameters.adjusted:
            return
        self._layouts.clear()
        slots, num_generated = parameters.slots.tolist(), parameters.num_generated.tolist()
        entering = dict(zip(slots, num_generated, strict=True))
        for group in parameters.adjusted:
            adjustments = parameters.samplings[group.sampling].adjustments
            if adjustments is None:
                raise ProtocolError("slots are adjusted, and their sampling has no adjustments")
            self._enter_group(group, adjustments, entering)

    def leave(self, slots: Int32Array) -> None:
        """Forgets these slots, adjusted or not."""
        former = slots[self._asks[slots]]
        if not former.size:
            return
        for slot in former.tolist():
            del self._adjustments[slot], self._edits[slot]
            self._prompts.pop(slot, None)
        self._history.leave(former)
        self._asks[former] = False
        self._layouts.clear()

    def clear(self) -> None:
        """Forgets all slots. Tensors stay where they are."""
        self._asks[:] = False
        for table in (self._adjustments, self._edits, self._layouts, self._prompts):
            table.clear()
        self._history.clear()

    def adjusted(self, logits: Tensor, slots: Int32Array, num_generated: Int32Array) -> Tensor:
        """The logits after all adjustments.

        Args:
            logits: [rows, vocabulary] fp32. Never changed; returned as it is if no slot asks.
            slots: [rows].
            num_generated: [rows], the tokens that each has generated so far.
        """
        if not self._adjustments:
            return logits
        asking = self._asks[slots]
        if not asking.any():
            return logits
        layout = self._layout(slots, asking)
        original = logits if asking.all() else logits[layout.rows]
        work = original.clone()
        self._add(work, layout, num_generated[asking])
        if layout.may_mask_all:
            none_left = work.amax(dim=-1, keepdim=True) == -torch.inf
            work = torch.where(none_left, original, work)
        if len(layout.penalized):
            self._penalize(work, layout)
        if asking.all():
            return work
        result = logits.clone()
        result[layout.rows] = work
        return result

    def record(self, slots: Int32Array, token_ids: Tensor) -> Int32Array | None:
        """Remembers the drawn tokens.

        Args:
            slots: [rows].
            token_ids: [rows] int64, on the device.

        Returns:
            The rows that cannot go on, because there is no room to remember their tokens. None if
            all can.
        """
        if not self._adjustments:
            return None
        keeps = self._history.keeps[slots]
        if not keeps.any():
            return None
        kept = np.flatnonzero(keeps)
        if len(kept) < len(slots):
            slots, token_ids = slots[kept], token_ids[upload_indices(kept, self._device)]
        is_lost = self._history.record(slots, token_ids)
        return kept[is_lost].astype(np.int32) if is_lost.any() else None

    # --- the slots' adjustments -------------------------------------------------------------------

    def _enter_group(
        self, group: AdjustedSlots, adjustments: Adjustments, entering: dict[int, int]
    ) -> None:
        """Enters one group. ``entering`` maps each slot to the number of its generated tokens."""
        slots = group.slots.tolist()
        if len(entering.keys() & set(slots)) != len(slots):
            raise ProtocolError("slots are adjusted that no sequence enters")
        edits = _Edits.of(adjustments)
        words = np.array([i for word in edits.words for i in word], np.int64)
        ids = np.concatenate([edits.ids, group.ids, words])
        if len(ids) and (ids.min() < 0 or ids.max() >= self._vocab_size):
            raise ProtocolError(
                f"adjusted ids range from {ids.min()} to {ids.max()}, "
                f"the limit is {self._vocab_size}"
            )
        for slot in slots:
            self._adjustments[slot], self._edits[slot] = adjustments, edits
        self._asks[group.slots] = True
        num_prompt = len(group.ids) - (entering[slots[0]] if slots else 0)
        if adjustments.reads_prompt:
            self._prompts |= dict.fromkeys(slots, _distinct(group.ids[:num_prompt]))
        if adjustments.reads_generated:
            self._history.enter(group.slots, group.ids[num_prompt:])

    def _layout(self, slots: Int32Array, asking: NDArray[np.bool_]) -> _Layout:
        """The layout of these slots, kept while batches have the same ones."""
        key = slots.tobytes()
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._make_layout(slots[asking], np.flatnonzero(asking))
            num_elements = sum(each.num_elements for each in self._layouts.values())
            if (
                len(self._layouts) == _MAX_LAYOUTS
                or num_elements + layout.num_elements > _MAX_LAYOUT_ELEMENTS
            ):
                self._layouts.clear()
            self._layouts[key] = layout
        return layout

    def _make_layout(self, slots: Int32Array, rows: NDArray[np.intp]) -> _Layout:
        edits = [self._edits[slot] for slot in slots.tolist()]
        owners = np.repeat(np.arange(len(edits)), [len(each.ids) for each in edits])
        words = [(owner, word) for owner, each in enumerate(edits) for word in each.words]
        longest = max((len(word) - 1 for _, word in words), default=0)
        # The largest table, hence int32.
        prefixes = np.full((len(words), longest), _ANY, np.int32)
        for index, (_, word) in enumerate(words):
            prefixes[index, longest - len(word) + 1 :] = word[:-1]
        asked = [self._adjustments[slot] for slot in slots.tolist()]
        penalties = np.array(
            [(a.repetition_penalty, a.frequency_penalty, a.presence_penalty) for a in asked],
            np.float32,
        )
        penalized = np.flatnonzero((penalties != (1, 0, 0)).any(axis=1))
        known = [self._prompts.get(slot, EMPTY_INT32) for slot in slots[penalized].tolist()]
        counts = [len(ids) for ids in known]
        known_places = np.repeat(penalized * self._vocab_size, counts)
        known_places += np.concatenate([EMPTY_INT32, *known])
        known_repetition = np.repeat(penalties[penalized, 0], counts)
        is_small = len(known_places) <= _MAX_LAYOUT_ELEMENTS
        place = self._device if is_small else torch.device("cpu")
        values = np.concatenate([each.values for each in edits])
        num_masks = [np.isneginf(each.values).sum() + len(each.words) for each in edits]
        return _Layout(
            rows=upload_indices(rows, self._device),
            slots=slots,
            owners=upload_indices(owners, self._device),
            ids=upload_indices(np.concatenate([each.ids for each in edits]), self._device),
            values=upload(values, self._device),
            until=upload_indices(np.concatenate([each.until for each in edits]), self._device),
            word_owners=upload_indices(np.array([owner for owner, _ in words]), self._device),
            word_ends=upload_indices(np.array([word[-1] for _, word in words]), self._device),
            word_prefixes=upload(prefixes, self._device),
            penalized=penalized,
            penalties=upload(penalties[penalized].T, self._device),
            first_places=upload_indices(penalized * self._vocab_size, self._device)[:, None],
            known_places=upload(known_places, place),
            known_repetition=upload(known_repetition, place),
            counts=bool(penalties[:, 1:].any()),
            may_mask_all=max(num_masks) >= self._vocab_size,
            num_elements=len(owners) + prefixes.size + len(words) + len(known_places) // 2,
        )

    # --- the logits -------------------------------------------------------------------------------

    def _add(self, work: Tensor, layout: _Layout, num_generated: Int32Array) -> None:
        """Adds masks and biases in place. ``work`` is [R, vocabulary], ``num_generated`` [R]."""
        if len(layout.owners):
            is_early = upload_indices(num_generated, self._device)[layout.owners] < layout.until
            values = layout.values.where(is_early, 0)
            work.index_put_((layout.owners, layout.ids), values, accumulate=True)
        if len(layout.word_owners):
            prefixes = layout.word_prefixes
            tails = self._history.tails(layout.slots, prefixes.shape[1], _ANY - 1)
            tails = tails[layout.word_owners]
            found = ((prefixes == tails) | (prefixes == _ANY)).all(dim=1)
            values = torch.zeros_like(found, dtype=work.dtype).masked_fill_(found, -torch.inf)
            work.index_put_((layout.word_owners, layout.word_ends), values, accumulate=True)

    def _penalize(self, work: Tensor, layout: _Layout) -> None:
        """Applies penalties in place, to the logits of ids in prompts and histories only."""
        slots = layout.slots[layout.penalized]
        num_ids = len(layout.known_places) + len(slots) * int(self._history.lengths[slots].max())
        at_once = num_ids <= MAX_GATHERED
        updates: Iterable[tuple[Tensor, Tensor]] = self._penalized(
            work if at_once else work.clone(), layout, slots, at_once
        )
        if at_once:
            # All reads come before the first write.
            updates = list(updates)
        for places, scores in updates:
            work.put_(places, scores)

    def _penalized(
        self, work: Tensor, layout: _Layout, slots: Int32Array, at_once: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields places and their new logits. The last one for a place is right.

        ``at_once`` says that the ids are few enough to keep all gathered pieces.
        """
        for start in range(0, len(layout.known_places), MAX_GATHERED):
            part = slice(start, start + MAX_GATHERED)
            places = layout.known_places[part].to(self._device)
            scores = work.view(-1).index_select(0, places)
            yield places, _repeated(scores, layout.known_repetition[part].to(self._device))
        holding = np.flatnonzero(self._history.lengths[slots] > 0)
        if not len(holding):
            return
        first_places, penalties = layout.first_places, layout.penalties[:, :, None]
        if len(holding) < len(slots):
            slots, index = slots[holding], upload_indices(holding, self._device)
            first_places, penalties = first_places[index], penalties[:, index]
        repetition, frequency, presence = penalties
        pieces: Iterable[tuple[Tensor, Tensor]] = self._history.pieces(slots)
        if at_once:
            pieces = list(pieces)
        counts = None
        if layout.counts:
            counts = torch.zeros(len(slots), self._vocab_size, device=self._device)
            for ids, is_there in pieces if at_once else self._history.pieces(slots):
                counts.scatter_add_(1, ids, is_there.to(counts.dtype))
        for ids, _ in pieces:
            places = first_places + ids
            scores = work.view(-1).index_select(0, places.view(-1)).view_as(places)
            scores = _repeated(scores, repetition)
            if counts is not None:
                count = counts.gather(1, ids)
                scores = scores - frequency * count - presence * (count > 0)
            yield places, scores


def _distinct(ids: Int32Array) -> Int32Array:
    """Each id once; several times faster than numpy's ``unique``."""
    ids = np.sort(ids)
    is_first = np.ones(len(ids), np.bool_)
    np.not_equal(ids[1:], ids[:-1], out=is_first[1:])
    return ids[is_first]


def _repeated(scores: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(scores > 0, scores / penalty, scores * penalty)
