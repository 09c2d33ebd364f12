"""The random numbers: the cipher's published test vectors, and tests of independence."""

from __future__ import annotations

import numpy as np
from rows import named

from tokasaurus.model.sampling.randomness import philox, uniforms

# From the Random123 distribution, kat_vectors: philox4x32, 10 rounds. Counter, key, output.
KNOWN_ANSWERS = (
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
)  # fmt: skip


def test_philox_gives_the_published_answers():
    def words(text):
        return tuple(np.array([int(word, 16)], np.uint64) for word in text.split())

    for counter, key, output in KNOWN_ANSWERS:
        assert philox(words(counter), words(key)) == words(output), (counter, key)


def numbers(seeds, samples, positions):
    return uniforms(
        np.array(seeds, np.int64), np.array(samples, np.int32), np.array(positions, np.int32)
    )


def check_uniform(*inputs):
    n = len(inputs[0])
    drawn = numbers(*inputs)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert len(np.unique(drawn)) == n
    expected = n / 50
    chi_square = ((np.histogram(drawn, 50, (0, 1))[0] - expected) ** 2 / expected).sum()
    # With 49 degrees of freedom, one try in 30,000 exceeds 100.
    assert chi_square < 100
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / n**0.5


def test_numbers_are_uniform_along_every_input():
    n = 20_000
    count, zero = np.arange(n), np.zeros(n)
    for varied, inputs in {
        "seed": (count, zero, zero),
        "high seed": (count << 32, zero, zero),
        "sample": (zero + 7, count, zero),
        "position": (zero + 7, zero, count),
    }.items():
        with named(varied):
            check_uniform(*inputs)


def test_a_draw_depends_on_its_own_row_only():
    alone = numbers([5], [3], [9])
    among = numbers([1, 5, 2**63 - 1], [0, 3, 9], [4, 9, 9])
    assert alone[0] == among[1]
