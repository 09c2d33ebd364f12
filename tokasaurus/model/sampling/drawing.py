"""Turns hidden states into tokens and logprobs, for the rows that need them.

The vocabulary is large, and most rows of a prompt need no logits. So only chosen rows go through
the head, the sampler and the logprobs, one part at a time, and [all rows, vocabulary] never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokasaurus.model.architectures.llama_model import LlamaModel
from tokasaurus.model.sampling.adjustments import AdjustmentTable
from tokasaurus.model.sampling.matchers import TokenMasks
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.sampling.rows import PromptRows, SamplingRows
from tokasaurus.model.sampling.sampler import Logprobs, draw, logprobs_of

__all__ = ["draw_tokens", "score_prompts"]

# Elements of the logits of one part: 128 MiB in fp32. Sampling and logprobs take a few times as
# much while they work on a part, for any number of rows and any vocabulary.
_MAX_LOGITS = 1 << 25


def draw_tokens(
    model: LlamaModel,
    hidden: Tensor,
    rows: SamplingRows,
    adjustments: AdjustmentTable,
    masks: TokenMasks | None,
) -> tuple[Tensor, Logprobs | None]:
    """Draws one token for each sampling row.

    Args:
        model: its head is used.
        hidden: [rows of the batch, hidden].
        rows: the rows to draw from, and how to sample each.
        adjustments: of all slots.
        masks: the tokens that grammars allow; None if no row has a grammar.

    Returns:
        [sampling rows] int64, and their logprobs if any row asked.
    """
    tokens = torch.empty(len(rows.rows), dtype=torch.int64, device=hidden.device)
    wanted = bool((rows.parameters["num_logprobs"] >= 0).any())
    width = _width(rows.parameters)
    parts = []
    for part, logits in _logits(model, hidden, rows.rows):
        parameters = rows.parameters.take(part)
        adjusted = adjustments.adjusted(logits, rows.slots[part], parameters["num_generated"])
        if masks is not None:
            adjusted = masks.apply(adjusted, logits, part)
        tokens[part] = draw(adjusted, parameters)
        if wanted:
            parts.append(logprobs_of(logits, tokens[part], parameters, width, adjusted))
    return tokens, Logprobs.joined(parts) if wanted else None


def score_prompts(model: LlamaModel, hidden: Tensor, rows: PromptRows) -> Logprobs:
    """Logprobs of the prompt tokens that follow prompt rows, in the mode of each row's sequence.

    Args:
        model: its head is used.
        hidden: [rows of the batch, hidden].
        rows: at least one row, and the token that follows each.
    """
    width = _width(rows.parameters)
    return Logprobs.joined(
        [
            logprobs_of(logits, rows.next_ids[part], rows.parameters.take(part), width, ranked=True)
            for part, logits in _logits(model, hidden, rows.rows)
        ]
    )


def _width(parameters: SamplingParameters) -> int:
    return max(int(parameters["num_logprobs"].max(initial=0)), 0)


def _logits(model: LlamaModel, hidden: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields parts of ``rows`` and their logits, [rows of the part, vocabulary] in fp32."""
    step = max(_MAX_LOGITS // model.vocab_size, 1)
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, model.logits(hidden[rows[part]]).to(torch.float32)
