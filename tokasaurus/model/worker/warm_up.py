"""The batches that a worker runs before it reports ready."""

from __future__ import annotations

import msgspec
import numpy as np

from tokasaurus.config.slices import WorkerConfig
from tokasaurus.model.sampling.sampler import MOST_MEMORY
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import (
    AdjustedSlots,
    Adjustments,
    ForwardBatch,
    LogprobsMode,
    Pooling,
    Sampling,
    SlotParameters,
)
from tokasaurus.rounding import ceil_div

__all__ = ["warm_up_batches"]

# On the CPU the operating system promises memory that it may not have, so even the largest batch
# would prove little, and a full one takes minutes. A batch with this number of floating-point
# operations in its layers, or of _MIN_TOKENS, is enough to load libraries and touch the weights.
_CPU_WORK = 1e9
_MIN_TOKENS = 16

_SAMPLING = msgspec.structs.replace(
    MOST_MEMORY,
    logprobs_mode=LogprobsMode.PROCESSED,
    adjustments=Adjustments(
        bad_words=((0, 0),), bias=((0, 1.0),), repetition_penalty=1.1, frequency_penalty=0.1
    ),
)
# What most requests ask for.
_PLAIN = Sampling(temperature=1.0, logprobs_mode=LogprobsMode.RAW)


def warm_up_batches(config: WorkerConfig, num_parameters: int) -> list[ForwardBatch]:
    """A full prefill first, then as many decode rows as a batch can have, after their prompts.

    Every sequence uses the same pages; the results are not read. The batches cover everything that
    takes memory: all rows sample with every filter, penalty and kind of mask, and ask for the most
    logprobs that a request may ask for. So do the prompts, which are pooled too.

    The last one is small, and adjusts nothing. Adjusted logits are in fp32 and others are not, and
    kernels are compiled for a dtype: so they are compiled for both before any request waits.

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
        slots = np.arange(num_decodes, dtype=np.int32)
        batches.append(ForwardBatch(number=2, decode_slots=slots))
    # For one row, other kernels may run than for several.
    batches.append(_prefill(config, len(batches), np.ones(1, np.int32)))
    # The first of two tokens gives a logprob of the prompt.
    lengths = np.full(1, min(2, longest, num_tokens), np.int32)
    batches.append(_prefill(config, len(batches), lengths, _PLAIN))
    return batches


def _prompts(num_tokens: int, longest: int, limit: int) -> Int32Array:
    """Lengths of at most ``limit`` prompts of ``num_tokens`` in all, as long as allowed."""
    full, rest = divmod(num_tokens, longest)
    lengths = [longest] * full + ([rest] if rest else [])
    return np.array(lengths[:limit], np.int32)


def _prefill(
    config: WorkerConfig, number: int, lengths: Int32Array, sampling: Sampling = _SAMPLING
) -> ForwardBatch:
    slots = np.arange(len(lengths), dtype=np.int32)
    # This includes room for the decode row that follows.
    num_columns = np.minimum(
        lengths // config.page_size + 1, ceil_div(config.max_request_tokens, config.page_size)
    )
    columns = np.concatenate([np.arange(count, dtype=np.int32) for count in num_columns])
    return ForwardBatch(
        number=number,
        parameters=_parameters(slots, config.max_topk_logprobs, sampling),
        table_slots=np.repeat(slots, num_columns),
        table_columns=columns,
        table_pages=columns % config.num_pages,
        prefill_slots=slots,
        prefill_starts=np.zeros(len(slots), np.int32),
        prefill_lengths=lengths,
        prefill_ids=np.zeros(lengths.sum(), np.int32),
        prefill_num_logprobs=np.full(len(slots), config.max_topk_logprobs, np.int32),
        prefill_next_ids=np.full(len(slots), -1, np.int32),
        draw_chunks=slots,
        draw_slots=slots,
        prefill_pooling=np.full(len(slots), Pooling.MEAN, np.int32),
    )


def _parameters(slots: Int32Array, num_logprobs: int, sampling: Sampling) -> SlotParameters:
    count = len(slots)
    adjusted: tuple[AdjustedSlots, ...] = ()
    if sampling.adjustments is not None:
        adjusted = (AdjustedSlots(slots, 0, np.zeros(1, np.int32)),)
    return SlotParameters(
        slots=slots,
        samplings=(sampling,),
        sampling_index=np.zeros(count, np.int32),
        seed=slots.astype(np.int64),
        sample_index=np.zeros(count, np.int32),
        num_generated=np.zeros(count, np.int32),
        num_logprobs=np.full(count, num_logprobs, np.int32),
        adjusted=adjusted,
    )
