"""The batches that are measured, and those that the result is checked with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from tokasaurus.planner.cost_model import NO_GROUPS, BatchWork, GroupWork
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import (
    AdjustedSlots,
    Adjustments,
    ForwardBatch,
    Sampling,
    SlotParameters,
)
from tokasaurus.rounding import ceil_div

__all__ = ["Case", "Limits", "attention_cases", "draw_cases", "held_out_cases", "row_cases"]

_DRAWS_NOTHING = 7  # the token behind a chunk, which therefore does not end its prompt


@dataclass(frozen=True)
class Case:
    """Sequences that decode at one length, and chunks of prompts of one size.

    Attributes:
        num_decodes: sequences that decode; they take the first slots.
        length: positions of each, its new token included; at least 2.
        num_chunks: chunks of prompts, none of which ends its prompt.
        chunk_rows: of each.
        chunk_end: the position behind each.
        prefix: tokens that all sequences share, whole pages; they are one group.
        sampling: of the sequences that decode.
        num_logprobs: of the same.
    """

    num_decodes: int = 0
    length: int = 2
    num_chunks: int = 0
    chunk_rows: int = 0
    chunk_end: int = 0
    prefix: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    num_logprobs: int = -1

    @property
    def num_sequences(self) -> int:
        return self.num_decodes + self.num_chunks

    @property
    def num_rows(self) -> int:
        return self.num_decodes + self.num_chunks * self.chunk_rows

    @property
    def name(self) -> str:
        parts = []
        if self.num_decodes:
            parts.append(f"{self.num_decodes} decode at {self.length}")
        if self.num_chunks:
            parts.append(f"{self.num_chunks} chunks of {self.chunk_rows} to {self.chunk_end}")
        if self.prefix:
            parts.append(f"{self.prefix} shared")
        return ", ".join(parts)

    def work(self) -> BatchWork:
        """What the batch asks of a device, without its draws' time."""
        groups = NO_GROUPS
        if self.prefix:
            columns = (self.num_decodes, self.prefix, 0, self.num_chunks)
            groups = GroupWork(*(_int32([column]) for column in columns))
        return BatchWork(
            num_decodes=self.num_decodes,
            num_decode_positions=self.num_decodes * self.length,
            chunk_lengths=_int32([self.chunk_rows] * self.num_chunks),
            chunk_ends=_int32([self.chunk_end] * self.num_chunks),
            num_draws=self.num_decodes,
            groups=groups,
        )

    def num_pages(self, page_size: int) -> int:
        """Pages of the KV cache that its sequences take."""
        lengths = [self._held_length] * self.num_decodes + [self.chunk_end] * self.num_chunks
        shared = self.prefix // page_size
        return shared + sum(ceil_div(length, page_size) - shared for length in lengths)

    def entering(self, page_size: int) -> ForwardBatch:
        """A batch after which all slots have their pages, and those that decode their lengths."""
        slots = np.arange(self.num_sequences, dtype=np.int32)
        decoding = slots[: self.num_decodes]
        tables = self._tables(page_size)
        batch = ForwardBatch(
            number=0,
            parameters=self._parameters(slots),
            table_slots=np.repeat(slots, [len(pages) for pages in tables]).astype(np.int32),
            table_columns=_int32([column for pages in tables for column in range(len(pages))]),
            table_pages=_int32([page for pages in tables for page in pages]),
        )
        # The timed batch adds the last position.
        return _with_chunks(batch, decoding, 1, self.length - 1)

    def timed(self, page_size: int) -> ForwardBatch:
        """The batch that is measured. A second one finds sequences one position longer."""
        slots = np.arange(self.num_sequences, dtype=np.int32)
        batch = ForwardBatch(number=0, decode_slots=slots[: self.num_decodes])
        if self.prefix:
            batch = msgspec.structs.replace(
                batch,
                group_first_decodes=_int32([0]),
                group_num_decodes=_int32([self.num_decodes]),
                group_first_columns=_int32([0]),
                group_num_columns=_int32([self.prefix // page_size]),
                group_first_chunks=_int32([0]),
                group_num_chunks=_int32([self.num_chunks]),
            )
        return _with_chunks(batch, slots[self.num_decodes :], self.chunk_rows, self.chunk_end)

    @property
    def _held_length(self) -> int:
        """Positions that a sequence has pages for, since two timed batches follow each other."""
        return self.length + 1

    def _tables(self, page_size: int) -> list[list[int]]:
        """The pages of each sequence, scattered as in an engine that has run for long."""
        order = np.random.default_rng(0).permutation(self.num_pages(page_size)).tolist()
        shared = [order.pop() for _ in range(self.prefix // page_size)]
        lengths = [self._held_length] * self.num_decodes + [self.chunk_end] * self.num_chunks
        return [
            shared + [order.pop() for _ in range(ceil_div(length, page_size) - len(shared))]
            for length in lengths
        ]

    def _parameters(self, slots: Int32Array) -> SlotParameters:
        zeros = np.zeros(len(slots), np.int32)
        return SlotParameters(
            slots=slots,
            samplings=(self.sampling,),
            sampling_index=zeros,
            seed=slots.astype(np.int64),
            sample_index=zeros,
            num_generated=zeros,
            num_logprobs=np.full(len(slots), self.num_logprobs, np.int32),
            adjusted=(AdjustedSlots(slots, 0, zeros[:0]),) if self.sampling.adjustments else (),
        )


@dataclass(frozen=True)
class Limits:
    """What a batch of the engine may have, and what measurements may take.

    Attributes:
        max_rows: of a batch.
        max_sequences: of a batch.
        max_length: of a sequence.
        max_positions: of all sequences, in the KV cache that measurements use.
        page_size: in tokens.
    """

    max_rows: int
    max_sequences: int
    max_length: int
    max_positions: int
    page_size: int

    def admit(self, cases: Sequence[Case]) -> list[Case]:
        """Those that fit."""
        return [
            case
            for case in cases
            if case.num_rows <= self.max_rows
            and case.num_sequences <= self.max_sequences
            and max(case.length, case.chunk_end) < self.max_length
            and case.num_pages(self.page_size) * self.page_size <= self.max_positions
            and case.prefix % self.page_size == 0
        ]


# Few rows are measured often, since the kernels' tiles show there.
_DECODES = (
    *(1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128),
    *(160, 192, 256, 384, 512),
)
_ROWS_IN_CHUNKS = (32, 128, 384, 512, 1024, 2048, 4096, 8192)
_SHORT = 16  # rows of a chunk that is its whole prompt


def row_cases(limits: Limits) -> list[Case]:
    """Few rows and many, with next to no context: sequences that decode, and short prompts."""
    cases = [Case(num_decodes=count) for count in _DECODES]
    return limits.admit(cases + [_short_prompts(rows) for rows in _ROWS_IN_CHUNKS])


def _short_prompts(num_rows: int) -> Case:
    return Case(num_chunks=num_rows // _SHORT, chunk_rows=_SHORT, chunk_end=_SHORT)


def attention_cases(limits: Limits) -> list[tuple[Case, Case]]:
    """Pairs of a case with context and one with as many rows and next to none."""
    decodes = [(8, 256), (8, 1024), (32, 128), (32, 384), (64, 192), (128, 96), (1, 2048)]
    cases = [Case(num_decodes=count, length=length) for count, length in decodes]
    cases += [
        Case(num_chunks=count, chunk_rows=rows, chunk_end=end)
        for count, rows, end in (
            (1, 128, 128),
            (1, 128, 512),
            (4, 64, 64),
            (4, 64, 256),
            (1, 512, 512),
            (1, 512, 1024),
        )
    ]
    cases += [
        Case(num_decodes=count, length=prefix + 32, prefix=prefix)
        for count, prefix in ((4, 512), (8, 128), (32, 128), (32, 512), (64, 256), (128, 384))
    ]
    cases += [
        Case(num_chunks=16, chunk_rows=4, chunk_end=prefix + 4, prefix=prefix)
        for prefix in (128, 512)
    ]
    return [(case, _without_context(case)) for case in limits.admit(cases)]


def _without_context(case: Case) -> Case:
    if case.num_decodes:
        return replace(case, length=2, prefix=0)
    return _short_prompts(case.num_rows)


DRAW_ROWS = 32
"""Sequences of each case of ``draw_cases``."""


_PENALTY = Adjustments(frequency_penalty=0.1)


def draw_cases(limits: Limits) -> dict[str, Case]:
    """A case for each kind of draw, by its name in ``DrawCosts``."""
    plain = Case(num_decodes=min(DRAW_ROWS, limits.max_sequences, limits.max_rows))
    return {
        "sampled_s": plain,
        "greedy_s": replace(plain, sampling=Sampling(temperature=0.0)),
        "top_k_s": replace(plain, sampling=Sampling(top_k=50)),
        "top_p_s": replace(plain, sampling=Sampling(top_p=0.9)),
        "adjusted_s": replace(plain, sampling=Sampling(adjustments=_PENALTY)),
        "logprobs_s": replace(plain, num_logprobs=5),
    }


def held_out_cases(limits: Limits) -> list[Case]:
    """Mixed batches, none of which the constants are fitted to."""
    return limits.admit(
        [
            Case(num_decodes=20, length=150, num_chunks=1, chunk_rows=100, chunk_end=100),
            Case(num_decodes=40, length=260),
            Case(num_decodes=10, length=700, num_chunks=2, chunk_rows=70, chunk_end=300),
            Case(num_decodes=80, length=60, num_chunks=3, chunk_rows=90, chunk_end=90),
            Case(num_decodes=48, length=320, prefix=256),
            Case(num_decodes=3, length=1500),
            Case(num_decodes=5, length=200),
            Case(num_decodes=2, length=300, num_chunks=1, chunk_rows=24, chunk_end=60),
            Case(num_chunks=5, chunk_rows=150, chunk_end=200),
        ]
    )


def _with_chunks(batch: ForwardBatch, slots: Int32Array, rows: int, end: int) -> ForwardBatch:
    """The batch with a chunk in each slot, none of which ends its prompt."""
    ones = np.ones(len(slots), np.int32)
    return msgspec.structs.replace(
        batch,
        prefill_slots=slots,
        prefill_starts=ones * np.int32(end - rows),
        prefill_lengths=ones * np.int32(rows),
        prefill_ids=np.full(len(slots) * rows, 11, np.int32),
        prefill_num_logprobs=-ones,
        prefill_next_ids=ones * np.int32(_DRAWS_NOTHING),
    )


def _int32(values: Sequence[int]) -> Int32Array:
    return np.array(values, np.int32)
