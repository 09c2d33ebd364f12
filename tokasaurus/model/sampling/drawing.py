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
from tokasaurus.model.sampling.draws import Draws, KernelDraws, plan_row_draws
from tokasaurus.model.sampling.logprobs import Logprobs, logprobs_of, plan_logprobs
from tokasaurus.model.sampling.matchers import TokenMasks
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.sampling.rows import DrawingPart, PromptRows, SamplingRows, ScoringPart
from tokasaurus.model.upload import OnDevice, Staging
from tokasaurus.protocol.arrays import Int32Array

__all__ = ["draw_tokens", "give_logits", "plan_draws", "plan_scores", "score_prompts"]

# Elements of the logits of one part: 128 MiB in fp32. Sampling and logprobs take a few times as
# much while they work on a part, for any number of rows and any vocabulary.
_MAX_LOGITS = 1 << 25

# Of the head's product, if a part has so many: a few rows more would be another tile.
_TILE_ROWS = 128


def plan_draws(
    rows: OnDevice | None,
    slots: Int32Array,
    device_slots: OnDevice,
    table: SamplingParameters,
    adjustments: AdjustmentTable,
    vocab_size: int,
    staging: Staging,
    kernels: SamplingKernels | None = None,
    draws: OnDevice | None = None,
) -> SamplingRows:
    """Plans the draws of a batch.

    Args:
        rows: as in ``SamplingRows``, like the next two.
        slots: [sampling rows], that draw.
        device_slots: the same on the device.
        table: the parameters of all slots.
        adjustments: of all slots. Their histories go on as if the tokens were drawn.
        vocab_size: of the model.
        staging: sends what the draws need.
        kernels: of the device; None if it has none of its own.
        draws: for the kernels, [sampling rows, bytes] uint8, a ``DRAW`` for each.
    """
    num_top = int(table["num_logprobs"][slots].max(initial=-1))
    is_adjusted = adjustments.asks(slots)
    # Where a kernel draws and nothing else is asked for, the device has all that it needs.
    is_known = draws is not None and num_top < 0 and not is_adjusted
    parameters = table.take(slots[:0] if is_known else slots)
    parts = []
    for part in _parts(len(slots), vocab_size):
        some = parameters.take(part)
        row_draws: Draws
        if kernels is None or draws is None:
            row_draws = plan_row_draws(some, vocab_size, staging, kernels)
        else:
            row_draws = KernelDraws(kernels, draws, part)
        logprobs = plan_logprobs(some, vocab_size, staging, kernels) if num_top >= 0 else []
        adjusted = None
        if is_adjusted:
            adjusted = adjustments.plan(slots[part], some["num_generated"], staging)
        parts.append(DrawingPart(part, row_draws, logprobs, adjusted))
    return SamplingRows(
        rows,
        slots,
        device_slots,
        parts,
        num_top if num_top >= 0 else None,
        adjustments.plan_record(slots, staging),
        kernels,
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
    sent = masks.send(hidden.device, rows.kernels) if masks is not None else None
    logprobs = []
    for part in rows.parts:
        logits = adjusted = model.logits(_hidden_of(hidden, rows.rows, part.rows))
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
        logits = model.logits(_hidden_of(hidden, rows.rows, part.rows))
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
        model.logits(_hidden_of(hidden, rows.rows, part.rows))
    if prompt is not None:
        for scored in prompt.parts:
            model.logits(_hidden_of(hidden, prompt.rows, scored.rows))


def _parts(num_rows: int, vocab_size: int) -> Iterator[slice]:
    """All rows, a part of bounded size at a time."""
    step = max(_MAX_LOGITS // vocab_size, 1)
    if step > _TILE_ROWS:
        step -= step % _TILE_ROWS
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _hidden_of(hidden: Tensor, rows: OnDevice | None, part: slice) -> Tensor:
    """[rows of the part, hidden]."""
    return hidden[part] if rows is None else hidden.index_select(0, rows.tensor[part])
