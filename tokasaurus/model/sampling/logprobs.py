"""Computes the logprobs of tokens, for the rows that ask, and no more than each asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.backend.base import SamplingKernels
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
            torch.full((num_chosen,), torch.nan, dtype=torch.float32),
            torch.empty(num_rows, 0, dtype=torch.int64),
            torch.empty(num_rows, 0, dtype=torch.float32),
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
        kernels: of the device; None if it has none of its own.
    """

    mode: LogprobsMode
    index: Staged | None
    kinds: list[RowsOfKind]
    top: RowsWithTop | None
    kernels: SamplingKernels | None

    @property
    def is_unfiltered(self) -> bool:
        """Whether the distribution is that of the logits at one temperature for each row."""
        return not self.kinds or (len(self.kinds) == 1 and self.kinds[0].is_unfiltered)

    @property
    def temperature(self) -> Tensor | None:
        """[rows] fp32, of unfiltered rows; None if all are 1."""
        staged = self.kinds[0].temperature if self.kinds else None
        return None if staged is None else staged.tensor[:, 0]


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
    parameters: SamplingParameters,
    vocab_size: int,
    staging: Staging,
    kernels: SamplingKernels | None = None,
) -> list[RowsOfMode]:
    """Sorts the rows that ask for logprobs by mode.

    Args:
        parameters: of the rows: the number of logprobs of each, and their distribution.
        vocab_size: of the logits.
        staging: sends the numbers.
        kernels: of the device; None if it has none of its own.
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
            planned.append(RowsOfMode(mode, index, kinds, top, kernels))
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
        logits: [rows, vocabulary] fp32, bf16 or fp16.
        token_ids: [rows] int64.
        plan: of the same rows.
        width: K, at least the largest number that a row asks for.
        adjusted: the logits that the rows were drawn from, if others. Only ``PROCESSED`` uses them.
        with_ranks: whether to compute ranks.
    """
    num_rows = len(logits)
    result = Logprobs(
        logits.new_full((num_rows,), torch.nan, dtype=torch.float32),
        token_ids.new_full((num_rows, width), -1),
        logits.new_full((num_rows, width), torch.nan, dtype=torch.float32),
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
    scores = _scores(logits, rows)
    # x - logsumexp(x) is finite wherever x is; the logarithm of a probability underflows.
    norm, num_higher = scores.log_sums(token_ids[index] if with_ranks else None)
    picked = scores.of(token_ids[index])
    result.chosen[index] = (picked - norm)[:, 0]
    if num_higher is not None:
        result.ranks[index] = 1 + num_higher
    if rows.top is None:
        return
    some, target = rows.top.index.tensor, rows.top.rows.tensor
    norm, depth = norm[some], rows.top.depth
    best, ids = scores.ranked(rows.top, depth)
    result.chosen[target] = _below_the_best(picked[some], best, norm)[:, 0]
    is_wanted = torch.arange(depth, device=ids.device) < rows.top.num_top.tensor
    result.top_ids[target, :depth] = ids.where(is_wanted, -1)
    values = _below_the_best(best, best, norm)
    result.top[target, :depth] = values.where(is_wanted, torch.nan)


class _Scores(Protocol):
    """The scores of rows of one mode."""

    def log_sums(self, token_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[rows, 1]: the logarithms of the sums of e^score; and how many tokens are above some.

        Args:
            token_ids: [rows] int64; None if these numbers are not wanted.
        """
        ...

    def of(self, token_ids: Tensor) -> Tensor:
        """[rows, 1] fp32, for ids of [rows] int64."""
        ...

    def ranked(self, top: RowsWithTop, depth: int) -> tuple[Tensor, Tensor]:
        """Scores and ids of the first tokens of the ranking, [some, depth] each."""
        ...


class _TorchScores:
    """Implements ``_Scores`` for [rows, vocabulary] fp32."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores

    def log_sums(self, token_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        norm = self._scores.logsumexp(dim=-1, keepdim=True)
        if token_ids is None:
            return norm, None
        return norm, (self._scores > self.of(token_ids)).sum(dim=-1)

    def of(self, token_ids: Tensor) -> Tensor:
        return self._scores.gather(1, token_ids[:, None])

    def ranked(self, top: RowsWithTop, depth: int) -> tuple[Tensor, Tensor]:
        return ranked(LogitRows(self._scores, top.index.tensor), depth)


class _KernelScores:
    """Implements ``_Scores`` by kernels, which read rows where they are.

    Args:
        logits: of all rows of the batch, or the scores of the rows of one mode.
        index: [rows] int64, among those of the logits; None if they are all rows.
        temperature: [rows] fp32; None if all are 1.
        kernels: of the device.
    """

    def __init__(
        self,
        logits: Tensor,
        index: Tensor | None,
        temperature: Tensor | None,
        kernels: SamplingKernels,
    ) -> None:
        self._logits, self._kernels, self._temperature = logits, kernels, temperature
        self._index = index

    def log_sums(self, token_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        norm, num_higher = self._kernels.log_sums(
            self._logits, self._index, self._temperature, token_ids
        )
        return norm[:, None], num_higher

    def of(self, token_ids: Tensor) -> Tensor:
        if self._index is None:
            picked = self._logits.gather(1, token_ids[:, None])
        else:
            picked = self._logits[self._index, token_ids][:, None]
        picked = picked.to(torch.float32)
        return picked if self._temperature is None else picked / self._temperature[:, None]

    def ranked(self, top: RowsWithTop, depth: int) -> tuple[Tensor, Tensor]:
        some, temperature = top.index.tensor, self._temperature
        if temperature is not None:
            temperature = temperature[some]
        rows = some if self._index is None else self._index[some]
        return self._kernels.ranked(self._logits, rows, temperature, depth)


def _scores(logits: Tensor, rows: RowsOfMode) -> _Scores:
    index = None if rows.index is None else rows.index.tensor
    if rows.kernels is not None and rows.is_unfiltered:
        return _KernelScores(logits, index, rows.temperature, rows.kernels)
    some = logits if index is None else logits[index]
    scores = processed(some.to(torch.float32), rows.kinds)
    if rows.kernels is None:
        return _TorchScores(scores)
    # Whether a row comes here depends on the filters of others, so the same kernels sum it up.
    return _KernelScores(scores, None, None, rows.kernels)


def _below_the_best(scores: Tensor, best: Tensor, norm: Tensor) -> Tensor:
    """Logprobs of scores, [rows, some]; a score below the best gets a number below the best one's.

    Subtraction may round two scores to one number, and clients compare them to find the likeliest.
    """
    values, first = scores - norm, best[:, :1] - norm
    is_mistaken = (values == first) & (scores < best[:, :1])
    return values.where(~is_mistaken, values.nextafter(values.new_full((), -torch.inf)))
