"""Places in cumulative sums, against sums of exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from rows import named

from tokasaurus.model.sampling import inversion
from tokasaurus.model.sampling.inversion import find, sums_of_blocks


def place(weights: np.ndarray, share: float, beyond: bool) -> int:
    """The first place at which the exact cumulative weight reaches, or exceeds, the share."""
    exact = [Fraction(float(weight)) for weight in weights]
    target = Fraction(share) * sum(exact)
    cumulative = Fraction(0)
    for index, weight in enumerate(exact):
        cumulative += weight
        if cumulative > target or (cumulative == target and not beyond):
            return index
    raise AssertionError("the share is below 1")


def found(weights: torch.Tensor, shares: list[float], beyond: bool) -> list[int]:
    rows = weights.repeat(len(shares), 1)
    column = torch.tensor(shares, dtype=torch.float64)[:, None]
    return find(
        sums_of_blocks(rows),
        column,
        rows.shape[1],
        lambda places: rows.gather(1, places),
        beyond=beyond,
    )[:, 0].tolist()


def test_places_are_those_of_exact_sums(monkeypatch):
    """Whole weights make shares that lie exactly on a boundary; blocks of 0 are skipped."""
    monkeypatch.setattr(inversion, "_BLOCK", 8)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        size = int(rng.choice([1, 7, 8, 9, 60]))
        weights = rng.choice([0, 0, 1, 3], size) if seed % 2 else rng.random(size)
        weights[rng.random(size) < 0.3] = 0
        if not weights.any():
            weights[rng.integers(size)] = 1
        weights = weights.astype(np.float32)
        shares = [*rng.random(20), 0.0, 0.5, 0.25, 1 - 2.0**-53]
        for beyond in (True, False):
            with named((seed, beyond)):
                expected = [place(weights, share, beyond) for share in shares]
                assert found(torch.from_numpy(weights), shares, beyond) == expected


def test_small_weights_behind_a_large_sum_are_found():
    """A block's weights are summed up by themselves, not behind everything before them."""
    weights = torch.full((512,), 1e-14)
    weights[:256] = 1e3
    shares = [1 - 1e-17 - step * 5e-20 for step in range(3)]
    assert all(0 <= each < 512 for each in found(weights, shares, True))
    weights[:256] = 0
    assert found(weights, [0.0, 0.5, 1 - 2.0**-53], True) == [256, 384, 511]


def test_weights_that_are_not_numbers_have_a_place():
    assert found(torch.full((700,), torch.nan), [0.1, 0.9], True) == [699, 699]
