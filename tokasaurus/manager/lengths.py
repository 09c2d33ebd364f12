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

With S(x) the probability of more than x tokens, the product of (1 - hazard) below x::

    E[min(length, m) | length > g]  =  g + (S(g) + S(g+1) + .. + S(m-1)) / S(g)

and likewise for the square: a few look-ups in running sums, whatever g and m. (The product-limit estimator
of E. L. Kaplan, P. Meier, Nonparametric estimation from incomplete observations, JASA 53, 1958.) Where a
bucket is wider than a token, ends are related to the sequences that enter it, as in an actuary's life
table. For lengths that nobody has had yet, the hazard of all lengths together is the best guess.

**Siblings.** The samples of one prompt have similar lengths. The hazard of a group is taken to be a common
one times the group's *frailty*, a factor with a gamma distribution of mean 1 and variance 1/k. Its
posterior is again one: of shape k + ends of the siblings, and of rate k + the ends that the common hazard
lets expect of their tokens, finished or running. With L(x) for the sum of the common hazard below x, and a
sequence's own tokens left out of the rate::

    S(x)  =  (1 + L(x) / rate) ** -shape

For a sequence without siblings both are k and S is that of all requests, which is where L comes from: of
all requests together, the hazard falls with x, since it is the long groups that are left. (Shared frailty:
D. G. Clayton, A model for association in bivariate life tables, Biometrika 65, 1978.) A mean of the lengths
of finished siblings would teach little: sequences that still run are longer than those, as a rule.
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

_FRAILTY_SHAPE = 1.0  # k
# There are tables for these numbers of ends, times these means of the frailty: 1/256 .. 8.
_NUM_ENDS = np.array([0, 1, 2, 4, 8, 16])
_MEANS_PER_OCTAVE = 2
_NO_EVIDENCE = 8 * _MEANS_PER_OCTAVE  # the index of mean 1
_MEANS = 2.0 ** (np.arange(12 * _MEANS_PER_OCTAVE - 1) / _MEANS_PER_OCTAVE - 8)
# Where fewer sequences than this have been, the prior has its share.
_ENOUGH_AT_RISK = 4.0
_SMALLEST_SURVIVAL = 1e-30  # so that L is finite
_SMALLEST_DIVISOR = 1e-300
_NO_LENGTHS: Int64Array = np.empty(0, np.int64)


class LengthPredictor:
    """Predicts the number of tokens that sequences will have generated at their end.

    Feed it ``observe`` and ``abort`` as sequences end, call ``refresh`` every few steps, and ``predict`` at
    any time; best right after a refresh, since lengths that nobody had by then are unknown. Until the first
    refresh, and before ``initial_wait`` sequences have ended, predictions are the prior.

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
        self._new_siblings: list[Int64Array] = []
        self._new_stops: list[Int64Array] = []
        self._new_lengths: list[Int64Array] = []
        self._num_new_ends = 0
        # Groups by handle.
        self._num_handles = 0
        self._free_handles: list[int] = []
        self._closed: list[int] = []
        # Of finished siblings: group, length, whether it was an end.
        self._siblings: Int64Array = np.empty((3, 0), np.int64)
        # By group, NO_GROUP being the last: ends, and ends that were to be expected.
        self._group_ends: _Floats = np.zeros(1)
        self._group_expected: _Floats = np.zeros(1)

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
        is_stop = lengths < max_tokens
        self._new_stops.append(lengths[is_stop])
        has_group = groups != NO_GROUP
        self._new_siblings.append(np.stack([groups, lengths, is_stop])[:, has_group])

    def abort(self, num_generated: IntArray) -> None:
        """These sequences are gone and did not end: they might have become longer.

        Args:
            num_generated: [n] tokens so far.
        """
        self._new_lengths.append(num_generated.astype(np.int64))

    def refresh(self, groups: IntArray, num_generated: IntArray) -> None:
        """Brings the tables up to date.

        Args:
            groups: [n] handles of all sequences that have generated tokens and have neither been observed
                nor aborted, or NO_GROUP. Preempted ones belong to them.
            num_generated: [n]
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
        self._update_frailties(groups, num_generated)
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
        mean, square = self._moments(groups, num_generated, max_tokens)
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
        """S, its sum and the sum of (2x + 1) S(x) from a length on; and L.

        Rows are numbers of ends, then means of the frailty; columns are edges of buckets.
        """
        tokens, widths, edges = self._tokens, self._widths, self._edges
        # As if who ended in a bucket had been at risk to its end: these are the tokens of a bucket
        # that nobody leaves. An end has a whole bucket's, also where the older ones are forgotten.
        at_risk = np.maximum(tokens + self._tokens_missed, self._ends * widths)
        is_seen = at_risk > 0
        entering = np.where(is_seen, at_risk, 1.0) / widths
        hazard = max(self._ends.sum(), 1e-9) / max(tokens.sum(), 1.0)
        ending_unseen = -np.expm1(widths * np.log1p(-min(hazard, 1.0 - 1e-9)))
        # Of those that enter a bucket: the share that ends there, and what those miss of it.
        ending = np.where(is_seen, self._ends / entering, ending_unseen)
        lived = np.where(is_seen, tokens / entering, ending_unseen / hazard)
        missed = (widths - lived) / np.where(ending > 0, ending, 1.0)
        survival = np.maximum(np.cumprod(np.append(1.0, 1.0 - ending)), _SMALLEST_SURVIVAL)
        common = _FRAILTY_SHAPE * (survival ** (-1.0 / _FRAILTY_SHAPE) - 1.0)
        shape = np.repeat(_FRAILTY_SHAPE + _NUM_ENDS, len(_MEANS))[:, None]
        rate = shape / np.tile(_MEANS, len(_NUM_ENDS))[:, None]
        survival = np.exp(-shape * np.log(1.0 + common / rate))
        lived = survival[:, :-1] * widths + np.diff(survival) * missed
        self._survival = _Table(survival, widths)
        self._lived = _Table(_sums_to_the_end(lived), widths)
        self._lived_square = _Table(_sums_to_the_end(lived * (edges[:-1] + edges[1:])), widths)
        self._common = _Table(common, widths)
        # Sequences that were seen in a bucket.
        self._num_seen = np.append(tokens / widths, 0.0)

    def _moments(
        self, groups: IntArray, num_generated: IntArray, max_tokens: IntArray
    ) -> tuple[_Floats, _Floats]:
        """Expected length at the end and expected square of it."""
        prior_mean, prior_square = self._prior(num_generated, max_tokens)
        if self._num_known < self._initial_wait:
            return prior_mean, prior_square
        bucket, offset = self._places(num_generated)
        last_bucket, last_offset = self._places(max_tokens)
        row = self._rows(groups, self._common.at(bucket, offset)) * len(self._edges)
        # Where its last token was: those that got as far as anybody have been there themselves.
        last_token = np.clip(num_generated - 1, 0, self._max_length)
        num_seen = self._num_seen[self._bucket_of[last_token]]
        trust = np.minimum(num_seen / _ENOUGH_AT_RISK, 1.0)
        bucket += row
        last_bucket += row
        survival = np.maximum(self._survival.at(bucket, offset), _SMALLEST_DIVISOR)
        lived = self._lived.at(bucket, offset) - self._lived.at(last_bucket, last_offset)
        squares = self._lived_square.at(bucket, offset)
        squares -= self._lived_square.at(last_bucket, last_offset)
        generated = num_generated.astype(np.float64)
        mean = generated + lived / survival
        square = generated * generated + squares / survival
        return (
            prior_mean + trust * (mean - prior_mean),
            prior_square + trust * (square - prior_square),
        )

    def _rows(self, groups: IntArray, own: _Floats) -> Int64Array:
        """[n] rows of the tables, from the ends to be expected of each sequence's own tokens."""
        is_known = groups < len(self._group_ends) - 1  # groups may be newer than the tables
        groups = np.where(is_known, groups, NO_GROUP)
        num_ends = self._group_ends[groups]
        rate = _FRAILTY_SHAPE + np.maximum(self._group_expected[groups] - own, 0.0)
        mean = np.log2((_FRAILTY_SHAPE + num_ends) / rate) * _MEANS_PER_OCTAVE + _NO_EVIDENCE
        row = np.searchsorted(_NUM_ENDS, num_ends, side="right") - 1
        column = np.clip(np.rint(mean).astype(np.int64), 0, len(_MEANS) - 1)
        rows: Int64Array = row * len(_MEANS) + column
        return rows

    def _prior(self, num_generated: IntArray, max_tokens: IntArray) -> tuple[_Floats, _Floats]:
        mean = np.maximum(max_tokens * self._prior_mean, num_generated + 1.0)
        std = max_tokens * self._prior_std
        return mean, mean * mean + std * std

    def _places(self, lengths: IntArray) -> tuple[IndexArray, _Floats]:
        """[n] the bucket of each length, and [n] how far in it."""
        lengths = np.minimum(lengths, self._max_length)
        buckets = self._bucket_of[lengths].astype(np.intp)
        return buckets, (lengths - self._edges[buckets]).astype(np.float64)

    def _update_frailties(self, groups: IntArray, num_generated: IntArray) -> None:
        """Counts each group's ends, and those to be expected of its finished and running sequences."""
        siblings = np.concatenate([self._siblings, *self._new_siblings], axis=1)
        if self._closed:
            is_closed: BoolArray = np.zeros(self._num_handles, np.bool_)
            is_closed[self._closed] = True
            siblings = siblings[:, ~is_closed[siblings[0]]]
        self._siblings = siblings
        self._new_siblings.clear()
        self._free_handles += reversed(self._closed)
        self._closed.clear()
        has_group = groups != NO_GROUP
        handles = np.append(siblings[0], groups[has_group])
        lengths = np.append(siblings[1], num_generated[has_group])
        expected = self._common.at(*self._places(lengths))
        # One more, for NO_GROUP.
        size = self._num_handles + 1
        expected_ends = np.bincount(handles, weights=expected, minlength=size)
        self._group_expected = expected_ends.astype(np.float64)
        ends = np.bincount(siblings[0], weights=siblings[2], minlength=size)
        self._group_ends = ends.astype(np.float64)


class _Table:
    """Functions of lengths, straight in each bucket.

    Args:
        at_edge: [..][num_buckets + 1]; looked up as if it had one dimension.
        widths: [num_buckets] of the buckets.
    """

    def __init__(self, at_edge: _Floats, widths: Int64Array) -> None:
        slope = np.zeros(at_edge.shape)
        slope[..., :-1] = np.diff(at_edge) / widths
        self._at_edge = at_edge.ravel()
        self._slope = slope.ravel()

    def at(self, places: IndexArray, offsets: _Floats) -> _Floats:
        """[n] the values so far behind these places."""
        values = self._slope[places]
        values *= offsets
        values += self._at_edge[places]
        return values


def _sums_to_the_end(values: _Floats) -> _Floats:
    """[..][n + 1] of [..][n]: from each place on. Small ones stay exact, unlike differences of sums."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values[..., ::-1], axis=-1, out=sums[..., -2::-1])
    return sums


def _bucket_edges(max_length: int, num_buckets: int) -> Int64Array:
    """From 0 to max_length: one by one while that is finer than equal ratios, which come then."""
    if max_length <= num_buckets:
        return np.arange(max_length + 1, dtype=np.int64)
    edges = np.geomspace(1.0, max_length, num_buckets).round().astype(np.int64)
    return np.unique(np.append(edges, [0, max_length]))
