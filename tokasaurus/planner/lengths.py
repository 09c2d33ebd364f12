"""How long completions get. Only the device knows, so that the manager has to predict it.

A length counts generated tokens, including the stop token. It depends only on the seed and the
sample index of a sequence, so it is the same in any batch and after any preemption.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokasaurus.protocol.arrays import Int32Array, Int64Array

__all__ = ["CompletionLengths", "DrawnLengths", "ListedLengths", "mix"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def mix(values: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of two columns (the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    mixed: NDArray[np.uint64] = values + others * _GOLDEN + _GOLDEN
    mixed = (mixed ^ (mixed >> _SHIFTS[0])) * _FACTORS[0]
    mixed = (mixed ^ (mixed >> _SHIFTS[1])) * _FACTORS[1]
    mixed ^= mixed >> _SHIFTS[2]
    return mixed


class CompletionLengths(Protocol):
    """Decides how long completions get."""

    def lengths(self, seeds: Int64Array, sample_indices: Int32Array) -> Int64Array:
        """The lengths of sequences: [rows], at least 1 each."""
        ...


class DrawnLengths:
    """Draws the length of each sequence from a list, in which all are equally likely.

    Args:
        choices: [choices], at least 1 each.
    """

    def __init__(self, choices: Int64Array) -> None:
        self._choices = choices

    def lengths(self, seeds: Int64Array, sample_indices: Int32Array) -> Int64Array:
        hashes = mix(seeds.astype(np.uint64), sample_indices.astype(np.uint64))
        drawn: Int64Array = self._choices[hashes % np.uint64(len(self._choices))]
        return drawn


class ListedLengths:
    """Looks lengths up: sample i of the request with seed s gets ``lists[s][i]``.

    Args:
        lists: at least 1 each.
    """

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        counts = np.array([len(each) for each in lists], np.int64)
        self._starts = np.cumsum(counts) - counts
        self._lengths = np.array([length for each in lists for length in each], np.int64)

    def lengths(self, seeds: Int64Array, sample_indices: Int32Array) -> Int64Array:
        listed: Int64Array = self._lengths[self._starts[seeds] + sample_indices]
        return listed
