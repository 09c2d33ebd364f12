"""Writes down a planned batch as a ForwardBatch. Decides nothing and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tokasaurus.manager.in_flight import PromptPiece
from tokasaurus.manager.kv.prefix_groups import Groups
from tokasaurus.manager.sequence import Sequence
from tokasaurus.manager.slots import NO_SLOTS, IndexArray
from tokasaurus.protocol.arrays import EMPTY_INT32, Int32Array
from tokasaurus.protocol.messages import (
    AdjustedSlots,
    ForwardBatch,
    Pooling,
    SlotGrammar,
    SlotParameters,
)

__all__ = [
    "Chunk",
    "Draws",
    "draws",
    "forward_batch",
    "pooled_prompts",
    "prompt_pieces",
]


@dataclass(eq=False, slots=True)
class Chunk:
    """A part of a prompt that is fed in one batch."""

    sequence: Sequence
    start: int  # position of its first token
    end: int  # the position after its last one
    # Samples that run from its last row on, and their slots once they have entered.
    followers: list[Sequence] = field(default_factory=list)
    forks: IndexArray = field(default_factory=lambda: NO_SLOTS)
    ends_prompt: bool = field(init=False)  # its last row samples the next token
    # How many top logprobs its tokens want; -1 if they want no logprobs at all.
    num_prompt_logprobs: int = field(init=False)

    def __post_init__(self) -> None:
        sequence = self.sequence
        self.ends_prompt = self.end == len(sequence.prompt_ids)
        self.num_prompt_logprobs = -1
        if sequence.whole_prompt_due:
            self.num_prompt_logprobs = sequence.request.message.num_prompt_logprobs

    @property
    def length(self) -> int:
        """Tokens."""
        return self.end - self.start

    @property
    def pooling(self) -> Pooling:
        """How its hidden states are pooled."""
        return self.sequence.request.message.pooling


class Draws(NamedTuple):
    """The tokens that are drawn from prompts' last rows."""

    chunks: IndexArray  # [draws] the number of the chunk
    slots: IndexArray  # [draws] that the token is for


def forward_batch(
    number: int,
    left_slots: Rows[int],
    entered: Rows[Sequence],
    table_changes: tuple[Int32Array, Int32Array, Int32Array],
    chunks: Rows[Chunk],
    draws: Draws,
    copies_before: Int32Array,
    copies_after: Int32Array,
    groups: Groups,
) -> ForwardBatch:
    """The message.

    Args:
        number: of the batch.
        left_slots: slots for which the worker need not remember anything.
        entered: sequences that the worker does not know yet.
        table_changes: slots, columns and pages.
        chunks: of prompts, in row order.
        draws: of tokens from prompts' last rows.
        copies_before: [2, copies] pages to copy from and to before the pass.
        copies_after: [2, copies] after the pass.
        groups: the decode rows, and which of them and of the chunks share pages.
    """
    table_slots, table_columns, table_pages = table_changes
    next_ids = [
        -1 if chunk.ends_prompt else int(chunk.sequence.prompt_ids[chunk.end]) for chunk in chunks
    ]
    fed = [chunk.sequence.prompt_ids[chunk.start : chunk.end] for chunk in chunks]
    pooling = [chunk.pooling for chunk in chunks]
    return ForwardBatch(
        number=number,
        parameters=_slot_parameters(entered) if entered else None,
        table_slots=table_slots,
        table_columns=table_columns,
        table_pages=table_pages,
        decode_slots=groups.slots.astype(np.int32),
        prefill_slots=_int32([chunk.sequence.slot for chunk in chunks]),
        prefill_starts=_int32([chunk.start for chunk in chunks]),
        prefill_lengths=_int32([chunk.length for chunk in chunks]),
        prefill_ids=np.concatenate(fed) if fed else EMPTY_INT32,
        prefill_num_logprobs=_int32([chunk.num_prompt_logprobs for chunk in chunks]),
        prefill_next_ids=_int32(next_ids),
        draw_chunks=draws.chunks.astype(np.int32),
        draw_slots=draws.slots.astype(np.int32),
        copy_sources=copies_after[0],
        copy_targets=copies_after[1],
        group_first_decodes=groups.first_decodes,
        group_num_decodes=groups.num_decodes,
        group_first_chunks=None if groups.chunks is None else groups.chunks.firsts,
        group_num_chunks=None if groups.chunks is None else groups.chunks.counts,
        group_first_columns=groups.first_columns,
        group_num_columns=groups.num_columns,
        prefill_pooling=_int32(pooling) if any(pooling) else None,
        left_slots=_int32(left_slots) if left_slots else None,
        early_copy_sources=copies_before[0] if copies_before.size else None,
        early_copy_targets=copies_before[1] if copies_before.size else None,
    )


def draws(chunks: Rows[Chunk]) -> Draws:
    """The draws from chunks that end their prompts: one for the prompt's slot, then its forks'."""
    ends = [index for index, chunk in enumerate(chunks) if chunk.ends_prompt]
    if not ends:
        return Draws(NO_SLOTS, NO_SLOTS)
    slots: list[int] = []
    counts: list[int] = []
    for index in ends:
        chunk = chunks[index]
        slots.append(chunk.sequence.slot)
        slots += chunk.forks.tolist()
        counts.append(1 + len(chunk.forks))
    return Draws(np.repeat(np.array(ends, np.intp), counts), np.array(slots, np.intp))


def prompt_pieces(chunks: Rows[Chunk]) -> list[PromptPiece]:
    """The prompt logprobs that the result will bring, in its order."""
    return [
        PromptPiece(
            sequence=chunk.sequence,
            first_position=chunk.start + 1 - chunk.sequence.request.num_pseudo,
            num_tokens=chunk.length - chunk.ends_prompt,
            num_logprobs=chunk.num_prompt_logprobs,
            ends_prompt=chunk.ends_prompt,
        )
        for chunk in chunks
        if chunk.num_prompt_logprobs >= 0
    ]


def pooled_prompts(chunks: Rows[Chunk]) -> list[Sequence]:
    """The prompts whose pooled states the result will bring, in its order."""
    return [chunk.sequence for chunk in chunks if chunk.pooling and chunk.ends_prompt]


def _slot_parameters(entered: Rows[Sequence]) -> SlotParameters:
    messages = [sequence.request.message for sequence in entered]
    samplings = [message.sampling for message in messages]
    keys = list(map(id, samplings))
    distinct = dict(zip(keys, samplings, strict=True))
    places = {key: place for place, key in enumerate(distinct)}
    names = {name: place for place, name in enumerate({each.name: None for each in messages})}
    has_names = any(names)
    adjusted = [
        sequence
        for sequence, sampling in zip(entered, samplings, strict=True)
        if sampling.adjustments is not None
    ]
    return SlotParameters(
        slots=_int32([sequence.slot for sequence in entered]),
        samplings=tuple(distinct.values()),
        sampling_index=_int32([places[key] for key in keys]),
        seed=np.array([message.seed for message in messages], np.int64),
        sample_index=_int32([sequence.sample_index for sequence in entered]),
        num_generated=_int32([sequence.num_stored for sequence in entered]),
        num_logprobs=_int32([message.num_logprobs for message in messages]),
        adjusted=_adjusted_slots(adjusted, places) if adjusted else (),
        grammars=_grammars(entered) if any(message.grammar for message in messages) else (),
        names=tuple(names) if has_names else (),
        name_index=_int32([names[each.name] for each in messages]) if has_names else EMPTY_INT32,
    )


def _grammars(entered: Rows[Sequence]) -> tuple[SlotGrammar, ...]:
    by_text: dict[str, list[Sequence]] = {}
    for sequence in entered:
        if sequence.request.message.grammar:
            by_text.setdefault(sequence.request.message.grammar, []).append(sequence)
    return tuple(
        SlotGrammar(
            text=text,
            slots=_int32([sequence.slot for sequence in sequences]),
            num_generated=_int32([sequence.num_stored for sequence in sequences]),
            generated_ids=np.concatenate([sequence.generated_ids for sequence in sequences]),
        )
        for text, sequences in by_text.items()
    )


def _adjusted_slots(
    entered: Rows[Sequence], places: Mapping[int, int]
) -> tuple[AdjustedSlots, ...]:
    """One entry for all samples of a request that start together.

    Args:
        entered: sequences with adjustments.
        places: of the message's samplings, by their ``id``.
    """
    alike: dict[tuple[int, int], list[Sequence]] = {}
    for sequence in entered:
        key = (id(sequence.request), id(sequence.prompt_ids))
        alike.setdefault(key, []).append(sequence)
    groups = []
    for sequences in alike.values():
        sequence = sequences[0]
        sampling = sequence.request.message.sampling
        adjustments = sampling.adjustments
        if adjustments is None:
            continue
        if adjustments.reads_prompt:
            ids = sequence.prompt_ids[sequence.request.num_pseudo :]
        else:
            ids = sequence.generated_ids if adjustments.reads_generated else EMPTY_INT32
        slots = _int32([sequence.slot for sequence in sequences])
        groups.append(AdjustedSlots(slots, places[id(sampling)], ids))
    return tuple(groups)


def _int32(values: Rows[int]) -> Int32Array:
    return np.array(values, np.int32) if values else EMPTY_INT32
