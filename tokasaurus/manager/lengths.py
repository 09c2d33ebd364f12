"""Learns how long completions get, and predicts how long running ones will be.

Owns counts over buckets of lengths and the lengths of finished siblings. Knows nothing of slots, pages or
time: what it predicts depends on the calls that were made and on nothing else.

**All requests.** The learned quantity is the hazard: of the tokens that were generated as the (x+1)-th of
their sequence, the share that was the last one. It is estimated as *ends / tokens generated*, for each
bucket of x::

    length so far    0         8        16        24
                     ├─────────┼─────────┼─────────┤
    ended at 11      ━━━━━━━━━━━━━━●                   8 tokens here, 3 and an end there
    ended by limit   ━━━━━━━━━━━━━━━━━━━━┥             8 and 8, no end
    still running    ━━━━━━━━━━━━━━━━━>                8 and 6, no end

Tokens are counted while they are generated, not when their sequence ends. This is what makes the estimate
right where the lengths of finished sequences alone mislead: short sequences finish first, but the long
ones' tokens are in the denominator from the beginning; a sequence that is cut off at ``max_tokens`` says
only that it would have been at least as long; and both counts forget at one speed, so that a busy engine,
whose memory is shorter than its longest sequences, is no more biased than an idle one.

Where a bucket is wider than a token, ends are related to the sequences that enter the bucket, as in an
actuary's life table. With S(x) the probability of more than x tokens, the product of (1 - hazard) below x::

    E[min(length, m) | length > g]  =  g + (S(g) + S(g+1) + .. + S(m-1)) / S(g)

and likewise for the square: two look-ups in running sums, whatever g and m. (Occurrence/exposure rates and
the product-limit estimator: E. L. Kaplan, P. Meier, Nonparametric estimation from incomplete observations,
JASA 53, 1958.)

**Siblings.** The samples of one request have one limit, so that their lengths compare directly. The
prediction is the mean of those siblings that are longer than the sequence is already, and of
``_SIBLING_SHRINKAGE`` imagined ones as long as all requests let expect. Siblings that run count as long as
all requests let expect of them: else the first to finish would speak for all.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.manager.slots import IndexArray
from tokasaurus.protocol.arrays import BoolArray, Int32Array, Int64Array

__all__ = ["NO_GROUP", "LengthPredictor"]

IntArray: TypeAlias = NDArray[np.signedinteger]
_Floats: TypeAlias = NDArray[np.float64]

NO_GROUP = -1  # the handle of a sequence without siblings

# What all requests let expect weighs as much as so many siblings. Between prompts, lengths differ about
# as much as between the samples of a prompt.
_SIBLING_SHRINKAGE = 2.0
# Where fewer sequences than this have been, the prior has its share.
_ENOUGH_AT_RISK = 4.0
# Below this, quotients of sums have lost their digits.
_SMALLEST_SURVIVAL = 1e-8
_NO_LENGTHS: Int64Array = np.empty(0, np.int64)
_LENGTH_BITS = 32  # of a sibling's key, below its group


class LengthPredictor:
    """Predicts the number of tokens that sequences will have generated at their end.

    Feed it ``observe`` and ``abort`` as sequences end, call ``refresh`` now and then (every few steps),
    and ``predict`` at any time. Until the first refresh, and before ``initial_wait`` sequences have ended,
    predictions are the prior.

    Args:
        max_length: no sequence generates more tokens.
        num_buckets: resolution of the table; lengths are told apart exactly while they are few, and to
            about ``log(max_length) / num_buckets`` of themselves beyond.
        memory: finished sequences after which what was learned weighs 1/e.
        initial_wait: sequences that must end before predictions count.
        prior_mean: expected length before that, as a fraction of max_tokens.
        prior_std: its standard deviation, likewise.
        std_scale: predictions are longer than expected by so many standard deviations.
    """

    def __init__(
        self,
        max_length: int,
        *,
        num_buckets: int = 1024,
        memory: int = 2048,
        initial_wait: int = 16,
        prior_mean: float = 1.0,
        prior_std: float = 0.0,
        std_scale: float = 0.25,
    ) -> None:
        self.num_observed = 0
        self._num_known = 0  # observed before the last refresh
        self._max_length = max_length
        self._memory = memory
        self._initial_wait = initial_wait
        self._prior_mean = prior_mean
        self._prior_std = prior_std
        self._std_scale = std_scale
        # Bucket b is the lengths edges[b] .. edges[b + 1] - 1.
        self._edges = _bucket_edges(max_length, num_buckets)
        self._widths = np.diff(self._edges)
        num_buckets = len(self._widths)
        self._bucket_of: Int32Array = np.repeat(
            np.arange(num_buckets + 1, dtype=np.int32), np.append(self._widths, 1)
        )
        self._ends: _Floats = np.zeros(num_buckets)
        self._tokens: _Floats = np.zeros(num_buckets)  # generated there
        # That would have been, had those who ended there gone on to the bucket's end.
        self._tokens_missed: _Floats = np.zeros(num_buckets)
        # Of these, the tokens of those that ran at the last refresh.
        self._running_tokens: _Floats = np.zeros(num_buckets)
        self._make_tables()
        # What came since the last refresh.
        self._new_keys: list[Int64Array] = []
        self._new_stops: list[Int64Array] = []
        self._new_lengths: list[Int64Array] = []
        self._num_new_ends = 0
        # Groups by handle.
        self._num_handles = 0
        self._free_handles: list[int] = []
        self._closed: list[int] = []
        self._sibling_keys: Int64Array = _NO_LENGTHS  # (group, length) of finished siblings
        self._siblings = _Siblings.of_nobody()

    def open_group(self) -> int:
        """The samples of one request, which have one prompt and one max_tokens; returns a handle."""
        if self._free_handles:
            return self._free_handles.pop()
        self._num_handles += 1
        return self._num_handles - 1

    def close_group(self, handle: int) -> None:
        """All of the group's sequences have ended; the handle will be another group's."""
        self._closed.append(handle)  # until the next refresh the tables know it as this group's

    def observe(self, groups: IntArray, num_generated: IntArray, max_tokens: IntArray) -> None:
        """These sequences ended by themselves or reached their limit.

        Args:
            groups: [n] handles, or NO_GROUP.
            num_generated: [n] tokens in all, 1 or more. One that is equal to ``max_tokens`` is a limit
                reached: it says nothing about what would have come.
            max_tokens: [n]
        """
        lengths = num_generated.astype(np.int64)
        self.num_observed += len(lengths)
        self._num_new_ends += len(lengths)
        self._new_lengths.append(lengths)
        self._new_stops.append(lengths[lengths < max_tokens])
        has_group = groups != NO_GROUP
        self._new_keys.append(_sibling_keys(groups[has_group], lengths[has_group]))

    def abort(self, num_generated: IntArray) -> None:
        """These sequences are gone and did not end: they might have become longer.

        Args:
            num_generated: [n] tokens so far.
        """
        self._new_lengths.append(num_generated.astype(np.int64))

    def refresh(self, groups: IntArray, num_generated: IntArray, max_tokens: IntArray) -> None:
        """Brings the tables up to date.

        Args:
            groups: [n] handles of all sequences that have generated tokens and have neither been observed
                nor aborted, or NO_GROUP. Preempted ones belong to them.
            num_generated: [n]
            max_tokens: [n]
        """
        keep = np.exp(-self._num_new_ends / self._memory)
        self._ends *= keep
        self._tokens_missed *= keep
        stops = np.minimum(np.concatenate([_NO_LENGTHS, *self._new_stops]), self._max_length)
        buckets = self._bucket_of[stops - 1]  # a sequence of x + 1 tokens ended where it was x long
        np.add.at(self._ends, buckets, 1.0)
        np.add.at(self._tokens_missed, buckets, self._edges[buckets + 1] - stops)
        running_tokens = self._count_tokens(num_generated)
        gone_tokens = self._count_tokens(np.concatenate([_NO_LENGTHS, *self._new_lengths]))
        new_tokens = gone_tokens + running_tokens - self._running_tokens
        # The maximum is for callers that lose sequences: an end is also a token.
        self._tokens = np.maximum(keep * self._tokens + new_tokens, self._ends)
        self._running_tokens = running_tokens
        self._num_known = self.num_observed
        self._make_tables()
        self._update_siblings(groups, num_generated, max_tokens)
        self._new_stops.clear()
        self._new_lengths.clear()
        self._num_new_ends = 0

    def predict(
        self, groups: IntArray, num_generated: IntArray, max_tokens: IntArray
    ) -> Int64Array:
        """How many tokens sequences will have generated at their end, those they have included.

        Args:
            groups: [n] handles, or NO_GROUP.
            num_generated: [n] tokens so far; 0 for sequences that wait.
            max_tokens: [n]

        Returns:
            [n], more than ``num_generated`` where that is less than ``max_tokens``, and never more than
            ``max_tokens``.
        """
        mean, square = self._moments(num_generated, max_tokens)
        if self._siblings.num_finished and self._num_known >= self._initial_wait:
            rows = np.flatnonzero(self._siblings.has_finished(groups))
            count, total, total_square = self._siblings.longer_than(
                groups[rows], num_generated[rows]
            )
            weight = count + _SIBLING_SHRINKAGE
            mean[rows] = (total + _SIBLING_SHRINKAGE * mean[rows]) / weight
            square[rows] = (total_square + _SIBLING_SHRINKAGE * square[rows]) / weight
        std = np.sqrt(np.maximum(square - mean * mean, 0.0))
        # Sums that make a whole number are not always equal to it.
        predicted = np.ceil(mean + self._std_scale * std - 1e-6).astype(np.int64)
        return np.minimum(np.maximum(predicted, num_generated + 1), max_tokens)

    def _count_tokens(self, lengths: IntArray) -> _Floats:
        """[num_buckets] how many tokens sequences of these lengths generated in each bucket."""
        lengths = np.minimum(lengths, self._max_length)
        buckets = self._bucket_of[lengths]
        num_buckets = len(self._widths)
        ending = np.bincount(buckets, minlength=num_buckets + 1)
        beyond = np.cumsum(ending[::-1])[::-1][1:].astype(np.float64)
        inside = np.bincount(
            buckets, weights=lengths - self._edges[buckets], minlength=num_buckets + 1
        )
        return beyond * self._widths + inside[:-1]

    def _make_tables(self) -> None:
        """S, its sum and the sum of (2x + 1) S(x), at the edges of the buckets.

        One more entry for the length ``max_length``.
        """
        tokens, widths, edges = self._tokens, self._widths, self._edges
        # As if who ended in a bucket had been at risk to its end: these are the tokens of a bucket
        # that nobody leaves. An end has a whole bucket's, also where the older ones are forgotten.
        at_risk = np.maximum(tokens + self._tokens_missed, self._ends * widths)
        scale = np.divide(widths, at_risk, out=np.zeros(len(tokens)), where=at_risk > 0)
        survival = np.cumprod(np.append(1.0, 1.0 - self._ends * scale))
        lived = survival[:-1] * np.where(at_risk > 0, tokens * scale, widths)
        self._survival = _Table(survival, widths)
        self._lived = _Table(np.cumsum(np.append(0.0, lived)), widths)
        doubled = lived * (edges[:-1] + edges[1:])
        self._lived_square = _Table(np.cumsum(np.append(0.0, doubled)), widths)
        # Sequences that were seen in a bucket.
        self._num_seen = np.append(tokens / widths, 0.0)

    def _moments(self, num_generated: IntArray, max_tokens: IntArray) -> tuple[_Floats, _Floats]:
        """Expected length at the end and expected square of it, by what all requests taught."""
        prior_mean, prior_square = self._prior(num_generated, max_tokens)
        if self._num_known < self._initial_wait:
            return prior_mean, prior_square
        start, end = self._places(num_generated), self._places(max_tokens)
        survival = self._survival.at(*start)
        is_known = survival > _SMALLEST_SURVIVAL
        survival[~is_known] = 1.0
        generated = num_generated.astype(np.float64)
        mean = generated + (self._lived.at(*end) - self._lived.at(*start)) / survival
        squares = self._lived_square.at(*end) - self._lived_square.at(*start)
        square = generated * generated + squares / survival
        trust = np.minimum(self._num_seen[start[0]] / _ENOUGH_AT_RISK, 1.0) * is_known
        return (
            prior_mean + trust * (mean - prior_mean),
            prior_square + trust * (square - prior_square),
        )

    def _prior(self, num_generated: IntArray, max_tokens: IntArray) -> tuple[_Floats, _Floats]:
        mean = np.maximum(max_tokens * self._prior_mean, num_generated + 1.0)
        std = max_tokens * self._prior_std
        return mean, mean * mean + std * std

    def _places(self, lengths: IntArray) -> tuple[IndexArray, _Floats]:
        """[n] the bucket of each length, and [n] how far in it."""
        lengths = np.minimum(lengths, self._max_length)
        buckets = self._bucket_of[lengths].astype(np.intp)
        return buckets, (lengths - self._edges[buckets]).astype(np.float64)

    def _update_siblings(
        self, groups: IntArray, num_generated: IntArray, max_tokens: IntArray
    ) -> None:
        keys = np.concatenate([self._sibling_keys, *self._new_keys])
        if self._closed:
            is_closed: BoolArray = np.zeros(self._num_handles, np.bool_)
            is_closed[self._closed] = True
            keys = keys[~is_closed[keys >> _LENGTH_BITS]]
        self._sibling_keys = keys
        self._new_keys.clear()
        self._free_handles += reversed(self._closed)
        self._closed.clear()
        num_finished = np.bincount(keys >> _LENGTH_BITS, minlength=self._num_handles)
        # Without a finished sibling, those that run know no more than all requests do.
        rows = np.flatnonzero((groups != NO_GROUP) & (np.append(num_finished, 0)[groups] > 0))
        mean, square = self._moments(num_generated[rows], max_tokens[rows])
        finished = (keys & ((1 << _LENGTH_BITS) - 1)).astype(np.float64)
        running_keys = _sibling_keys(groups[rows], mean.astype(np.int64))
        self._siblings = _Siblings(
            np.concatenate([keys, running_keys]),
            np.concatenate([finished, mean]),
            np.concatenate([finished * finished, square]),
            num_finished,
        )


class _Table:
    """A function of lengths, straight in each bucket.

    Args:
        at_edge: [num_buckets + 1]
        widths: [num_buckets] of the buckets.
    """

    def __init__(self, at_edge: _Floats, widths: Int64Array) -> None:
        self._at_edge = at_edge
        self._slope: _Floats = np.append(np.diff(at_edge) / widths, 0.0)

    def at(self, buckets: IndexArray, offsets: _Floats) -> _Floats:
        """[n] the values so far behind the edges of these buckets."""
        values = self._slope[buckets]
        values *= offsets
        values += self._at_edge[buckets]
        return values


class _Siblings:
    """Sums over the siblings of a sequence that are longer than it.

    Args:
        keys: [n] (group, length) of siblings in any order.
        lengths: [n]
        squares: [n] of the lengths.
        num_finished: [num_handles]
    """

    def __init__(
        self, keys: Int64Array, lengths: _Floats, squares: _Floats, num_finished: IntArray
    ) -> None:
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._length_sums = np.cumsum(np.append(0.0, lengths[order]))
        self._square_sums = np.cumsum(np.append(0.0, squares[order]))
        handles = np.arange(1, len(num_finished) + 1, dtype=np.int64)
        self._group_end = np.searchsorted(self._keys, handles << _LENGTH_BITS)
        self._has_finished: BoolArray = np.append(num_finished > 0, False)  # NO_GROUP is the last
        self.num_finished = int(num_finished.sum())

    @classmethod
    def of_nobody(cls) -> _Siblings:
        none: _Floats = np.empty(0)
        return cls(_NO_LENGTHS, none, none, _NO_LENGTHS)

    def has_finished(self, groups: IntArray) -> BoolArray:
        """[n] whether finished sequences are known; a group may be newer than the tables."""
        is_known = groups < len(self._has_finished) - 1
        found: BoolArray = self._has_finished[np.where(is_known, groups, NO_GROUP)]
        return found

    def longer_than(self, groups: IntArray, lengths: IntArray) -> tuple[IntArray, _Floats, _Floats]:
        """[n] how many siblings are longer, the sum of their lengths, and of the squares."""
        wanted = _sibling_keys(groups, lengths)
        order = np.argsort(wanted)  # searching in order is so much faster that sorting pays
        start = np.empty_like(order)
        start[order] = np.searchsorted(self._keys, wanted[order], side="right")
        end = self._group_end[groups]
        total = self._length_sums[end] - self._length_sums[start]
        total_square = self._square_sums[end] - self._square_sums[start]
        return end - start, total, total_square


def _sibling_keys(groups: IntArray, lengths: IntArray) -> Int64Array:
    return (groups.astype(np.int64) << _LENGTH_BITS) | lengths


def _bucket_edges(max_length: int, num_buckets: int) -> Int64Array:
    """From 0 to max_length: one by one while that is finer than equal ratios, which come then."""
    if max_length <= num_buckets:
        return np.arange(max_length + 1, dtype=np.int64)
    edges = np.geomspace(1.0, max_length, num_buckets).round().astype(np.int64)
    return np.unique(np.append(edges, [0, max_length]))
