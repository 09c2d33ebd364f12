"""What a mask of tokens does to logits, in torch. It defines the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mask_rows"]


def mask_rows(adjusted: Tensor, logits: Tensor, rows: Tensor, bits: Tensor) -> Tensor:
    """Some rows with -inf for tokens that are not allowed, and the others as they are.

    Args:
        adjusted: [rows, vocabulary]. Never changed.
        logits: before adjustments; may be the same tensor. A row of them replaces one in which
            adjustments forbid every allowed token: the mask wins.
        rows: [masks] int64, which rows have one, each once and ascending.
        bits: [masks, bytes of the vocabulary] uint8, lowest bit first; an allowed token's bit is
            set.
    """
    places = (1 << torch.arange(8, device=logits.device)).to(torch.uint8)
    forbidden = (bits[:, :, None] & places == 0).flatten(1)[:, : logits.shape[1]]
    everything = len(rows) == len(logits)  # then no row is moved

    def masked(values: Tensor) -> Tensor:
        some = values if everything else values.index_select(0, rows)
        return some.masked_fill(forbidden, -torch.inf)

    result = masked(adjusted)
    if adjusted is not logits:
        none_left = result.amax(dim=-1, keepdim=True) == -torch.inf
        result = torch.where(none_left, masked(logits), result)
    return result if everything else adjusted.index_copy(0, rows, result)
