"""The random numbers of sampling: counters encrypted by a cipher, without state.

The number of a draw is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3", https://doi.org/10.1145/2063384.2063405) of

    key      seed, low and high word
    counter  sample index, generated position, 0, 0

It is computed on the host in integers, so it is the same on every device, in every batch and in
every slot. The numbers of two samples or two seeds are unrelated, however close the samples or
seeds are.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tokasaurus.protocol.arrays import Int32Array, Int64Array

__all__ = ["philox", "uniforms"]

# Each holds 32 bits.
_Words: TypeAlias = NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
# The golden ratio and sqrt(3) - 1.
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_ROUNDS = 10


def uniforms(
    seeds: Int64Array, sample_indices: Int32Array, positions: Int32Array
) -> NDArray[np.float64]:
    """One number in [0, 1) for each draw, with 53 random bits.

    Args:
        seeds: [draws], not negative.
        sample_indices: [draws], the index of the sample in its request.
        positions: [draws], the number of tokens that the sample has generated before.

    Returns:
        [draws] float64.
    """
    seed = seeds.astype(np.uint64)
    zero = np.zeros_like(seed)
    counter = (sample_indices.astype(np.uint64), positions.astype(np.uint64), zero, zero)
    high, low, _, _ = philox(counter, (seed & _LOW, seed >> _32))
    bits: _Words = ((high << _32) | low) >> np.uint64(11)
    return np.ldexp(bits.astype(np.float64), -53)


def philox(
    counter: tuple[_Words, _Words, _Words, _Words], key: tuple[_Words, _Words]
) -> tuple[_Words, _Words, _Words, _Words]:
    """Philox4x32-10, elementwise over arrays of 32-bit words that are stored in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _32) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _32) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3
