"""Requests that go on here after samples have generated tokens elsewhere: what they must say."""

from __future__ import annotations

import numpy as np

from tokasaurus.protocol.messages import GenerateRequest, Pooling, Progress

__all__ = ["progress_refusal", "reads_whole_prompt"]


def reads_whole_prompt(request: GenerateRequest) -> bool:
    """Whether an output for every prompt token is asked for, which sample 0 brings."""
    return request.num_prompt_logprobs >= 0 or request.pooling is Pooling.MEAN


def progress_refusal(request: GenerateRequest, progress: Progress) -> str | None:
    """Why the progress of a request makes no sense; None if it does."""
    indices, counts = progress.sample_indices, progress.num_generated
    num_samples = len(indices)
    if num_samples == 0:
        return "progress names no sample"
    if indices[0] < 0 or indices[-1] >= request.n or (np.diff(indices) <= 0).any():
        return f"progress must name samples in ascending order, from 0 to {request.n - 1}"
    if len(counts) != num_samples:
        return f"progress has {len(counts)} numbers of tokens for {num_samples} samples"
    if (counts < 0).any() or (counts >= request.max_tokens).any():
        return f"each sample of progress must have fewer than max_tokens={request.max_tokens}"
    total = int(counts.sum())
    if total != len(progress.generated_ids):
        return f"progress has {len(progress.generated_ids)} ids for {total} tokens"
    if not 0 <= progress.num_finished <= request.n - num_samples:
        return (
            f"progress has {num_samples} samples and {progress.num_finished} that have finished,"
            f" and n is {request.n}"
        )
    if 0 < request.first_k <= progress.num_finished:
        return f"{progress.num_finished} samples have finished, and first_k is {request.first_k}"
    if indices[0] == 0 and counts[0] and reads_whole_prompt(request):
        return "the outputs for a prompt come before the first token of sample 0"
    return None
