"""Learns how long completions get, and predicts how long running ones will be.

Owns counts over buckets of lengths and the lengths of finished siblings. Knows nothing of slots,
pages or time: predictions depend only on the calls that were made.

**All requests.** The learned quantity is the hazard: of the tokens that were generated as the
(x+1)-th of their sequence, the share that was the last one. It is estimated as *ends / tokens
generated*, for each bucket of x::

    length so far    0         8        16        24
                     ├─────────┼─────────┼─────────┤
    ended at 11      ━━━━━━━━━━━━━━●                   8 tokens here, 3 and an end there
    ended by limit   ━━━━━━━━━━━━━━━━━━━━┥             8 and 8, no end
    still running    ━━━━━━━━━━━━━━━━━>                8 and 6, no end

Tokens are counted while they are generated, not when their sequence ends. This makes the estimate
right where the lengths of finished sequences alone mislead:

- Short sequences finish first, but the tokens of long ones are in the denominator from the
  beginning.
- A sequence that is cut off at ``max_tokens`` says only that it would have been at least that long.
- Both counts forget at the same speed. So a busy engine, which remembers less than its longest
  sequences, is not more biased than an idle one.

This is the product-limit estimator of E. L. Kaplan, P. Meier, Nonparametric estimation from
incomplete observations, JASA 53, 1958. Where a bucket is wider than a token, ends are related to
the sequences that enter it, as in an actuary's life table.

**Where little was seen.** The hazard of all lengths together, h, includes one imagined sequence,
which ended at a sixteenth of the usual max_tokens. Four imagined sequences enter each bucket and
end with hazard h, so a bucket that few sequences have reached has little weight of its own. So
there is an answer from the first request on, and each token that is generated without an end lowers
h, long before the first sequence has finished.

**Siblings.** The samples of one prompt have similar lengths. The hazard of a group is taken to be a
common one times the group's *frailty*, a factor with a gamma distribution of mean 1 and variance
1/k. The posterior is a gamma distribution too. Its shape is k + the ends of the siblings. Its rate
is k + the number of ends to expect from the common hazard for their tokens, finished or running.
With L(x) for the sum of the common hazard below x, and the tokens of the sequence itself left out
of the rate, the probability of more than x tokens is::

    S(x)  =  (1 + L(x) / rate) ** -shape

For a sequence without siblings both are k, and S is that of all requests. L follows from this: for
all requests together, the hazard falls with x, since the long groups are left. (Shared frailty: D.
G. Clayton, A model for association in bivariate life tables, Biometrika 65, 1978.) A mean of the
lengths of finished siblings would teach little, because sequences that still run are longer as a
rule.

**Predictions** are a sample of the possible lengths, not their mean. The forecast needs the number
of sequences that end in each coming step. If each were predicted at its mean, none would be
predicted to end soon, although some do in every step. So each sequence has a number u between 0 and
1, the share of possible lengths that are below its predicted one. After g tokens, the prediction is
the x with::

    S(x) / S(g)  =  1 - u

The values of u of sequences that arrive one after another are spread evenly (J. G. van der Corput,
Verteilungsfunktionen, 1935: the bits of a counter in reverse). So a few predictions already have
the shape of the distribution, and those of a thousand siblings have nearly its exact sum. The u of
a sequence stays the same, and says nothing about its true length. Sequences that outlive their
prediction are predicted again, and at each age the predictions for the sequences that are left have
the distribution of the lengths that are left.

There is one table, of H(x) = log(1 + L(x) / k); for single sequences this is -log S / k. It is
linear in each bucket. The equation above, solved for x and free of differences of large numbers,
is::

    H(x)  =  H(g) + log(1 + (1 + (rate - k) / k * exp(-H(g))) * ((1 - u) ** (-1 / shape) - 1))

The margin is a number of standard deviations of the sum over the n sequences that run together. In
standard deviations of the length of one sequence, it is smaller by the factor sqrt(n). It is
applied by moving all u up: log(u / (1 - u)) grows by the margin times its own standard deviation,
pi / sqrt(3). So the mean is exact where lengths are logistic, and short by a tenth of the margin
where they are exponential or of two equally frequent kinds. No length passes the largest possible
one.

**Requests of at most one token** (embeddings, loglikelihoods) teach nothing: their token always
reaches the limit, and thousands of them would make the predictor forget what the others taught.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.protocol.arrays import EMPTY_INT64, BoolArray, Int32Array, Int64Array

__all__ = ["NO_GROUP", "LengthPredictor", "at_most_median"]

IntArray: TypeAlias = NDArray[np.signedinteger]
_Floats: TypeAlias = NDArray[np.float64]

NO_GROUP = -1  # the handle of a sequence without siblings

_FRAILTY_SHAPE = 1.0  # k
_ENOUGH_AT_RISK = 4.0  # imagined sequences that enter each bucket
_IMAGINED_SHARE = 1 / 16  # of max_tokens: the imagined end
_LARGEST_EXPONENT = 300.0  # of factors that are multiplied once
_ALMOST_ALL = 1.0 - 2.0**-53  # of a bucket may end there: H stays finite
# Sequences differ in the low bits of their numbers.
_NUMBER_BITS = 16


def _spread_evenly() -> _Floats:
    """[2 ** _NUMBER_BITS] u by number; those of 2 ** i consecutive numbers are evenly spread."""
    reverse: Int64Array = np.zeros(1, np.int64)
    for _ in range(_NUMBER_BITS):
        reverse = np.append(2 * reverse, 2 * reverse + 1)
    return (reverse + 0.5) / len(reverse)


def at_most_median(number: int) -> int:
    """The number itself if its sequence is predicted no longer than the median, else the median's.

    The lowest bit of a number is the highest bit of its u. So an odd number has a u above the
    middle, and 1 has the least of these.
    """
    return 1 if number & 1 else number


_LEVELS = _spread_evenly()
_LOG_LEVELS: _Floats = -np.log1p(-_LEVELS)  # -log(1 - u)
_LOGISTIC_STD = np.pi / np.sqrt(3.0)


class LengthPredictor:
    """Predicts the number of tokens that sequences will have generated at their end.

    Feed it ``expect`` as requests come, ``observe`` and ``abort`` as sequences end, call
    ``refresh`` every few steps, and ``predict`` at any time.

    Args:
        max_length: no sequence generates more tokens.
        num_buckets: resolution of the table; lengths are told apart exactly while they are few, and
            to about ``log(max_length) / num_buckets`` of themselves beyond.
        memory: finished sequences after which what was learned weighs 1/e.
        prior_mean: expected length at first, as a fraction of max_tokens; None: learned from the
            first token on.
        prior_std: its standard deviation, as a fraction too.
        initial_wait: sequences that must end before the prior is given up, where there is one.
        std_scale: the margin of the sum of predictions, in standard deviations.
    """

    def __init__(
        self,
        max_length: int,
        *,
        num_buckets: int = 1024,
        memory: int = 2048,
        prior_mean: float | None = None,
        prior_std: float = 0.0,
        initial_wait: int = 16,
        std_scale: float = 0.25,
    ) -> None:
        self.num_observed = 0
        self._num_known = 0  # observed before the last refresh
        self._max_length = max_length
        self._memory = memory
        self._prior_mean = prior_mean
        self._prior_std = prior_std
        self._initial_wait = initial_wait
        self._std_scale = std_scale
        # Of the sequences that were expected: their number, and the sum of their max_tokens.
        self._num_expected = 0.0
        self._sum_max_tokens = 0.0
        # Bucket b is the lengths edges[b] .. edges[b + 1] - 1.
        self._edges = _bucket_edges(max_length, num_buckets)
        self._widths = np.diff(self._edges)
        num_buckets = len(self._widths)
        self._bucket_of: Int32Array = np.repeat(
            np.arange(num_buckets + 1, dtype=np.int32), np.append(self._widths, 1)
        )
        self._ends: _Floats = np.zeros(num_buckets)
        self._tokens: _Floats = np.zeros(num_buckets)  # generated there
        # Tokens that would have been generated if sequences that ended there had gone on to its
        # end.
        self._tokens_missed: _Floats = np.zeros(num_buckets)
        # The part of ``_tokens`` of the sequences that ran at the last refresh.
        self._running_tokens: _Floats = np.zeros(num_buckets)
        # What is generated in the mean, with a limit at each edge; None until it is needed.
        self._means: _Floats | None = None
        self._make_table()
        # What came since the last refresh.
        self._new_siblings: list[Int64Array] = []
        self._new_stops: list[Int64Array] = []
        self._new_lengths: list[Int64Array] = []
        self._num_new_ends = 0
        # Groups by handle.
        self._num_handles = 0
        self._free_handles: list[int] = []
        self._closed: list[int] = []
        # Of finished siblings: group, length, whether it ended by itself.
        self._siblings: Int64Array = np.empty((3, 0), np.int64)
        # By group, and last for NO_GROUP: the shape, and the ends that were to be expected.
        self._group_shape: _Floats = np.full(1, _FRAILTY_SHAPE)
        self._group_expected: _Floats = np.zeros(1)

    def expect(self, max_tokens: int, count: int) -> None:
        """Counts sequences with this limit that will run. A limit of one token is not counted."""
        if max_tokens == 1:
            return
        self._num_expected += count
        self._sum_max_tokens += count * max_tokens

    def open_group(self) -> int:
        """Returns a handle for the samples of one request, with one prompt and one max_tokens."""
        if self._free_handles:
            return self._free_handles.pop()
        self._num_handles += 1
        return self._num_handles - 1

    def close_group(self, handle: int) -> None:
        """Gives back the handle of a group when all its sequences have ended."""
        self._closed.append(handle)  # until the next refresh the tables know it as this group

    def observe(self, groups: IntArray, num_generated: IntArray, max_tokens: IntArray) -> None:
        """Learns from sequences that ended by themselves or reached their limit.

        Args:
            groups: [n] handles, or NO_GROUP.
            num_generated: [n] tokens in all, 1 or more. A sequence with ``max_tokens`` tokens
                reached its limit: it says nothing about what would have come.
            max_tokens: [n]; rows where it is 1 are passed over.
        """
        teaches = max_tokens > 1
        groups, max_tokens = groups[teaches], max_tokens[teaches]
        lengths = num_generated[teaches].astype(np.int64)
        self.num_observed += len(lengths)
        self._num_new_ends += len(lengths)
        self._new_lengths.append(lengths)
        is_stop = lengths < max_tokens
        self._new_stops.append(lengths[is_stop])
        has_group = groups != NO_GROUP
        self._new_siblings.append(np.stack([groups, lengths, is_stop])[:, has_group])

    def abort(self, num_generated: IntArray) -> None:
        """Learns from sequences that were aborted: they might have become longer.

        Args:
            num_generated: [n] tokens so far.
        """
        self._new_lengths.append(num_generated.astype(np.int64))

    def refresh(self, groups: IntArray, num_generated: IntArray) -> None:
        """Brings the tables up to date.

        Args:
            groups: [n] handles, or NO_GROUP, of all sequences that have generated tokens and were
                neither observed nor aborted; also of preempted ones.
            num_generated: [n] their tokens so far.
        """
        keep = np.exp(-self._num_new_ends / self._memory)
        self._ends *= keep
        self._tokens_missed *= keep
        self._num_expected *= keep
        self._sum_max_tokens *= keep
        stops = np.minimum(np.concatenate([EMPTY_INT64, *self._new_stops]), self._max_length)
        buckets = self._bucket_of[stops - 1]  # a sequence of x + 1 tokens ended where it was x long
        np.add.at(self._ends, buckets, 1.0)
        np.add.at(self._tokens_missed, buckets, self._edges[buckets + 1] - stops)
        running_tokens = self._count_tokens(num_generated)
        gone_tokens = self._count_tokens(np.concatenate([EMPTY_INT64, *self._new_lengths]))
        new_tokens = gone_tokens + running_tokens - self._running_tokens
        # The maximum is for callers that lose sequences: every end is also a token.
        self._tokens = np.maximum(keep * self._tokens + new_tokens, self._ends)
        self._running_tokens = running_tokens
        self._num_known = self.num_observed
        self._make_table()
        self._update_frailties(groups, num_generated)
        self._new_stops.clear()
        self._new_lengths.clear()
        self._num_new_ends = 0

    def predict(
        self,
        groups: IntArray,
        num_generated: IntArray,
        max_tokens: IntArray,
        numbers: IntArray,
        num_together: int = 1,
    ) -> Int64Array:
        """How many tokens sequences will have generated at their end, including those so far.

        Args:
            groups: [n] handles, or NO_GROUP.
            num_generated: [n] tokens so far; 0 for sequences that wait.
            max_tokens: [n]
            numbers: [n] the same for a sequence at each call; consecutive for sequences that came
                together.
            num_together: sequences that run at the same time, 1 or more: the deviations of many
                cancel out.

        Returns:
            [n] more than ``num_generated`` where that is less than ``max_tokens``, and never more
            than ``max_tokens``.
        """
        numbers = numbers & (len(_LEVELS) - 1)
        margin = self._std_scale / np.sqrt(num_together)  # standard deviations of a length
        if self._prior_mean is not None and self._num_known < self._initial_wait:
            deviations = np.sqrt(3.0) * (2.0 * _LEVELS[numbers] - 1.0) + margin
            predicted = max_tokens * (self._prior_mean + self._prior_std * deviations)
        else:
            predicted = self._learned(groups, num_generated, numbers, margin)
        # A sum that should be a whole number is not always equal to it.
        lengths = np.ceil(predicted - 1e-6).astype(np.int64)
        bounded: Int64Array = np.minimum(np.maximum(lengths, num_generated + 1), max_tokens)
        return bounded

    def mean(self, max_tokens: int) -> float:
        """The mean of what sequences with this limit generate, or the limit if it is smaller."""
        if self._prior_mean is not None and self._num_known < self._initial_wait:
            return max(1.0, min(max_tokens, self._max_length) * self._prior_mean)
        if self._means is None:
            survival = np.exp(-_FRAILTY_SHAPE * self._risk)
            in_buckets = self._widths * (survival[:-1] + survival[1:]) / 2
            self._means = np.append(0.0, np.cumsum(in_buckets))
        return float(np.interp(max_tokens, self._edges, self._means))

    def _learned(
        self,
        groups: IntArray,
        num_generated: IntArray,
        numbers: IntArray,
        margin: float,
    ) -> _Floats:
        """[n] lengths at the end."""
        is_known = groups < len(self._group_shape) - 1  # groups may be newer than the last refresh
        groups = np.where(is_known, groups, NO_GROUP)
        inverse_shape = 1.0 / self._group_shape[groups]
        risk = self._risk_at(num_generated)
        others = np.maximum(self._group_expected[groups] - _expected_ends(risk), 0.0)
        slope = 1.0 + others / _FRAILTY_SHAPE * np.exp(-risk)
        level, log_level = _LEVELS[numbers], _LOG_LEVELS[numbers]
        # u is raised by the margin: to u * odds / (1 - u + u * odds).
        odds = np.exp(min(margin * _LOGISTIC_STD, _LARGEST_EXPONENT))
        log_level = log_level + np.log(1.0 + level * (odds - 1.0))
        growth = np.exp(np.minimum(log_level * inverse_shape, _LARGEST_EXPONENT)) - 1.0
        # Beyond the table, this is the largest length.
        lengths: _Floats = np.interp(risk + np.log(1.0 + slope * growth), self._risk, self._edges)
        return lengths

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

    def _make_table(self) -> None:
        """Computes H at the edges of buckets, and its slope between them."""
        self._means = None
        tokens, widths = self._tokens, self._widths
        usual = (
            self._sum_max_tokens / self._num_expected if self._num_expected else self._max_length
        )
        imagined = max(2.0, _IMAGINED_SHARE * usual)
        overall = (self._ends.sum() + 1.0) / (tokens.sum() + imagined)
        ending_overall = -np.expm1(widths * np.log1p(-overall))
        # Sequences that ended in a bucket count as if they had been at risk to its end, so these
        # are the tokens of a bucket that no sequence leaves. An end has those of a whole bucket
        # even where older tokens are forgotten.
        entering = np.maximum((tokens + self._tokens_missed) / widths, self._ends)
        ending = (self._ends + _ENOUGH_AT_RISK * ending_overall) / (entering + _ENOUGH_AT_RISK)
        survival_exponents = -np.log1p(-np.minimum(ending, _ALMOST_ALL))
        self._risk = np.append(0.0, np.cumsum(survival_exponents)) / _FRAILTY_SHAPE
        self._risk_slope = np.append(np.diff(self._risk) / widths, 0.0)

    def _risk_at(self, lengths: IntArray) -> _Floats:
        """[n] H."""
        lengths = np.minimum(lengths, self._max_length)
        buckets = self._bucket_of[lengths]
        offsets = lengths - self._edges[buckets]
        risk: _Floats = self._risk[buckets] + self._risk_slope[buckets] * offsets
        return risk

    def _update_frailties(self, groups: IntArray, num_generated: IntArray) -> None:
        """Counts the ends of each group, and the ends to expect of all its sequences."""
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
        expected = _expected_ends(self._risk_at(lengths))
        # One more, for NO_GROUP.
        size = self._num_handles + 1
        expected_ends = np.bincount(handles, weights=expected, minlength=size)
        self._group_expected = expected_ends.astype(np.float64)
        ends = np.bincount(siblings[0], weights=siblings[2], minlength=size)
        self._group_shape = _FRAILTY_SHAPE + ends.astype(np.float64)


def _expected_ends(risk: _Floats) -> _Floats:
    """[n] L for each H; finite, so that it can be summed."""
    expected: _Floats = _FRAILTY_SHAPE * np.expm1(np.minimum(risk, _LARGEST_EXPONENT))
    return expected


def _bucket_edges(max_length: int, num_buckets: int) -> Int64Array:
    """From 0 to max_length: one by one while that is finer than equal ratios, then in these."""
    if max_length <= num_buckets:
        return np.arange(max_length + 1, dtype=np.int64)
    edges = np.geomspace(1.0, max_length, num_buckets).round().astype(np.int64)
    return np.unique(np.append(edges, [0, max_length]))
