"""Computes the logprobs of tokens, for the rows that ask, and no more than each asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.sampling.kinds import RowsOfKind, plan_rows
from tokasaurus.model.sampling.logit_rows import LogitRows
from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.sampling.ranking import ranked
from tokasaurus.model.sampling.sampler import processed
from tokasaurus.model.upload import Staged, Staging
from tokasaurus.protocol.arrays import Int32Array
from tokasaurus.protocol.messages import LogprobsMode

__all__ = ["Logprobs", "RowsOfMode", "logprobs_of", "plan_logprobs"]


@dataclass(frozen=True)
class Logprobs:
    """Logprobs of rows. Where a row asked for none, numbers are NaN and ids are -1.

    Attributes:
        chosen: [rows] fp32.
        top_ids: [rows, K] int64, best first.
        top: [rows, K] fp32. The chosen token's number equals the best one's if and only if no logit
            is above the chosen token's.
        ranks: [rows] int64, 1 plus the number of tokens with higher logits than the chosen one; -1
            where the row asked for no logprobs, and if the caller wanted no ranks.
    """

    chosen: Tensor
    top_ids: Tensor
    top: Tensor
    ranks: Tensor

    @classmethod
    def none(cls, num_chosen: int, num_rows: int) -> Logprobs:
        """For rows that asked for none. ``num_chosen`` is 0 to leave their numbers out."""
        return cls(
            torch.full((num_chosen,), torch.nan),
            torch.empty(num_rows, 0, dtype=torch.int64),
            torch.empty(num_rows, 0),
            torch.full((num_chosen,), -1),
        )

    @classmethod
    def joined(cls, parts: list[Logprobs]) -> Logprobs:
        """The rows of all parts. There is at least one part; all have the same width."""
        return cls(
            torch.cat([part.chosen for part in parts]),
            torch.cat([part.top_ids for part in parts]),
            torch.cat([part.top for part in parts]),
            torch.cat([part.ranks for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class RowsOfMode:
    """Rows that ask for logprobs of one mode.

    Attributes:
        mode: of their distribution.
        index: [rows] int64, among the rows of the logits; None if they are all rows.
        kinds: of these rows, which make the distribution of the logits.
        top: of those that ask for top tokens. None if none of these rows does.
    """

    mode: LogprobsMode
    index: Staged | None
    kinds: list[RowsOfKind]
    top: RowsWithTop | None


@dataclass(frozen=True, eq=False)
class RowsWithTop:
    """Rows of one mode that ask for top tokens.

    Attributes:
        index: [some] int64, among the rows of the mode.
        rows: [some] int64, the same rows, among the rows of the logits.
        num_top: [some, 1] int64, the number of top tokens of each.
        depth: the largest of these numbers, or the size of the vocabulary.
    """

    index: Staged
    rows: Staged
    num_top: Staged
    depth: int


def plan_logprobs(
    parameters: SamplingParameters, vocab_size: int, staging: Staging
) -> list[RowsOfMode]:
    """Sorts the rows that ask for logprobs by mode.

    Args:
        parameters: of the rows: the number of logprobs of each, and their distribution.
        vocab_size: of the logits.
        staging: sends the numbers.
    """
    asks = parameters["num_logprobs"] >= 0
    planned: list[RowsOfMode] = []
    if not asks.any():
        return planned
    for mode in LogprobsMode:
        rows = np.flatnonzero(asks & (parameters["logprobs_mode"] == mode))
        if len(rows):
            index = None if len(rows) == len(parameters) else staging.add_indices(rows)
            chosen = parameters.take(rows)
            kinds = _kinds(mode, chosen, vocab_size, staging)
            top = _with_top(rows, chosen["num_logprobs"], vocab_size, staging)
            planned.append(RowsOfMode(mode, index, kinds, top))
    return planned


def _kinds(
    mode: LogprobsMode, parameters: SamplingParameters, vocab_size: int, staging: Staging
) -> list[RowsOfKind]:
    if mode is LogprobsMode.RAW:
        return []
    if mode is LogprobsMode.TEMPERATURE:
        parameters = parameters.without_filters()
    return plan_rows(parameters, vocab_size, staging, draws=False)


def _with_top(
    rows: NDArray[np.intp], num_top: Int32Array, vocab_size: int, staging: Staging
) -> RowsWithTop | None:
    index = np.flatnonzero(num_top)
    if not len(index):
        return None
    return RowsWithTop(
        staging.add_indices(index),
        staging.add_indices(rows[index]),
        staging.add_indices(num_top[index, None]),
        min(int(num_top.max()), vocab_size),
    )


def logprobs_of(
    logits: Tensor,
    token_ids: Tensor,
    plan: list[RowsOfMode],
    width: int,
    adjusted: Tensor | None = None,
    *,
    with_ranks: bool = False,
) -> Logprobs:
    """Logprobs of chosen tokens and of each row's best tokens.

    Args:
        logits: [rows, vocabulary] fp32.
        token_ids: [rows] int64.
        plan: of the same rows.
        width: K, at least the largest number that a row asks for.
        adjusted: the logits that the rows were drawn from, if others. Only ``PROCESSED`` uses them.
        with_ranks: whether to compute ranks.
    """
    num_rows = len(logits)
    result = Logprobs(
        logits.new_full((num_rows,), torch.nan),
        token_ids.new_full((num_rows, width), -1),
        logits.new_full((num_rows, width), torch.nan),
        token_ids.new_full((num_rows,), -1),
    )
    for rows in plan:
        source = (
            adjusted if adjusted is not None and rows.mode is LogprobsMode.PROCESSED else logits
        )
        _fill(result, source, token_ids, rows, with_ranks)
    return result


def _fill(
    result: Logprobs, logits: Tensor, token_ids: Tensor, rows: RowsOfMode, with_ranks: bool
) -> None:
    """Writes the numbers of rows of one mode."""
    index = slice(None) if rows.index is None else rows.index.tensor
    scores = processed(logits if rows.index is None else logits[index], rows.kinds)
    # x - logsumexp(x) is finite wherever x is; the logarithm of a probability underflows.
    norm = scores.logsumexp(dim=-1, keepdim=True)
    picked = scores.gather(1, token_ids[index, None])
    result.chosen[index] = (picked - norm)[:, 0]
    if with_ranks:
        result.ranks[index] = 1 + (scores > picked).sum(dim=-1)
    if rows.top is None:
        return
    some, target = rows.top.index.tensor, rows.top.rows.tensor
    norm, depth = norm[some], rows.top.depth
    best, ids = ranked(LogitRows(scores, some), depth)
    result.chosen[target] = _below_the_best(picked[some], best, norm)[:, 0]
    is_wanted = torch.arange(depth, device=ids.device) < rows.top.num_top.tensor
    result.top_ids[target, :depth] = ids.where(is_wanted, -1)
    values = _below_the_best(best, best, norm)
    result.top[target, :depth] = values.where(is_wanted, torch.nan)


def _below_the_best(scores: Tensor, best: Tensor, norm: Tensor) -> Tensor:
    """Logprobs of scores, [rows, some]; a score below the best gets a number below the best one's.

    Subtraction may round two scores to one number, and clients compare them to find the likeliest.
    """
    values, first = scores - norm, best[:, :1] - norm
    is_mistaken = (values == first) & (scores < best[:, :1])
    return values.where(~is_mistaken, values.nextafter(values.new_full((), -torch.inf)))
