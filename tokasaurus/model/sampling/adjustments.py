"""Adjusts logits before a token is drawn: masks, biases, penalties, for the slots that ask.

Owns what the worker remembers of these slots between batches: each slot's adjustments, the distinct
ids of its prompt if they matter, and the ids that it has generated (``history``). A sequence's ids
come with its parameters when it enters; later ones are recorded on the device as they are drawn.
The host plans the adjustments of a batch before the batch runs, and what they need goes to the
device with the batch. Nothing here waits for a result, so adjusted sequences run ahead like any
other.

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
from tokasaurus.model.sampling.history import MAX_GATHERED, Appends, History, Pieces, Tails
from tokasaurus.model.upload import Staged, Staging
from tokasaurus.protocol.arrays import EMPTY_INT32, Float32Array, Int32Array, Int64Array
from tokasaurus.protocol.messages import AdjustedSlots, Adjustments, SlotParameters

__all__ = ["AdjustmentTable", "PlannedAdjustments", "Recording"]

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


class _Known:
    """The prompts' ids of the rows with penalties, each id once for a row, and their penalties.

    Args:
        places: [known] int64, of the ids.
        repetition: [known] fp32, the repetition penalty of each.
        staging: sends them, unless there are so many that they have to stay on the host.
        device: of the logits.
    """

    def __init__(
        self,
        places: NDArray[np.int64],
        repetition: Float32Array,
        staging: Staging,
        device: torch.device,
    ) -> None:
        self._length = len(places)
        self._device = device
        self._staged: tuple[Staged, Staged] | None = None
        self._arrays: tuple[NDArray[np.int64], Float32Array] | None = None
        if len(places) <= _MAX_LAYOUT_ELEMENTS:
            self._staged = (staging.add(places), staging.add(repetition))
        else:
            self._arrays = (places, repetition)

    def __len__(self) -> int:
        return self._length

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields places and penalties of ``MAX_GATHERED`` ids at most."""
        for start in range(0, self._length, MAX_GATHERED):
            part = slice(start, start + MAX_GATHERED)
            if self._staged is not None:
                places, repetition = self._staged
            else:
                assert self._arrays is not None
                staging = Staging(self._device)
                places, repetition = (staging.add(each[part]) for each in self._arrays)
                staging.send()
                part = slice(None)
            yield places.tensor[part], repetition.tensor[part]


@dataclass(frozen=True, eq=False)
class _Layout:
    """The edits of all adjusted rows of a batch, row after row, on the device of the logits.

    It depends on no generated token. A place is the index of a logit in [R, vocabulary], flattened.
    Arrays that are not on the host were sent with the first batch that had these rows.

    Attributes:
        rows: [R], the adjusted rows among the rows of the logits; None if they are all rows.
        slots: [R], on the host.
        owners: [edits], the row of each edit, as an index into the R rows.
        ids: [edits], as in ``_Edits``, like the next two.
        values: [edits].
        until: [edits].
        word_owners: [words], the row of each word, as an index into the R rows.
        word_ends: [words], the last id of each word.
        word_prefixes: [words, P], the ids before the last one, aligned to the right.
        longest_prefix: P; 0 if there are no words.
        penalized: [penalized], the rows with penalties, as indices into the R rows, on the host.
        penalties: [3, penalized]: repetition, frequency, presence.
        first_places: [penalized, 1], the place of each row's first logit.
        known: the prompts' ids.
        counts: whether any row has a frequency or presence penalty.
        may_mask_all: whether some row has at least as many masks as there are tokens.
        num_elements: the size of the tables.
    """

    rows: Staged | None
    slots: Int32Array
    owners: Staged
    ids: Staged
    values: Staged
    until: Staged
    word_owners: Staged
    word_ends: Staged
    word_prefixes: Staged
    longest_prefix: int
    penalized: NDArray[np.intp]
    penalties: Staged
    first_places: Staged
    known: _Known
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

    def enter(self, parameters: SlotParameters, staging: Staging) -> None:
        """Takes the adjustments of sequences that enter slots; former ones are forgotten.

        ``write_entries`` completes it, once the ids of the sequences are sent.

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
            self._enter_group(group, adjustments, entering, staging)

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

    def asks(self, slots: Int32Array) -> bool:
        """Whether any of these slots asks for adjustments."""
        return bool(self._adjustments) and bool(self._asks[slots].any())

    def plan(
        self, slots: Int32Array, num_generated: Int32Array, staging: Staging
    ) -> PlannedAdjustments | None:
        """Plans the adjustments of some rows of a batch.

        Args:
            slots: [rows].
            num_generated: [rows], the tokens that each has generated so far.
            staging: sends what the rows need.

        Returns:
            None if no slot asks.
        """
        if not self.asks(slots):
            return None
        asking = self._asks[slots]
        layout = self._layout(slots, asking, staging)
        return PlannedAdjustments(
            layout, num_generated[asking], self._history, self._vocab_size, staging
        )

    def plan_record(self, slots: Int32Array, staging: Staging) -> Recording | None:
        """Makes room for the token that each slot draws, after the batch's adjustments are planned.

        Args:
            slots: [rows], all that draw.
            staging: sends what is needed.

        Returns:
            None if no slot remembers its tokens.
        """
        if not self._adjustments:
            return None
        keeps = self._history.keeps[slots]
        if not keeps.any():
            return None
        rows = np.flatnonzero(keeps)
        appends = self._history.plan_appends(slots[rows], staging)
        staged = staging.add_indices(rows) if len(rows) < len(slots) else None
        return Recording(self._history, rows, staged, appends)

    def write_entries(self) -> None:
        """Writes the ids of the slots that have entered, once they are sent."""
        self._history.write_entries()

    # --- the slots' adjustments -------------------------------------------------------------------

    def _enter_group(
        self,
        group: AdjustedSlots,
        adjustments: Adjustments,
        entering: dict[int, int],
        staging: Staging,
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
            self._history.enter(group.slots, group.ids[num_prompt:], staging)

    def _layout(self, slots: Int32Array, asking: NDArray[np.bool_], staging: Staging) -> _Layout:
        """The layout of these slots, kept while batches have the same ones."""
        key = slots.tobytes()
        layout = self._layouts.get(key)
        if layout is None:
            rows = None if asking.all() else staging.add_indices(np.flatnonzero(asking))
            layout = self._make_layout(slots[asking], rows, staging)
            num_elements = sum(each.num_elements for each in self._layouts.values())
            if (
                len(self._layouts) == _MAX_LAYOUTS
                or num_elements + layout.num_elements > _MAX_LAYOUT_ELEMENTS
            ):
                self._layouts.clear()
            self._layouts[key] = layout
        return layout

    def _make_layout(self, slots: Int32Array, rows: Staged | None, staging: Staging) -> _Layout:
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
        values = np.concatenate([each.values for each in edits])
        num_masks = [np.isneginf(each.values).sum() + len(each.words) for each in edits]
        return _Layout(
            rows=rows,
            slots=slots,
            owners=staging.add_indices(owners),
            ids=staging.add(np.concatenate([each.ids for each in edits])),
            values=staging.add(values),
            until=staging.add_indices(np.concatenate([each.until for each in edits])),
            word_owners=staging.add_indices(np.array([owner for owner, _ in words], np.int64)),
            word_ends=staging.add_indices(np.array([word[-1] for _, word in words], np.int64)),
            word_prefixes=staging.add(prefixes),
            longest_prefix=longest,
            penalized=penalized,
            penalties=staging.add(penalties[penalized].T),
            first_places=staging.add_indices(penalized[:, None] * self._vocab_size),
            known=_Known(known_places, known_repetition, staging, self._device),
            counts=bool(penalties[:, 1:].any()),
            may_mask_all=max(num_masks) >= self._vocab_size,
            num_elements=len(owners) + prefixes.size + len(words) + len(known_places) // 2,
        )


class PlannedAdjustments:
    """The adjustments of some rows of a batch; ``AdjustmentTable.plan`` makes them.

    Args:
        layout: of the rows that ask.
        num_generated: [R], the tokens that each of these has generated so far.
        history: of the table.
        vocab_size: of the logits.
        staging: sends what the rows need.
    """

    def __init__(
        self,
        layout: _Layout,
        num_generated: Int32Array,
        history: History,
        vocab_size: int,
        staging: Staging,
    ) -> None:
        self._layout, self._history, self._vocab_size = layout, history, vocab_size
        self._num_generated = staging.add_indices(num_generated)
        slots = layout.slots[layout.penalized]
        lengths = history.lengths[slots]
        num_ids = len(layout.known) + len(slots) * int(lengths.max(initial=0))
        # Whether the penalized ids are few enough to keep all gathered pieces.
        self._at_once = num_ids <= MAX_GATHERED
        self._tails: Tails | None = None
        if layout.longest_prefix:
            self._tails = history.plan_tails(layout.slots, layout.longest_prefix, staging)
        holding = np.flatnonzero(lengths > 0)
        self._pieces: Pieces | None = None
        self._holding: Staged | None = None
        if len(holding):
            self._pieces = history.plan_pieces(slots[holding], staging)
            if len(holding) < len(slots):
                self._holding = staging.add_indices(holding)

    def apply(self, logits: Tensor) -> Tensor:
        """The logits after all adjustments, in fp32.

        Args:
            logits: [rows, vocabulary] fp32, bf16 or fp16. Never changed.
        """
        layout = self._layout
        original = logits if layout.rows is None else logits[layout.rows.tensor]
        work = original.to(torch.float32, copy=True)
        self._add(work)
        if layout.may_mask_all:
            none_left = work.amax(dim=-1, keepdim=True) == -torch.inf
            work = torch.where(none_left, original, work)
        if len(layout.penalized):
            self._penalize(work)
        if layout.rows is None:
            return work
        result = logits.to(torch.float32, copy=True)
        result[layout.rows.tensor] = work
        return result

    def _add(self, work: Tensor) -> None:
        """Adds masks and biases in place. ``work`` is [R, vocabulary]."""
        layout = self._layout
        owners = layout.owners.tensor
        if len(owners):
            is_early = self._num_generated.tensor[owners] < layout.until.tensor
            values = layout.values.tensor.where(is_early, 0)
            work.index_put_((owners, layout.ids.tensor), values, accumulate=True)
        if self._tails is not None:
            owners, prefixes = layout.word_owners.tensor, layout.word_prefixes.tensor
            tails = self._history.tails(self._tails, _ANY - 1)[owners]
            found = ((prefixes == tails) | (prefixes == _ANY)).all(dim=1)
            values = torch.zeros_like(found, dtype=work.dtype).masked_fill_(found, -torch.inf)
            work.index_put_((owners, layout.word_ends.tensor), values, accumulate=True)

    def _penalize(self, work: Tensor) -> None:
        """Applies penalties in place, to the logits of ids in prompts and histories only."""
        at_once = self._at_once
        updates: Iterable[tuple[Tensor, Tensor]] = self._penalized(
            work if at_once else work.clone()
        )
        if at_once:
            # All reads come before the first write.
            updates = list(updates)
        for places, scores in updates:
            work.put_(places, scores)

    def _penalized(self, work: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields places and their new logits. The last one for a place is right."""
        layout = self._layout
        for places, repetition in layout.known.pieces():
            yield places, _repeated(work.view(-1).index_select(0, places), repetition)
        if self._pieces is None:
            return
        first_places, penalties = layout.first_places.tensor, layout.penalties.tensor[:, :, None]
        if self._holding is not None:
            index = self._holding.tensor
            first_places, penalties = first_places[index], penalties[:, index]
        repetition, frequency, presence = penalties
        pieces: Iterable[tuple[Tensor, Tensor]] = self._history.pieces(self._pieces)
        if self._at_once:
            pieces = list(pieces)
        counts = None
        if layout.counts:
            counts = work.new_zeros(len(first_places), self._vocab_size)
            for ids, is_there in pieces if self._at_once else self._history.pieces(self._pieces):
                counts.scatter_add_(1, ids, is_there.to(counts.dtype))
        for ids, _ in pieces:
            places = first_places + ids
            scores = work.view(-1).index_select(0, places.view(-1)).view_as(places)
            scores = _repeated(scores, repetition)
            if counts is not None:
                count = counts.gather(1, ids)
                scores = scores - frequency * count - presence * (count > 0)
            yield places, scores


class Recording:
    """Remembers the tokens that a batch draws; ``AdjustmentTable.plan_record`` makes it.

    Args:
        history: of the table.
        rows: that remember their tokens, among those that draw.
        staged: the same on the device; None if these are all rows.
        appends: where their tokens go.

    Attributes:
        lost: the rows that cannot go on, because there is no room to remember their tokens. None
            if all can.
    """

    def __init__(
        self, history: History, rows: NDArray[np.intp], staged: Staged | None, appends: Appends
    ) -> None:
        self._history, self._rows, self._appends = history, staged, appends
        is_lost = appends.is_lost
        self.lost: Int32Array | None = rows[is_lost].astype(np.int32) if is_lost.any() else None

    def record(self, token_ids: Tensor) -> None:
        """Remembers the drawn tokens, [rows] int64, on the device."""
        if self._rows is not None:
            token_ids = token_ids[self._rows.tensor]
        self._history.append(self._appends, token_ids)


def _distinct(ids: Int32Array) -> Int32Array:
    """Each id once; several times faster than numpy's ``unique``."""
    ids = np.sort(ids)
    is_first = np.ones(len(ids), np.bool_)
    np.not_equal(ids[1:], ids[:-1], out=is_first[1:])
    return ids[is_first]


def _repeated(scores: Tensor, penalty: Tensor) -> Tensor:
    return torch.where(scores > 0, scores / penalty, scores * penalty)
