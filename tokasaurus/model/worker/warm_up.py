"""The batches a worker runs before it says it is ready."""

from __future__ import annotations

import numpy as np

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import (
    AdjustedSlots,
    Adjustments,
    ForwardBatch,
    LogprobsMode,
    Pooling,
    SlotParameters,
)

__all__ = ["warm_up_batches"]

# A processor promises memory before it has it, so that even the largest batch would prove little, and
# it takes minutes. This many floating-point operations in the layers, hundredths of a second, suffice
# to load libraries and to touch the weights.
_CPU_WORK = 1e9
_MIN_TOKENS = 16

_NONE: Int32Array = np.zeros(0, np.int32)
_ADJUSTMENTS = Adjustments(
    bad_words=((0, 0),), bias=((0, 1.0),), repetition_penalty=1.1, frequency_penalty=0.1
)


def warm_up_batches(config: WorkerConfig, num_parameters: int) -> list[ForwardBatch]:
    """Largest first: a full prefill, then as many decode rows as there may be, and what these need before.

    Every sequence uses the same pages; nobody reads what is computed. All rows sample with every filter, penalty
    and kind of mask, and with the most logprobs that a request may ask for, of prompts too, which are pooled
    besides: all that takes memory at once, or one after the other.

    Args:
        config: the model room's slice.
        num_parameters: of the model.
    """
    num_tokens, num_decodes = config.max_tokens_per_forward, config.max_seqs_per_forward
    if config.device == "cpu":
        affordable = max(int(_CPU_WORK / (2 * num_parameters)), _MIN_TOKENS)
        num_tokens, num_decodes = min(num_tokens, affordable), min(num_decodes, affordable)
    longest = min(config.max_request_tokens, config.num_pages * config.page_size)
    prompts = _prompts(num_tokens, longest, config.num_slots)
    batches = [_prefill(config, 0, prompts)]
    num_decodes = min(num_decodes, config.num_slots)
    if longest > 1:
        batches.append(_prefill(config, 1, np.ones(num_decodes, np.int32)))
        batches.append(_decode(2, num_decodes))
    return batches


def _prompts(num_tokens: int, longest: int, limit: int) -> Int32Array:
    """Lengths of at most ``limit`` prompts with so many tokens together, as long as they may be."""
    full, rest = divmod(num_tokens, longest)
    lengths = [longest] * full + ([rest] if rest else [])
    return np.array(lengths[:limit], np.int32)


def _prefill(config: WorkerConfig, number: int, lengths: Int32Array) -> ForwardBatch:
    slots = np.arange(len(lengths), dtype=np.int32)
    # Room for the decode row that follows, too.
    num_columns = np.minimum(
        lengths // config.page_size + 1, -(-config.max_request_tokens // config.page_size)
    )
    columns = np.concatenate([np.arange(count, dtype=np.int32) for count in num_columns])
    return ForwardBatch(
        number=number,
        parameters=_parameters(slots, config.max_topk_logprobs),
        table_slots=np.repeat(slots, num_columns),
        table_columns=columns,
        table_pages=columns % config.num_pages,
        decode_slots=np.zeros(0, np.int32),
        prefill_slots=slots,
        prefill_starts=np.zeros(len(slots), np.int32),
        prefill_lengths=lengths,
        prefill_ids=np.zeros(lengths.sum(), np.int32),
        prefill_num_logprobs=np.full(len(slots), config.max_topk_logprobs, np.int32),
        prefill_next_ids=np.full(len(slots), -1, np.int32),
        draw_chunks=slots,
        draw_slots=slots,
        copy_sources=_NONE,
        copy_targets=_NONE,
        group_first_rows=_NONE,
        group_num_rows=_NONE,
        group_first_columns=_NONE,
        group_num_columns=_NONE,
        prefill_pooling=np.full(len(slots), Pooling.MEAN, np.int32),
    )


def _decode(number: int, num_slots: int) -> ForwardBatch:
    return ForwardBatch(
        number=number,
        parameters=None,
        table_slots=_NONE,
        table_columns=_NONE,
        table_pages=_NONE,
        decode_slots=np.arange(num_slots, dtype=np.int32),
        prefill_slots=_NONE,
        prefill_starts=_NONE,
        prefill_lengths=_NONE,
        prefill_ids=_NONE,
        prefill_num_logprobs=_NONE,
        prefill_next_ids=_NONE,
        draw_chunks=_NONE,
        draw_slots=_NONE,
        copy_sources=_NONE,
        copy_targets=_NONE,
        group_first_rows=_NONE,
        group_num_rows=_NONE,
        group_first_columns=_NONE,
        group_num_columns=_NONE,
    )


def _parameters(slots: Int32Array, num_logprobs: int) -> SlotParameters:
    count = len(slots)
    return SlotParameters(
        slots=slots,
        temperature=np.full(count, 0.9, np.float32),
        top_k=np.full(count, 50, np.int32),
        top_p=np.full(count, 0.9, np.float32),
        min_p=np.full(count, 0.01, np.float32),
        seed=slots.astype(np.int64),
        sample_index=np.zeros(count, np.int32),
        num_generated=np.zeros(count, np.int32),
        num_logprobs=np.full(count, num_logprobs, np.int32),
        logprobs_mode=np.full(count, LogprobsMode.PROCESSED, np.int32),
        adjusted=(AdjustedSlots(slots, _ADJUSTMENTS, np.zeros(1, np.int32)),),
    )
