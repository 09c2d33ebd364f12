"""Draws tokens from logits, and computes their logprobs.

Each row is sampled by itself: its token is a function of its logits, its parameters and its random
number (``randomness``), never of other rows. Logits come already adjusted (``adjustments``). Tokens
are ranked by logit, and equal ones by id. The filters shorten that ranking in this order::

    temperature   divides the logits; 0 means the first of the ranking, whatever the filters
    top_k         keeps the first k
    top_p         keeps the shortest beginning that holds a share p of the probability left
    min_p         keeps tokens that are at least p times as probable as the first

A draw inverts the cumulative distribution in float64, in the order of token ids. A difference in
the last bit between two kernels therefore moves a boundary by a last bit instead of reordering
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokasaurus.model.sampling.parameters import SamplingParameters
from tokasaurus.model.sampling.randomness import uniforms
from tokasaurus.model.upload import upload, upload_indices
from tokasaurus.protocol.messages import LogprobsMode, Sampling

__all__ = ["MOST_MEMORY", "Logprobs", "draw", "logprobs_of", "processed"]

# The part of the ranking that top_p may look at before it sorts the whole vocabulary.
_NUCLEUS_CANDIDATES = 512

MOST_MEMORY = Sampling(temperature=0.9, top_p=0.9, min_p=0.01)
"""Takes the most memory, for the worker's warm-up. With a top_k, top_p would sort few tokens."""

# At lower temperatures logits could overflow. The draw is an argmax long before.
_MIN_TEMPERATURE = 1e-20


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


def draw(logits: Tensor, parameters: SamplingParameters) -> Tensor:
    """Draws one token for each row.

    Args:
        logits: [rows, vocabulary] fp32.
        parameters: of the same rows.

    Returns:
        [rows] int64.
    """
    random = np.flatnonzero(~parameters.greedy)
    if len(random) == len(logits):
        return _draw_at_random(logits, parameters)
    tokens = logits.argmax(dim=-1)
    if len(random):
        rows = upload_indices(random, logits.device)
        tokens[rows] = _draw_at_random(logits[rows], parameters.take(random))
    return tokens


def _draw_at_random(logits: Tensor, parameters: SamplingParameters) -> Tensor:
    scores = processed(logits, parameters)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    numbers = uniforms(parameters["seed"], parameters["sample_index"], parameters["num_generated"])
    return _invert(weights, upload(numbers, logits.device))


def processed(logits: Tensor, parameters: SamplingParameters) -> Tensor:
    """Logits after temperature and filters, -inf for removed tokens. Temperature 0 counts as 1.

    Args:
        logits: [rows, vocabulary] fp32. Never changed; returned as it is if there is nothing to do.
    """
    return _filter(_tempered(logits, parameters), parameters)


def logprobs_of(
    logits: Tensor,
    token_ids: Tensor,
    parameters: SamplingParameters,
    width: int,
    adjusted: Tensor | None = None,
    *,
    ranked: bool = False,
) -> Logprobs:
    """Logprobs of chosen tokens and of each row's best tokens.

    Args:
        logits: [rows, vocabulary] fp32.
        token_ids: [rows] int64.
        parameters: of the same rows: the number of logprobs of each, and their distribution.
        width: K, at least the largest number that a row asks for.
        adjusted: the logits that the rows were drawn from, if others. Only ``PROCESSED`` uses them.
        ranked: whether to compute ranks.
    """
    num_rows, vocab_size = logits.shape
    chosen = logits.new_full((num_rows,), torch.nan)
    ranks = token_ids.new_full((num_rows,), -1)
    top_ids = token_ids.new_full((num_rows, width), -1)
    top = logits.new_full((num_rows, width), torch.nan)
    for mode in LogprobsMode:
        rows = np.flatnonzero(
            (parameters["num_logprobs"] >= 0) & (parameters["logprobs_mode"] == mode)
        )
        if not len(rows):
            continue
        index = upload_indices(rows, logits.device)
        source = adjusted if adjusted is not None and mode is LogprobsMode.PROCESSED else logits
        scores = _distribution(source[index], parameters.take(rows), mode)
        # x - logsumexp(x) is finite wherever x is; the logarithm of a probability underflows.
        norm = scores.logsumexp(dim=-1, keepdim=True)
        picked = scores.gather(1, token_ids[index, None])
        if ranked:
            ranks[index] = 1 + (scores > picked).sum(dim=-1)
        depth = min(int(parameters["num_logprobs"][rows].max()), vocab_size)
        if depth == 0:
            chosen[index] = (picked - norm)[:, 0]
            continue
        best = scores.topk(depth, dim=-1)
        chosen[index] = _below_the_best(picked, best.values, norm)[:, 0]
        wanted = upload(parameters["num_logprobs"][rows], logits.device)
        asked = torch.arange(depth, device=logits.device) < wanted[:, None]
        top_ids[index, :depth] = best.indices.where(asked, -1)
        values = _below_the_best(best.values, best.values, norm)
        top[index, :depth] = values.where(asked, torch.nan)
    return Logprobs(chosen, top_ids, top, ranks)


def _below_the_best(scores: Tensor, best: Tensor, norm: Tensor) -> Tensor:
    """Logprobs of scores, [rows, some]; a score below the best gets a number below the best one's.

    Subtraction may round two scores to one number, and clients compare them to find the likeliest.
    """
    values, first = scores - norm, best[:, :1] - norm
    is_mistaken = (values == first) & (scores < best[:, :1])
    return values.where(~is_mistaken, values.nextafter(values.new_full((), -torch.inf)))


def _distribution(logits: Tensor, parameters: SamplingParameters, mode: LogprobsMode) -> Tensor:
    if mode is LogprobsMode.RAW:
        return logits
    if mode is LogprobsMode.TEMPERATURE:
        return _tempered(logits, parameters)
    return processed(logits, parameters)


def _tempered(logits: Tensor, parameters: SamplingParameters) -> Tensor:
    temperature = np.where(parameters.greedy, 1, parameters["temperature"].clip(_MIN_TEMPERATURE))
    if (temperature == 1).all():
        return logits
    return logits / _column(temperature.astype(np.float32), logits)


def _invert(weights: Tensor, numbers: Tensor) -> Tensor:
    """The token whose share of the cumulative weight contains each number::

        weights      0.5     0     1.0        0.25
        cumulative   0.5    0.5    1.5        1.75
        number 0.4 -> target 0.7: the first cumulative weight above it is the third

    Args:
        weights: [rows, vocabulary], not negative.
        numbers: [rows] float64 in [0, 1).
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Rounding may lift a number close to 1 to the total, and no cumulative weight is above that.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(numbers[:, None] * total, below)
    # Where weights are NaN, since the model's weights have diverged, nothing is above the target.
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return found.clamp_(max=weights.shape[1] - 1)


def _filter(scores: Tensor, parameters: SamplingParameters) -> Tensor:
    """The scores, in a copy with -inf for removed tokens if any row has a filter."""
    rows = np.flatnonzero(parameters.filtered)
    if not len(rows):
        return scores
    everything = len(rows) == len(scores)
    index = upload_indices(rows, scores.device)
    part = scores if everything else scores[index]
    chosen = parameters.take(rows)
    part = part.masked_fill(~_kept(part, chosen), -torch.inf)
    if everything:
        return part
    scores = scores.clone()
    scores[index] = part
    return scores


def _kept(scores: Tensor, parameters: SamplingParameters) -> Tensor:
    """[rows, vocabulary] bool: the tokens that the three filters keep."""
    best = scores.amax(dim=-1, keepdim=True)
    # The filters before min_p keep the first token and all ratios, so min_p needs no ranking.
    floor = best + torch.log(_column(parameters["min_p"], scores))
    kept = scores >= floor
    limited = (parameters["top_k"] > 0) & (parameters["top_k"] < scores.shape[1])
    ranked = np.flatnonzero(limited | (parameters["top_p"] < 1))
    if len(ranked):
        index = upload_indices(ranked, scores.device)
        kept[index] &= _ranked_first(scores[index], parameters.take(ranked))
    return kept


def _ranked_first(scores: Tensor, parameters: SamplingParameters) -> Tensor:
    """[rows, vocabulary] bool: the tokens that top_k and top_p keep."""
    vocab_size = scores.shape[1]
    limits = np.where(parameters["top_k"] > 0, parameters["top_k"], vocab_size)
    limits = limits.clip(max=vocab_size)
    shares = parameters["top_p"].astype(np.float64)
    threshold = scores.new_empty(len(scores), 1)
    num_equal = torch.empty(len(scores), 1, dtype=torch.int64, device=scores.device)
    for rows, find in (
        (np.flatnonzero(limits < vocab_size), _last_of_some),
        (np.flatnonzero(limits == vocab_size), _last_of_all),
    ):
        if not len(rows):
            continue
        if len(rows) == len(scores):
            threshold, num_equal = find(scores, limits, shares)
            break
        index = upload_indices(rows, scores.device)
        threshold[index], num_equal[index] = find(scores[index], limits[rows], shares[rows])
    equal = scores == threshold
    return (scores > threshold) | (equal & (equal.cumsum(dim=-1) <= num_equal))


# Each of the next three finds the end of the part of the ranking that is kept. They take
#
#     scores: [rows, vocabulary];
#     limits: [rows], top_k, on the host;
#     shares: [rows] float64, top_p, on the host;
#
# and return
#
#     threshold: [rows, 1], the score of the last token kept;
#     num_equal: [rows, 1], the number of kept tokens with exactly that score.


def _last_of_some(
    scores: Tensor, limits: NDArray[np.integer[Any]], shares: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """top_k, then top_p. All rows have a top_k."""
    depth = int(limits.max())
    ranking = scores.topk(depth, dim=-1).values
    limits_column = _column(limits, scores)
    within = torch.arange(depth, device=scores.device) < limits_column
    cumulative = _weights(ranking).where(within, 0).cumsum(dim=-1)
    shares_column = _column(shares, scores)
    num_kept = _num_kept(cumulative, shares_column * cumulative[:, -1:], within)
    return _end(ranking, torch.where(shares_column >= 1, limits_column, num_kept))


def _last_of_all(
    scores: Tensor, limits: NDArray[np.integer[Any]], shares: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """top_p alone.

    Most nuclei have few tokens, and sorting a vocabulary takes long. But whether few tokens hold
    enough probability is a question to the device, and its answer is waited for. On the CPU it is
    known at once.
    """
    shares_column = _column(shares, scores)
    if not _answers_at_once(scores.device) or scores.shape[1] <= _NUCLEUS_CANDIDATES:
        return _last_of_sorted(scores, shares_column)
    ranking = scores.topk(_NUCLEUS_CANDIDATES, dim=-1).values
    cumulative = _weights(ranking).cumsum(dim=-1)
    everything = (scores - ranking[:, :1]).exp().sum(dim=-1, keepdim=True, dtype=torch.float64)
    total = torch.maximum(everything, cumulative[:, -1:])
    num_kept = _num_kept(cumulative, shares_column * total)
    threshold, num_equal = _end(ranking, num_kept)
    short = (num_kept == _NUCLEUS_CANDIDATES).nonzero()[:, 0]
    if len(short):
        threshold[short], num_equal[short] = _last_of_sorted(scores[short], shares_column[short])
    return threshold, num_equal


def _last_of_sorted(scores: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """top_p alone, [rows, 1] on the device, from the whole ranking."""
    ranking = scores.sort(dim=-1, descending=True).values
    cumulative = _weights(ranking).cumsum(dim=-1)
    return _end(ranking, _num_kept(cumulative, shares * cumulative[:, -1:]))


def _answers_at_once(device: torch.device) -> bool:
    """Whether the host can ask the device without waiting for what was enqueued before."""
    return device.type == "cpu"


def _weights(ranking: Tensor) -> Tensor:
    return (ranking - ranking[:, :1]).exp().to(torch.float64)


def _num_kept(cumulative: Tensor, shares: Tensor, within: Tensor | None = None) -> Tensor:
    """[rows, 1]: a token is kept if those before it do not hold the share yet.

    The first one is, even if the scores are NaN, since the model's weights have diverged.
    """
    before = torch.cat((torch.zeros_like(shares), cumulative[:, :-1]), dim=-1)
    kept = before < shares
    return (kept if within is None else kept & within).sum(dim=-1, keepdim=True).clamp_(min=1)


def _end(ranking: Tensor, num_kept: Tensor) -> tuple[Tensor, Tensor]:
    threshold = ranking.gather(1, num_kept - 1)
    return threshold, num_kept - (ranking > threshold).sum(dim=-1, keepdim=True)


def _column(values: NDArray[np.generic], like: Tensor) -> Tensor:
    """Turns [rows] on the host into [rows, 1] on the device of a tensor."""
    return upload(values, like.device)[:, None]
