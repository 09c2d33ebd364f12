"""Ranks tokens by logit, and equal ones by id, without sorting a vocabulary where few are wanted.

The first k tokens of a ranking lie in the k blocks whose best tokens rank highest. So the best of
each block is found first, which reads the logits once, and only those k blocks are looked into::

    logits   3 1 │ 9 2 │ 4 9 │ 0 8        blocks of 2, of which the first 2 tokens are wanted
    best      3  │  9  │  9  │  8
    blocks         ▲     ▲
    ranking  9 (id 2), 9 (id 5)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokasaurus.model.sampling.logit_rows import LogitRows
from tokasaurus.rounding import ceil_div

__all__ = ["WIDTH", "first_of", "most_ranked", "ranked", "sorted_logits"]

WIDTH = 64
"""Of a block, in tokens."""

# Vocabularies in which looking at every token takes no longer than looking for its block.
_SMALL_VOCABULARY = 4096
_MAX_ID = (1 << 31) - 1


def most_ranked(vocab_size: int) -> int:
    """The longest beginning of a ranking that ``ranked`` finds; a longer one is better sorted."""
    return vocab_size // (2 * WIDTH)


def first_of(logits: LogitRows) -> Tensor:
    """[rows]: the id of each row's first token."""
    if logits.vocab_size <= _SMALL_VOCABULARY:
        return logits.whole().argmax(dim=-1)
    blocks = _best_of_blocks(logits).argmax(dim=-1, keepdim=True)
    ids = blocks * WIDTH + torch.arange(WIDTH, device=logits.device)
    # Beyond the vocabulary the last token stands again, and argmax finds the first of equals.
    ids.clamp_(max=logits.vocab_size - 1)
    return ids.gather(1, logits.gather(ids).argmax(dim=-1, keepdim=True))[:, 0]


def ranked(logits: LogitRows, depth: int) -> tuple[Tensor, Tensor]:
    """The first tokens of each row's ranking.

    Args:
        logits: fp32.
        depth: how many, at most all. ``most_ranked`` is where this begins to take long.

    Returns:
        Logits and ids, [rows, depth] each.
    """
    if depth > most_ranked(logits.vocab_size):
        return _ranked_among_all(logits, depth)
    best = _best_of_blocks(logits)
    blocks = torch.arange(best.shape[1], device=logits.device)
    blocks = _id_of(_rank(best, blocks).topk(depth, dim=-1).values)
    ids = blocks[:, :, None] * WIDTH + torch.arange(WIDTH, device=logits.device)
    ids = ids.flatten(1)
    rank = _rank(logits.gather(ids.clamp(max=logits.vocab_size - 1)), ids)
    if logits.vocab_size % WIDTH:
        rank = rank.where(ids < logits.vocab_size, torch.iinfo(torch.int64).min)
    ids = _id_of(rank.topk(depth, dim=-1).values)
    return logits.gather(ids), ids


def _ranked_among_all(logits: LogitRows, depth: int) -> tuple[Tensor, Tensor]:
    all_ids = torch.arange(logits.vocab_size, device=logits.device)
    ids = [_id_of(_rank(some, all_ids).topk(depth, dim=-1).values) for _, some in logits.parts()]
    return logits.gather(torch.cat(ids)), torch.cat(ids)


def sorted_logits(logits: Tensor) -> Tensor:
    """The logits of each row in descending order; numpy's sort on the CPU is 30 times as fast."""
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.numpy(), axis=-1)).flip(-1)
    return logits.sort(dim=-1, descending=True).values


def _best_of_blocks(logits: LogitRows) -> Tensor:
    """[rows, blocks]: the highest logit of each block. The last block may be short."""
    num_whole = logits.vocab_size // WIDTH
    end = num_whole * WIDTH
    shape = len(logits), ceil_div(logits.vocab_size, WIDTH)
    best = torch.empty(shape, dtype=torch.float32, device=logits.device)
    for part, some in logits.parts():
        best[part, :num_whole] = some[:, :end].view(len(some), num_whole, WIDTH).amax(dim=-1)
        if end < logits.vocab_size:
            best[part, num_whole] = some[:, end:].amax(dim=-1)
    return best


def _rank(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 numbers that are ordered like the tokens: by logit, then by descending id.

    The bits of fp32 numbers are ordered like the numbers if they are positive, and the other way
    round if they are negative. All numbers of a row differ, so each order of them is the same.
    """
    # Adding 0 makes -0.0 equal to 0.0.
    bits = (logits + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & _MAX_ID)
    return (ordered.to(torch.int64) << 32) + (_MAX_ID - ids)


def _id_of(rank: Tensor) -> Tensor:
    return _MAX_ID - (rank & _MAX_ID)
