"""Draws tokens from logits.

Each row is sampled by itself: its token is a function of its logits, its parameters and its random
number (``randomness``), never of other rows. Logits come already adjusted (``adjustments``). Tokens
are ranked by logit, and equal ones by id. The filters shorten that ranking in this order::

    temperature   divides the logits; 0 means the first of the ranking, whatever the filters
    top_k         keeps the first k
    top_p         keeps the shortest beginning that holds a share p of the probability left
    min_p         keeps tokens that are at least p times as probable as the first

A draw inverts the cumulative distribution in float64, in the order of token ids. A difference in
the last bit between two kernels therefore moves a boundary by a last bit instead of reordering
tokens. The distribution is summed up by blocks, and only the block that the draw falls into is
summed up token by token. Sums in another order may give another token only where the number lies
within about 1e-16 of a boundary.

What a row takes depends on its filters (``kinds``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokasaurus.model.sampling.inversion import find, find_in, sums_of_blocks
from tokasaurus.model.sampling.kinds import Kind, RowsOfKind
from tokasaurus.model.sampling.logit_rows import LogitRows
from tokasaurus.model.sampling.ranking import first_of, most_ranked, ranked, sorted_logits
from tokasaurus.protocol.messages import Sampling

__all__ = ["MOST_MEMORY", "draw", "processed"]

MOST_MEMORY = Sampling(temperature=0.9, top_p=0.9, min_p=0.01)
"""Takes the most memory, for the worker's warm-up. With a top_k, top_p would sort few tokens."""

# The part of the ranking that top_p may look at before it sorts the whole vocabulary.
_NUCLEUS_CANDIDATES = 64
# Weights that are sooner cumulated than summed up by blocks: the steps take longer than the sums.
_FEW_WEIGHTS = 1 << 18


def draw(logits: Tensor, plan: list[RowsOfKind]) -> Tensor:
    """Draws one token for each row.

    Args:
        logits: [rows, vocabulary] fp32.
        plan: of the same rows, which draw.

    Returns:
        [rows] int64.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for rows in plan:
        drawn = _drawn(_rows_of(logits, rows), rows)
        if rows.index is None:
            return drawn
        tokens[rows.index.tensor] = drawn
    return tokens


def processed(logits: Tensor, plan: list[RowsOfKind]) -> Tensor:
    """Logits after temperature and filters, -inf for removed tokens.

    Args:
        logits: [rows, vocabulary] fp32. Never changed.
        plan: of the same rows, which do not draw. The logits themselves are returned if it has
            nothing to do.
    """
    if all(rows.is_neutral for rows in plan):
        return logits
    scores = torch.empty_like(logits)
    for rows in plan:
        some = _processed(_rows_of(logits, rows), rows)
        if rows.index is None:
            return some
        scores[rows.index.tensor] = some
    return scores


@dataclass(frozen=True, eq=False)
class _Columns:
    """The numbers of some rows, [rows, 1] each, as in ``RowsOfKind``.

    Attributes:
        last_logit: of the part of the ranking that is kept, if it was found by sorting.
        last_id: the largest id that is kept with exactly this logit; None if all are.
    """

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    numbers: Tensor | None = None
    last_logit: Tensor | None = None
    last_id: Tensor | None = None

    @staticmethod
    def of(rows: RowsOfKind) -> _Columns:
        staged = (rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.numbers)
        return _Columns(*(None if each is None else each.tensor for each in staged))

    def take(self, index: Tensor | slice) -> _Columns:
        return _Columns(
            **{name: None if each is None else each[index] for name, each in vars(self).items()}
        )

    def scores(self, logits: Tensor) -> Tensor:
        """Logits divided by the temperature; the same tensor if all temperatures are 1."""
        return logits if self.temperature is None else logits / self.temperature

    def best(self, logits: Tensor) -> Tensor:
        """[rows, 1]: the highest score of all tokens: division keeps their order."""
        return self.scores(logits.amax(dim=-1, keepdim=True))

    def kept_scores(self, logits: Tensor, ids: Tensor, best: Tensor) -> Tensor:
        """Scores, -inf for tokens that min_p removes, or that come after the last one.

        Args:
            logits: [rows, some] fp32.
            ids: of these tokens, [some] or [rows, some].
            best: each row's highest score, [rows, 1].
        """
        scores = self.scores(logits)
        if self.last_logit is not None:
            removed = logits < self.last_logit
            if self.last_id is not None:
                removed |= (logits == self.last_logit) & (ids > self.last_id)
            scores = scores.masked_fill(removed, -torch.inf)
        if self.min_p is not None:
            scores = scores.masked_fill(scores < self.floor(best), -torch.inf)
        return scores

    def weights(self, logits: Tensor, ids: Tensor, best: Tensor) -> Tensor:
        """Probabilities relative to that of the best token. Takes what ``kept_scores`` takes."""
        scores = self.kept_scores(logits, ids, best)
        below = scores - best if scores is logits else scores.sub_(best)
        return below.exp_()

    def floor(self, best: Tensor) -> Tensor:
        """The lowest score that min_p keeps, if there is one."""
        # The filters before min_p keep the first token and all ratios, so min_p needs no ranking.
        assert self.min_p is not None
        return best + torch.log(self.min_p)


def _rows_of(logits: Tensor, rows: RowsOfKind) -> LogitRows:
    return LogitRows(logits, None if rows.index is None else rows.index.tensor)


def _drawn(logits: LogitRows, rows: RowsOfKind) -> Tensor:
    """[rows]: a token for each row of one kind."""
    if rows.kind is Kind.GREEDY:
        return first_of(logits)
    columns = _Columns.of(rows)
    if rows.kind is Kind.WHOLE:
        return _draw_kept(logits, columns)
    if rows.kind is Kind.LISTED:
        return _List.of(logits, columns, rows.depth).draw(columns)
    if rows.kind is Kind.SORTED or not _can_list(logits):
        return _draw_sorted(logits, columns)
    nucleus, short = _nucleus(logits, columns)
    tokens = nucleus.draw(columns)
    if len(short):
        tokens[short] = _draw_sorted(logits.take(short), columns.take(short))
    return tokens


def _draw_sorted(logits: LogitRows, columns: _Columns) -> Tensor:
    return _draw_kept(logits, _with_last(logits, columns))


def _draw_kept(logits: LogitRows, columns: _Columns) -> Tensor:
    """[rows]: tokens of those that ``kept_scores`` keeps."""
    if len(logits) * logits.vocab_size > _FEW_WEIGHTS:
        return _Sums.of(logits, columns).draw(logits, columns)
    some = logits.whole()
    ids = torch.arange(logits.vocab_size, device=logits.device)
    assert columns.numbers is not None
    weights = columns.weights(some, ids, columns.best(some))
    return find_in(weights, columns.numbers, beyond=True)[:, 0]


def _processed(logits: LogitRows, rows: RowsOfKind) -> Tensor:
    """[rows, vocabulary]: scores of rows of one kind, -inf for removed tokens."""
    columns = _Columns.of(rows)
    if rows.kind is Kind.WHOLE:
        return _kept_scores(logits, columns)
    if rows.kind is Kind.LISTED:
        return _List.of(logits, columns, rows.depth).scores_of_all(logits.vocab_size)
    if rows.kind is Kind.SORTED or not _can_list(logits):
        return _kept_scores(logits, _with_last(logits, columns))
    nucleus, short = _nucleus(logits, columns)
    scores = nucleus.scores_of_all(logits.vocab_size)
    if len(short):
        some = logits.take(short)
        scores[short] = _kept_scores(some, _with_last(some, columns.take(short)))
    return scores


def _kept_scores(logits: LogitRows, columns: _Columns) -> Tensor:
    shape = len(logits), logits.vocab_size
    scores = torch.empty(shape, dtype=torch.float32, device=logits.device)
    ids = torch.arange(logits.vocab_size, device=logits.device)
    for part, some in logits.parts():
        own = columns.take(part)
        scores[part] = own.kept_scores(some, ids, own.best(some))
    return scores


# --- the whole vocabulary ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sums:
    """The weights of rows, summed up by blocks. A weight is relative to that of the best token.

    Attributes:
        best: [rows, 1] fp32, the highest score.
        blocks: [rows, blocks] float64.
    """

    best: Tensor
    blocks: Tensor

    @staticmethod
    def of(logits: LogitRows, columns: _Columns) -> _Sums:
        ids = torch.arange(logits.vocab_size, device=logits.device)
        best, blocks = [], []
        for part, some in logits.parts():
            own = columns.take(part)
            best.append(own.best(some))
            blocks.append(sums_of_blocks(own.weights(some, ids, best[-1])))
        return _Sums(torch.cat(best), torch.cat(blocks))

    def draw(self, logits: LogitRows, columns: _Columns) -> Tensor:
        """[rows]: the tokens that contain each row's number, on the way from id to id."""

        def weights(ids: Tensor) -> Tensor:
            return columns.weights(logits.gather(ids), ids, self.best)

        assert columns.numbers is not None
        return find(self.blocks, columns.numbers, logits.vocab_size, weights, beyond=True)[:, 0]


# --- the beginning of the ranking ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _List:
    """The first tokens of the ranking of each row, [rows, depth] each.

    Attributes:
        ids: best first.
        scores: fp32.
        weights: float64, relative to that of the best token; 0 beyond top_k.
        kept: whether the filters keep the token.
        reaches_share: [rows], whether the tokens within top_k hold the share of top_p.
    """

    ids: Tensor
    scores: Tensor
    weights: Tensor
    kept: Tensor
    reaches_share: Tensor

    @staticmethod
    def of(logits: LogitRows, columns: _Columns, depth: int, total: Tensor | None = None) -> _List:
        """Lists tokens.

        Args:
            logits: of the rows.
            columns: of the same rows.
            depth: how many tokens, no fewer than any top_k.
            total: [rows, 1] float64, the weight of the whole vocabulary, if there is no top_k.
        """
        values, ids = ranked(logits, depth)
        scores = columns.scores(values)
        best = scores[:, :1]
        weights = (scores - best).exp_().to(torch.float64)
        kept = torch.ones_like(ids, dtype=torch.bool)
        reaches_share = kept[:, 0]
        if columns.top_k is not None:
            kept = torch.arange(depth, device=ids.device) < columns.top_k
            weights = weights.where(kept, 0)
        if columns.top_p is not None:
            cumulative = weights.cumsum(dim=-1)
            held = cumulative[:, -1:]
            share = columns.top_p * (held if total is None else torch.maximum(total, held))
            # A token is kept if those before it do not hold the share yet.
            before = torch.cat((torch.zeros_like(share), cumulative[:, :-1]), dim=-1)
            kept = kept & ((before < share) | (columns.top_p >= 1))
            reaches_share = (held >= share)[:, 0]
        if columns.min_p is not None:
            kept = kept & (scores >= columns.floor(best))
        # Also where the scores are NaN, since the model's weights have diverged.
        kept[:, 0] = True
        return _List(ids, scores, weights, kept, reaches_share)

    def draw(self, columns: _Columns) -> Tensor:
        """[rows]: the tokens that contain each row's number, on the way from id to id."""
        assert columns.numbers is not None
        beyond = torch.iinfo(torch.int64).max
        ids, order = self.ids.where(self.kept, beyond).sort(dim=-1)
        cumulative = self.weights.where(self.kept, 0).gather(1, order).cumsum(dim=-1)
        total = cumulative[:, -1:]
        # Rounding may lift a number close to 1 to the total, and nothing is above that.
        below = torch.nextafter(total, torch.zeros_like(total))
        target = torch.minimum(columns.numbers * total, below)
        found = torch.searchsorted(cumulative, target, right=True)
        last = self.kept.sum(dim=-1, keepdim=True) - 1
        return ids.gather(1, torch.minimum(found, last))[:, 0]

    def scores_of_all(self, vocab_size: int) -> Tensor:
        """[rows, vocabulary]: scores, -inf for tokens that are not kept."""
        scores = self.scores.new_full((len(self.scores), vocab_size), -torch.inf)
        return scores.scatter_(1, self.ids, self.scores.where(self.kept, -torch.inf))


def _can_list(logits: LogitRows) -> bool:
    """Whether top_p looks at the beginning of the ranking first.

    Most nuclei have few tokens, and sorting a vocabulary takes long. But whether few tokens hold
    enough probability is a question to the device, and its answer is waited for.
    """
    return _answers_at_once(logits.device) and most_ranked(logits.vocab_size) >= _NUCLEUS_CANDIDATES


def _answers_at_once(device: torch.device) -> bool:
    """Whether the host can ask the device without waiting for what was enqueued before."""
    return device.type == "cpu"


def _nucleus(logits: LogitRows, columns: _Columns) -> tuple[_List, Tensor]:
    """The nuclei, if they are short, and the rows in which they are not."""
    sums = _Sums.of(logits, _Columns(temperature=columns.temperature))
    total = sums.blocks.sum(dim=-1, keepdim=True)
    nucleus = _List.of(logits, columns, _NUCLEUS_CANDIDATES, total)
    return nucleus, (~nucleus.reaches_share).nonzero()[:, 0]


# --- the whole ranking ---------------------------------------------------------------------------


def _with_last(logits: LogitRows, columns: _Columns) -> _Columns:
    """Adds the last token of each row's ranking that top_k and top_p keep."""
    last_logits, last_ids = [], []
    for part, some in logits.parts():
        own = columns.take(part)
        ranking = sorted_logits(some)
        num_kept = _num_kept(ranking, own)
        last_logit = ranking.gather(1, num_kept - 1)
        last_logits.append(last_logit)
        num_equal = num_kept - (ranking > last_logit).sum(dim=-1, keepdim=True)
        last_ids.append(_id_of_equal(some == last_logit, num_equal))
    return replace(columns, last_logit=torch.cat(last_logits), last_id=torch.cat(last_ids))


def _num_kept(ranking: Tensor, columns: _Columns) -> Tensor:
    """[rows, 1]: how many tokens top_k and top_p keep of a ranking, [rows, vocabulary]."""
    size = ranking.shape[1]
    limits = columns.top_k
    if columns.top_p is None:
        assert limits is not None
        return limits
    scores = columns.scores(ranking)
    best = scores[:, :1]
    places = torch.arange(size, device=ranking.device)

    def weights(scores: Tensor, places: Tensor) -> Tensor:
        weights = (scores - best).exp_()
        return weights if limits is None else weights.where(places < limits, 0)

    all_weights = weights(scores, places)
    if all_weights.numel() <= _FEW_WEIGHTS:
        last = find_in(all_weights, columns.top_p, beyond=False)
    else:
        last = find(
            sums_of_blocks(all_weights),
            columns.top_p,
            size,
            lambda places: weights(scores.gather(1, places), places),
            beyond=False,
        )
    num_kept = last + 1
    return num_kept if limits is None else num_kept.where(columns.top_p < 1, limits)


def _id_of_equal(is_equal: Tensor, count: Tensor) -> Tensor:
    """[rows, 1]: where the ``count``-th true element of each row stands."""
    if _answers_at_once(is_equal.device):
        num_equal = is_equal.sum(dim=-1, keepdim=True)
        if (num_equal <= count).all():
            return torch.full_like(count, is_equal.shape[1])
    return (is_equal.cumsum(dim=-1) < count).sum(dim=-1, keepdim=True)
