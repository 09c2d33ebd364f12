"""Turns hidden states into tokens and logprobs, for the rows that need them.

The vocabulary is large, and most rows of a prompt need no logits. So only chosen rows go through
the head, the sampler and the logprobs, one part at a time, and [all rows, vocabulary] never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.backend.base import SamplingKernels
from tokasaurus.model.sampling.adjustments import AdjustmentTable
from tokasaurus.model.sampling.draws import plan_row_draws
from tokasaurus.model.sampling.logprobs import Logprobs, logprobs_of, plan_logprobs
from tokasaurus.model.sampling.matchers import TokenMasks
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.sampling.rows import DrawingPart, PromptRows, SamplingRows, ScoringPart
from tokasaurus.model.upload import Staging
from tokasaurus.protocol.arrays import Int32Array

__all__ = ["draw_tokens", "give_logits", "plan_draws", "plan_scores", "score_prompts"]

# Elements of the logits of one part: 128 MiB in fp32. Sampling and logprobs take a few times as
# much while they work on a part, for any number of rows and any vocabulary.
_MAX_LOGITS = 1 << 25


def plan_draws(
    rows: Int32Array,
    slots: Int32Array,
    parameters: SamplingParameters,
    adjustments: AdjustmentTable,
    vocab_size: int,
    staging: Staging,
    kernels: SamplingKernels | None = None,
) -> SamplingRows:
    """Plans the draws of a batch.

    Args:
        rows: [sampling rows], among those of the batch.
        slots: [sampling rows], that draw.
        parameters: of the same rows.
        adjustments: of all slots. Their histories go on as if the tokens were drawn.
        vocab_size: of the model.
        staging: sends what the draws need.
        kernels: of the device; None if it has none of its own.
    """
    parts = []
    for part in _parts(len(rows), vocab_size):
        some = parameters.take(part)
        parts.append(
            DrawingPart(
                part,
                plan_row_draws(some, vocab_size, staging, kernels),
                plan_logprobs(some, vocab_size, staging, kernels),
                adjustments.plan(slots[part], some["num_generated"], staging),
            )
        )
    num_logprobs = int(parameters["num_logprobs"].max(initial=-1))
    return SamplingRows(
        staging.add_indices(rows),
        slots,
        staging.add_indices(slots),
        parts,
        num_logprobs if num_logprobs >= 0 else None,
        adjustments.plan_record(slots, staging),
    )


def plan_scores(
    rows: NDArray[np.intp],
    next_ids: Int32Array,
    parameters: SamplingParameters,
    vocab_size: int,
    staging: Staging,
    kernels: SamplingKernels | None = None,
) -> PromptRows:
    """Plans the logprobs of prompt tokens.

    Args:
        rows: [prompt tokens], at least one, among those of the batch.
        next_ids: [prompt tokens].
        parameters: of the same rows, all of which ask for logprobs.
        vocab_size: of the model.
        staging: sends what is needed.
        kernels: as for ``plan_draws``.
    """
    parts = [
        ScoringPart(part, plan_logprobs(parameters.take(part), vocab_size, staging, kernels))
        for part in _parts(len(rows), vocab_size)
    ]
    num_top = int(parameters["num_logprobs"].max())
    return PromptRows(staging.add_indices(rows), staging.add_indices(next_ids), parts, num_top)


def draw_tokens(
    model: LlamaModel, hidden: Tensor, rows: SamplingRows, masks: TokenMasks | None
) -> tuple[Tensor, Logprobs | None]:
    """Draws one token for each sampling row.

    Args:
        model: its head is used.
        hidden: [rows of the batch, hidden].
        rows: the rows to draw from, and how to sample each.
        masks: the tokens that grammars allow; None if no row has a grammar.

    Returns:
        [sampling rows] int64, and their logprobs if any row asked.
    """
    tokens = torch.empty(len(rows.slots), dtype=torch.int64, device=hidden.device)
    sent = masks.send(hidden.device) if masks is not None else None
    logprobs = []
    for part in rows.parts:
        logits = adjusted = _logits(model, hidden, rows.rows.tensor[part.rows])
        if part.adjustments is not None:
            adjusted = part.adjustments.apply(logits)
        if sent is not None:
            adjusted = sent.apply(adjusted, logits, part.rows)
        drawn = tokens[part.rows] = part.draws.draw(adjusted)
        if rows.num_top is not None:
            logprobs.append(logprobs_of(logits, drawn, part.logprobs, rows.num_top, adjusted))
    return tokens, Logprobs.joined(logprobs) if logprobs else None


def score_prompts(model: LlamaModel, hidden: Tensor, rows: PromptRows) -> Logprobs:
    """Logprobs of the prompt tokens that follow prompt rows, in the mode of each row's sequence.

    Args:
        model: its head is used.
        hidden: [rows of the batch, hidden].
        rows: at least one row, and the token that follows each.
    """
    logprobs = []
    for part in rows.parts:
        logits = _logits(model, hidden, rows.rows.tensor[part.rows])
        next_ids = rows.next_ids.tensor[part.rows]
        logprobs.append(logprobs_of(logits, next_ids, part.logprobs, rows.num_top, with_ranks=True))
    return Logprobs.joined(logprobs)


def give_logits(
    model: LlamaModel, hidden: Tensor, rows: SamplingRows, prompt: PromptRows | None
) -> None:
    """At a rank that has a part of the head and does not sample: gives its logits of each part.

    The rank that samples draws tokens and scores prompts meanwhile, in this order.

    Args:
        model: its head is used.
        hidden: [rows of the batch, hidden].
        rows: that are drawn from.
        prompt: rows that are scored, if there are any.
    """
    for part in rows.parts:
        _logits(model, hidden, rows.rows.tensor[part.rows])
    if prompt is not None:
        for scored in prompt.parts:
            _logits(model, hidden, prompt.rows.tensor[scored.rows])


def _parts(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """All rows, a part of bounded size at a time."""
    step = max(_MAX_LOGITS // vocab_size, 1)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _logits(model: LlamaModel, hidden: Tensor, rows: Tensor) -> Tensor:
    """[rows, vocabulary] in the model's dtype; [0, vocabulary] at a rank that does not sample."""
    return model.logits(hidden[rows])
