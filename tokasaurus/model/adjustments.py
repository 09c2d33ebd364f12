"""Changes logits before a token is drawn: masks, biases, penalties. For the slots that ask, and no others.

Owns what the worker must remember of them between batches: each slot's adjustments, and the ids it has
generated so far, after those of its prompt if they matter. The ids of a sequence that enters come with
its parameters, those that follow are recorded on the device as they are drawn: nothing here waits for a
result, so that adjusted sequences run ahead like any other::

    history   row 0   p p p p g g g .     prompt_length 4, length 7: reads_prompt
              row 1   g g . . . . . .     prompt_length 0, length 2

In the order of ``Adjustments``: masks and biases are added, then come the penalties.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.errors import ProtocolError
from tokasaurus.protocol.arrays import Float32Array, Int32Array, Int64Array
from tokasaurus.protocol.messages import AdjustedSlots, Adjustments, SlotParameters

__all__ = ["AdjustmentTable"]

_ALWAYS = np.iinfo(np.int32).max
_NOTHING = -1  # in a table of words: matches whatever is there
_MAX_LAYOUTS = 8


@dataclass(frozen=True, eq=False)
class _Edits:
    """What the adjustments of one slot add to its logits, whatever it has generated.

    Attributes:
        ids: [edits]
        values: [edits]
        until: [edits] they count before so many tokens are generated.
        words: ids of words of two tokens and more.
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
    """Edits of some rows, one after the other, beside the logits. Depends on no token.

    Attributes:
        rows: [R] those that are adjusted, of the logits they are in.
        slots: [R] on the host.
        owners: [edits] index into the rows; likewise ids, values, until.
        word_owners: [words]; likewise word_ends, their last ids, and word_prefixes [words, P], the ids
            before it, aligned to the right.
        penalized: [penalized] index into the rows, on the host.
        penalties: [3, penalized] repetition, frequency, presence.
        counts: whether any frequency or presence counts.
        may_mask_all: whether some row has as many masks as there are tokens.
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
    counts: bool
    may_mask_all: bool


class AdjustmentTable:
    """The adjustments of slots.

    Args:
        num_slots: rows.
        vocab_size: ids are below it.
        device: of the logits.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._asks: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self._adjustments: dict[int, Adjustments] = {}
        self._edits: dict[int, _Edits] = {}
        self._layouts: dict[bytes, _Layout] = {}
        # The history: a row for each slot that needs one; it grows in both directions.
        self._row: Int32Array = np.full(num_slots, -1, np.int32)
        self._free_rows: list[int] = []
        self._history = torch.zeros(0, 0, dtype=torch.int32, device=device)
        self._length: Int32Array = np.zeros(num_slots, np.int32)
        self._prompt_length: Int32Array = np.zeros(num_slots, np.int32)

    def enter(self, parameters: SlotParameters) -> None:
        """Sequences enter slots: these forget who was there before.

        Raises:
            ProtocolError: ids beyond the vocabulary, or other slots than those that are entered.
        """
        former = parameters.slots[self._asks[parameters.slots]]
        for slot in former.tolist():
            del self._adjustments[slot], self._edits[slot]
            if self._row[slot] >= 0:
                self._free_rows.append(int(self._row[slot]))
                self._row[slot] = -1
        self._asks[former] = False
        if former.size or parameters.adjusted:
            self._layouts.clear()
        for group in parameters.adjusted:
            self._enter_group(group, parameters)

    def adjusted(self, logits: Tensor, slots: Int32Array, num_generated: Int32Array) -> Tensor:
        """The logits after all adjustments.

        Args:
            logits: [rows, vocabulary] fp32; left as it is, and returned if no slot asks.
            slots: [rows].
            num_generated: [rows] tokens that each has generated before.
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

    def record(self, slots: Int32Array, token_ids: Tensor) -> None:
        """Remembers what was drawn.

        Args:
            slots: [rows].
            token_ids: [rows] int64, on the device.
        """
        if not self._adjustments:
            return
        kept = np.flatnonzero(self._row[slots] >= 0)
        if not kept.size:
            return
        slots = slots[kept]
        self._reserve(0, int(self._length[slots].max()) + 1)
        drawn = token_ids[self._upload(kept)].to(torch.int32)
        self._history[self._upload(self._row[slots]), self._upload(self._length[slots])] = drawn
        self._length[slots] += 1

    # --- what slots ask for ------------------------------------------------------------------------

    def _enter_group(self, group: AdjustedSlots, parameters: SlotParameters) -> None:
        slots, adjustments = group.slots, group.adjustments
        entered = np.isin(parameters.slots, slots)
        if np.count_nonzero(entered) != len(slots):
            raise ProtocolError("slots are adjusted that no sequence enters")
        edits = _Edits.of(adjustments)
        words = np.array([i for word in edits.words for i in word], np.int64)
        ids = np.concatenate([edits.ids, group.ids, words])
        if len(ids) and (ids.min() < 0 or ids.max() >= self._vocab_size):
            raise ProtocolError(
                f"adjusted ids range from {ids.min()} to {ids.max()}, the limit is {self._vocab_size}"
            )
        for slot in slots.tolist():
            self._adjustments[slot], self._edits[slot] = adjustments, edits
        self._asks[slots] = True
        if not adjustments.reads_generated:
            return
        self._reserve(len(slots), len(group.ids) + 1)
        rows = [self._free_rows.pop() for _ in slots]
        self._row[slots] = rows
        self._length[slots] = len(group.ids)
        num_generated = parameters.num_generated[entered]
        self._prompt_length[parameters.slots[entered]] = len(group.ids) - num_generated
        if len(group.ids):
            history = torch.from_numpy(np.array(group.ids)).to(self._device)
            self._history[self._upload(np.array(rows)), : len(history)] = history

    def _reserve(self, num_rows: int, width: int) -> None:
        """Room for so many more rows, and for so many ids in each."""
        old_rows, old_width = self._history.shape
        new_rows = max(0, num_rows - len(self._free_rows))
        if new_rows:
            new_rows = max(new_rows, old_rows)  # doubles
            self._free_rows += range(old_rows, old_rows + new_rows)
        if width > old_width:
            width = 1 << (width - 1).bit_length()
        if new_rows or width > old_width:
            size = (old_rows + new_rows, max(width, old_width))
            history = torch.zeros(size, dtype=torch.int32, device=self._device)
            history[:old_rows, :old_width] = self._history
            self._history = history

    def _layout(self, slots: Int32Array, asking: NDArray[np.bool_]) -> _Layout:
        """Made once for as long as the same slots come back."""
        key = slots.tobytes()
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) == _MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = self._make_layout(slots[asking], np.flatnonzero(asking))
        return layout

    def _make_layout(self, slots: Int32Array, rows: NDArray[np.intp]) -> _Layout:
        edits = [self._edits[slot] for slot in slots.tolist()]
        owners = np.repeat(np.arange(len(edits)), [len(each.ids) for each in edits])
        words = [(owner, word) for owner, each in enumerate(edits) for word in each.words]
        longest = max((len(word) - 1 for _, word in words), default=0)
        prefixes = np.full((len(words), longest), _NOTHING, np.int32)  # the largest table of all
        for index, (_, word) in enumerate(words):
            prefixes[index, longest - len(word) + 1 :] = word[:-1]
        asked = [self._adjustments[slot] for slot in slots.tolist()]
        penalties = np.array(
            [(a.repetition_penalty, a.frequency_penalty, a.presence_penalty) for a in asked],
            np.float32,
        )
        penalized = np.flatnonzero((penalties != (1, 0, 0)).any(axis=1))
        values = np.concatenate([each.values for each in edits])
        num_masks = [np.isneginf(each.values).sum() + len(each.words) for each in edits]
        return _Layout(
            rows=self._upload(rows),
            slots=slots,
            owners=self._upload(owners),
            ids=self._upload(np.concatenate([each.ids for each in edits])),
            values=torch.from_numpy(values).to(self._device),
            until=self._upload(np.concatenate([each.until for each in edits])),
            word_owners=self._upload(np.array([owner for owner, _ in words])),
            word_ends=self._upload(np.array([word[-1] for _, word in words])),
            word_prefixes=torch.from_numpy(prefixes).to(self._device),
            penalized=penalized,
            penalties=torch.from_numpy(np.ascontiguousarray(penalties[penalized].T)).to(
                self._device
            ),
            counts=bool(penalties[:, 1:].any()),
            may_mask_all=max(num_masks) >= self._vocab_size,
        )

    # --- what it does to logits ---------------------------------------------------------------------

    def _add(self, work: Tensor, layout: _Layout, num_generated: Int32Array) -> None:
        """Masks and biases, in place. ``work`` is [R, vocabulary], ``num_generated`` [R]."""
        if len(layout.owners):
            is_early = self._upload(num_generated)[layout.owners] < layout.until
            values = layout.values.where(is_early, 0)
            work.index_put_((layout.owners, layout.ids), values, accumulate=True)
        if len(layout.word_owners):
            tails = self._tails(layout.slots, layout.word_prefixes.shape[1])[layout.word_owners]
            prefixes = layout.word_prefixes
            found = ((prefixes == tails) | (prefixes == _NOTHING)).all(dim=1)
            values = torch.zeros_like(found, dtype=work.dtype).masked_fill_(found, -torch.inf)
            work.index_put_((layout.word_owners, layout.word_ends), values, accumulate=True)

    def _tails(self, slots: Int32Array, count: int) -> Tensor:
        """[slots, count] the last generated ids of each; what no word holds where there are fewer."""
        columns = self._length[slots, None] - np.arange(count, 0, -1)
        is_generated = (columns >= self._prompt_length[slots, None]) & (self._row[slots, None] >= 0)
        rows = self._upload(self._row[slots])[:, None]
        ids = self._history[rows, self._upload(columns.clip(min=0))]
        return ids.where(torch.from_numpy(is_generated).to(self._device), _NOTHING - 1)

    def _penalize(self, work: Tensor, layout: _Layout) -> None:
        """Penalties, in place; only the logits of ids in the history are touched."""
        slots = layout.slots[layout.penalized]
        lengths, prompt_lengths = (
            self._upload(column[slots])[:, None] for column in (self._length, self._prompt_length)
        )
        longest = int(self._length[slots].max())
        if longest == 0:
            return
        history = self._history[self._upload(self._row[slots]), :longest].to(torch.int64)
        columns = torch.arange(longest, device=self._device)
        # Beyond its end a row repeats its first id, for which the same is written then. A row without
        # any gets its own logit back.
        ids = torch.where(columns < lengths, history, history[:, :1])
        repetition, frequency, presence = layout.penalties[:, :, None]
        everything = len(slots) == len(work)
        index = self._upload(layout.penalized)
        part = work if everything else work[index]
        scores = part.gather(1, ids)
        penalized = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(lengths > 0, penalized, scores)
        if layout.counts:
            is_generated = (columns >= prompt_lengths) & (columns < lengths)
            counts = torch.zeros_like(part).scatter_add_(1, ids, is_generated.to(part.dtype))
            count = counts.gather(1, ids)
            scores = scores - frequency * count - presence * (count > 0)
        part.scatter_(1, ids, scores)
        if not everything:
            work[index] = part

    def _upload(self, values: NDArray[np.integer[Any]]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)
